"""The ASGI application: routes, and the guards in front of them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from ..core.args import ServerArgs
from .errors import HTTPError
from .guards.auth import AuthMiddleware, KeyRing
from .guards.body import BodyMiddleware
from .guards.hosts import HostMiddleware, allowed_names, is_loopback
from .guards.outer import OuterMiddleware
from .router import EngineRouter
from .serving.chat import ChatCompletions
from .serving.completions import Completions
from .serving.probes import Probes
from .serving.tokens import Tokens
from .state import ServerState

Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def routes(state: ServerState) -> list[Route]:
    """Every path that is served; all but the probes need a key where keys are set."""
    probes, tokens = Probes(state), Tokens(state)
    gets: dict[str, Handler] = {
        "/v1/models": probes.models,
        "/v1/models/{model_id:path}": probes.model,
        "/livez": probes.live,
        "/readyz": probes.health,
        "/health": probes.health,
        "/ping": probes.health,
        "/version": probes.version,
        "/load": probes.load,
        "/metrics": probes.metrics,
    }
    posts: dict[str, Handler] = {
        "/v1/completions": Completions(state).create,
        "/v1/chat/completions": ChatCompletions(state).create,
        "/tokenize": tokens.tokenize,
        "/detokenize": tokens.detokenize,
    }
    return [Route(path, handler, methods=["GET"]) for path, handler in gets.items()] + [
        Route(path, handler, methods=["POST"]) for path, handler in posts.items()
    ]


class Routes:
    """Starlette's router, with this server's errors for what it does not know."""

    def __init__(self, state: ServerState) -> None:
        self.router = Router(routes(state), redirect_slashes=False, default=self._not_found)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["app"] = self  # makes the router raise for a wrong method, not answer in plain text
        await self.router(scope, receive, send)

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
    app = BodyMiddleware(app, args.max_body_bytes)
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
