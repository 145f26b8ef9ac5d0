"""A server in this process, in front of an engine that is not real."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from pathlib import Path

import httpx
import pytest
import uvicorn

from trimaran.core.args import EngineArgs, ServerArgs
from trimaran.server.app import create_app
from trimaran.server.http_protocol import protocol_class
from trimaran.server.router import EngineRouter, ServedModel

sys.path.insert(0, str(Path(__file__).parent))
from fake_engine import FakeEngine


class Server:
    """The application over a fake engine; `client` talks to it without a socket."""

    def __init__(self, engine=None, engine_args=None, **args):
        self.engine = engine or FakeEngine()
        self.model = ServedModel(self.engine, engine_args or EngineArgs())
        self.model.mark_ready()
        self.args = ServerArgs(**args)
        self.app, self.state = create_app(EngineRouter(self.model), self.args)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=True)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    async def post(self, path, body=None, **options):
        if body is not None:
            options["json"] = body
        return await self.client.post(path, **options)

    async def complete(self, **body):
        return await self.post("/v1/completions", {"prompt": "Hi", **body})

    async def chat(self, *contents, **body):
        messages = [{"role": "user", "content": content} for content in contents or ("Hi",)]
        return await self.post("/v1/chat/completions", {"messages": messages, **body})

    @contextlib.asynccontextmanager
    async def listen(self):
        """The same application behind real sockets; yields the base URL."""
        sock = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(
            self.app,
            http=protocol_class(self.args),
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            root_path=self.args.root_path,
        )
        server = uvicorn.Server(config)
        server.capture_signals = contextlib.nullcontext
        task = asyncio.ensure_future(server.serve(sockets=[sock]))
        while not server.started:
            await asyncio.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            await asyncio.wait_for(task, 10)


@pytest.fixture
def serve():
    """Makes servers: `serve(FakeEngine(...), strict_params=True)`."""
    return Server


@pytest.fixture
def server():
    return Server()


async def eventually(condition, seconds=5.0):
    """Waits until `condition()` holds; fails after `seconds`."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "never happened"
        await asyncio.sleep(0.01)
