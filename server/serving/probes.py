"""Models, probes, version, load and metrics."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ... import __version__
from ...core.errors import EngineDeadError
from ..errors import HTTPError
from ..responses import JSONResponse
from ..router import ServedModel
from ..state import ServerState


class Probes:
    """The endpoints that look at the server instead of using it."""

    def __init__(self, state: ServerState) -> None:
        self.state = state

    async def models(self, request: Request) -> Response:
        self._check_loaded()
        data = [_card(model, name) for model in self.state.router for name in model.names]
        return JSONResponse({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model_id"]
        return JSONResponse(_card(self.state.router.resolve(name), name))

    async def live(self, request: Request) -> Response:
        """The process is up, whatever the engine does."""
        return JSONResponse({"status": "ok"})

    async def health(self, request: Request) -> Response:
        """200 while the engine takes requests; 503 while it loads, is dead, or is drained."""
        if self.state.draining:
            raise _unavailable("shutting_down", "The server is shutting down.")
        self._check_loaded()
        try:
            self.state.router.check_health()
        except EngineDeadError:
            raise _unavailable("engine_dead", "The engine is not running.") from None
        return JSONResponse({"status": "ok"})

    async def version(self, request: Request) -> Response:
        return JSONResponse({"version": __version__})

    async def load(self, request: Request) -> Response:
        stats = [model.engine.stats() for model in self.state.router if model.ready]
        return JSONResponse(
            {
                "server_load": self.state.num_in_flight,
                "num_running": sum(one.num_running for one in stats),
                "num_waiting": sum(one.num_waiting for one in stats),
                "kv_used": sum(one.kv_used for one in stats),
                "kv_total": sum(one.kv_total for one in stats),
            }
        )

    async def metrics(self, request: Request) -> Response:
        return Response(
            self.state.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    def _check_loaded(self) -> None:
        if not all(model.ready for model in self.state.router):
            raise _unavailable("model_loading", "The model is still loading.")


def _card(model: ServedModel, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "trimaran",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len,
    }


def _unavailable(code: str, message: str) -> HTTPError:
    return HTTPError(503, message, code=code, headers={"retry-after": "2"})
