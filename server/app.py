"""The ASGI application: routes, and the guards in front of them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import FastAPI
from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from .. import __version__
from ..core.args import ServerArgs
from .errors import HTTPError
from .guards.auth import AuthMiddleware, KeyRing
from .guards.body import BodyMiddleware
from .guards.hosts import HostMiddleware, allowed_names, is_loopback
from .guards.outer import OuterMiddleware
from .protocol.chat import ChatRequest, TokenizeRequest
from .protocol.completions import CompletionRequest, DetokenizeRequest
from .router import EngineRouter
from .serving.chat import ChatCompletions
from .serving.completions import Completions
from .serving.probes import Probes
from .serving.tokens import Tokens
from .state import ServerState

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
REFERENCE = "#/components/schemas/{model}"


class Routes(FastAPI):
    """Every path that is served; all but the probes need a key where keys are set.

    The framework routes and describes (`/openapi.json`). Bodies are read and checked by the
    handlers, off the event loop; every error goes to the outermost guard, which alone answers it.
    """

    def __init__(self, state: ServerState) -> None:
        super().__init__(
            title="Trimaran",
            version=__version__,
            docs_url=None,
            redoc_url=None,
            redirect_slashes=False,
        )
        self.router.default = self._not_found
        self.bodies: dict[str, type[BaseModel]] = {}
        probes, tokens = Probes(state), Tokens(state)
        self._get("/v1/models", probes.models)
        self._get("/v1/models/{model_id:path}", probes.model)
        for path in ("/readyz", "/health", "/ping"):
            self._get(path, probes.health)
        self._get("/livez", probes.live)
        self._get("/version", probes.version)
        self._get("/load", probes.load)
        self._get("/metrics", probes.metrics)
        self._post("/v1/completions", Completions(state).create, CompletionRequest)
        self._post("/v1/chat/completions", ChatCompletions(state).create, ChatRequest)
        self._post("/tokenize", tokens.tokenize, TokenizeRequest)
        self._post("/detokenize", tokens.detokenize, DetokenizeRequest)

    def _get(self, path: str, handler: Handler) -> None:
        self.add_api_route(path, handler, methods=["GET"], response_model=None)
        self.add_api_route(
            path, handler, methods=["HEAD"], response_model=None, include_in_schema=False
        )

    def _post(self, path: str, handler: Handler, body: type[BaseModel]) -> None:
        self.bodies[path] = body
        self.add_api_route(path, handler, methods=["POST"], response_model=None)

    def build_middleware_stack(self) -> ASGIApp:
        """Without the framework's own error answers."""
        return AsyncExitStackMiddleware(self.router)

    def openapi(self) -> dict[str, Any]:
        """The description, with the request bodies that the handlers validate."""
        if self.openapi_schema is None:
            document = super().openapi()
            models = [(model, "validation") for model in self.bodies.values()]
            schemas, rest = models_json_schema(models, ref_template=REFERENCE)  # type: ignore[arg-type]
            components = document.setdefault("components", {}).setdefault("schemas", {})
            components.update(rest.get("$defs", {}))
            for (model, _), schema in schemas.items():
                for path in (path for path, body in self.bodies.items() if body is model):
                    content = {"application/json": {"schema": schema}}
                    document["paths"][path]["post"]["requestBody"] = {
                        "required": True,
                        "content": content,
                    }
        return super().openapi()

    @staticmethod
    async def _not_found(scope: Scope, receive: Receive, send: Send) -> None:
        raise HTTPError(404, "There is no such path here.", code="not_found")


def create_app(
    router: EngineRouter, args: ServerArgs, *, keys: KeyRing | None = None
) -> tuple[ASGIApp, ServerState]:
    """The application, and the state that whoever runs it can look into.

    `keys`: those accepted; by default the ones in `args.api_key`. Engines are started and closed
    by the caller: until a model is marked ready its requests are answered with 503.
    """
    state = ServerState(router, args)
    ring = KeyRing(args.api_key) if keys is None else keys
    bound = None if args.uds else args.host
    app: ASGIApp = Routes(state)
    app = BodyMiddleware(app, args)
    app = AuthMiddleware(app, ring, public_metrics=bound is not None and is_loopback(bound))
    app = HostMiddleware(app, allowed_names(bound, args.allowed_hosts))
    app = OuterMiddleware(app, state)
    if args.allowed_origins:
        app = CORSMiddleware(
            app,
            allow_origins=args.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "x-trimaran-ignored", "retry-after"],
        )
    return app, state
