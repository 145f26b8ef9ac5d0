"""`AsyncEngine`: an engine for asyncio programs, such as the HTTP server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from .config import EngineArgs, ModelSpec
from .engine.messages import EngineStats
from .sampling_params import BeamSearchParams, SamplingParams
from .text.templates import ChatTemplate
from .text.tokenizer import Tokenizer
from .types import BeamSearchOutput, RequestOutput

PromptInput = str | Sequence[int] | Mapping[str, Any]


class AsyncEngine:
    """An engine that many tasks share. One event loop uses it, the one that called `start`."""

    tokenizer: Tokenizer
    model: ModelSpec
    chat_template: ChatTemplate | None

    @classmethod
    def from_args(cls, args: EngineArgs, *, in_process: bool = False) -> AsyncEngine:
        raise NotImplementedError

    async def start(self) -> None:
        """Start the engine and wait until the model is loaded.

        Raises what the engine raised: `ModelLoadError`, `KVMemoryError`, `ConfigError`, …
        """
        raise NotImplementedError

    @property
    def description(self) -> Mapping[str, Any]:
        """What the engine says of itself: platform, device, ops. For humans."""
        raise NotImplementedError

    @property
    def num_unfinished(self) -> int:
        """Requests that this front end has open (for draining, `/load`)."""
        raise NotImplementedError

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """The model's generation defaults (generation_config), then `overrides`."""
        raise NotImplementedError

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Tokenise off the event loop; `ContextLengthError` for what can never fit."""
        raise NotImplementedError

    async def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """`ChatTemplate.render` off the event loop."""
        raise NotImplementedError

    async def submit(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        key_id: bytes = b"",
    ) -> AsyncIterator[RequestOutput]:
        """Validate and hand over a request; the stream of its outputs.

        Everything this front end can know is raised here, before the first token: bad values,
        context length, a full queue, a dead engine. What only the engine knows is raised by the
        stream's first `__anext__`. The stream has `request_id`, `prompt_token_ids`, `aclose()`
        (which aborts what is unfinished).
        """
        raise NotImplementedError

    def generate(
        self,
        prompt: PromptInput,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        key_id: bytes = b"",
    ) -> AsyncIterator[RequestOutput]:
        """`submit` and iterate, as an async generator; closing or cancelling it aborts.

        `prompt`: a string (tokenised with special tokens), token ids, or a mapping with `prompt`
        or `prompt_token_ids` (and `add_special_tokens`). With `OutputKind.DELTA` an output holds
        the sequences that changed, with what is new; deltas merge while nobody reads.
        """
        raise NotImplementedError

    async def beam_search(
        self,
        prompt: PromptInput,
        params: BeamSearchParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        key_id: bytes = b"",
    ) -> BeamSearchOutput:
        raise NotImplementedError

    async def abort(self, request_id: str) -> None:
        """End a request; its stream gets a last output with finish_reason "abort"."""
        raise NotImplementedError

    def health(self) -> None:
        """Raises `EngineDeadError` if the engine has ended or is stuck."""
        raise NotImplementedError

    def stats(self) -> EngineStats:
        """The latest statistics the engine sent (it sends them with every step)."""
        raise NotImplementedError

    async def reset_prefix_cache(self) -> bool:
        raise NotImplementedError

    async def restart(self) -> None:
        """After a death: start a new engine process. Open streams have got their error."""
        raise NotImplementedError

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests (`ShuttingDownError`) and wait; True if all finished in time."""
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError
