"""What `chat` and `complete` talk to: an engine in this process, or a server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

from ..core.args import EngineArgs
from .http_client import Client, RemoteError

Messages = list[dict[str, str]]


class Backend(Protocol):
    """Yields text as it is generated."""

    name: str

    async def start(self) -> None: ...
    def chat(self, messages: Messages, options: dict[str, Any]) -> AsyncIterator[str]: ...
    def complete(self, prompt: str, options: dict[str, Any]) -> AsyncIterator[str]: ...
    async def close(self) -> None: ...


class RemoteBackend:
    """A server that speaks the OpenAI API."""

    def __init__(self, client: Client, model: str | None) -> None:
        self.client = client
        self.name = model or ""

    async def start(self) -> None:
        if not self.name:
            models = (await self.client.get("/v1/models"))["data"]
            if not models:
                raise RemoteError("The server serves no model yet.")
            self.name = models[0]["id"]

    async def chat(self, messages: Messages, options: dict[str, Any]) -> AsyncIterator[str]:
        body = {"model": self.name, "messages": messages, "stream": True, **options}
        async for event in self.client.events("/v1/chat/completions", body):
            for choice in event["choices"]:
                yield choice["delta"].get("content") or ""

    async def complete(self, prompt: str, options: dict[str, Any]) -> AsyncIterator[str]:
        body = {"model": self.name, "prompt": prompt, "stream": True, **options}
        async for event in self.client.events("/v1/completions", body):
            for choice in event["choices"]:
                yield choice["text"]

    async def close(self) -> None:
        """Nothing is held between requests."""


class LocalBackend:
    """An engine of this process's own."""

    def __init__(self, args: EngineArgs) -> None:
        from ..core.async_engine import AsyncEngine

        self.engine = AsyncEngine.from_args(args, in_process=True)
        self.name = args.model

    async def start(self) -> None:
        await self.engine.start()
        self.name = self.engine.model.name

    async def chat(self, messages: Messages, options: dict[str, Any]) -> AsyncIterator[str]:
        text = await self.engine.render_chat(messages, add_generation_prompt=True)
        tokens = await self.engine.encode(text, add_special_tokens=False)
        async for piece in self._generate(tokens, {"max_tokens": None, **options}):
            yield piece

    async def complete(self, prompt: str, options: dict[str, Any]) -> AsyncIterator[str]:
        async for piece in self._generate(await self.engine.encode(prompt), options):
            yield piece

    async def _generate(self, tokens: list[int], options: dict[str, Any]) -> AsyncIterator[str]:
        from ..core.sampling_params import OutputKind

        params = self.engine.default_sampling_params(output_kind=OutputKind.DELTA, **options)
        async for output in self.engine.generate(tokens, params):
            for sequence in output.outputs:
                yield sequence.text

    async def close(self) -> None:
        await self.engine.close()
