"""`LLM`: a model for offline work. The engine runs in this process, in the caller's thread."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Self

from .args import DEFAULT_MODEL, EngineArgs, flag_fields
from .engine.inproc import InprocClient
from .engine.intake import Intake, PromptInput
from .engine.messages import AbortRequests, AddRequests, EngineRequest, StepMessage
from .errors import ConfigError, EngineDeadError, InvalidRequestError
from .executor import UniExecutor
from .outputs import OutputProcessor
from .progress import ProgressBar
from .sampling_params import BeamSearchParams, OutputKind, SamplingParams
from .text.templates import ChatTemplate
from .text.tokenizer import Tokenizer
from .types import BeamSearchOutput, RequestOutput

Params = SamplingParams | Sequence[SamplingParams] | None
Message = Mapping[str, Any]
POLL_TIME = 1.0  # seconds; only reached when something else than this thread is waited for
MIN_WINDOW = 64  # requests


class LLM:
    """Load a model once, then `generate`, `chat` or `beam_search`.

    Keyword arguments are the fields of `EngineArgs`. Used as a context manager it frees everything
    on exit. Not for several threads at once: use `AsyncEngine` there. Raises `ModelLoadError`,
    `KVMemoryError`, `ConfigError`, `PlatformError`.
    """

    def __init__(self, model: str = DEFAULT_MODEL, **engine_args: Any) -> None:
        self._open(InprocClient.from_args(_engine_args(model=str(model), **engine_args)))

    @classmethod
    def from_engine_args(cls, args: EngineArgs) -> Self:
        return cls.from_client(InprocClient.from_args(args))

    @classmethod
    def from_client(cls, client: InprocClient, tokenizer: Tokenizer | None = None) -> Self:
        """Around an engine that is there already (`tokenizer`: the model's own)."""
        llm = cls.__new__(cls)
        llm._open(client, tokenizer)
        return llm

    def _open(self, client: InprocClient, tokenizer: Tokenizer | None = None) -> None:
        self._client = client
        try:
            model = client.info.model
            self._tokenizer = tokenizer or Tokenizer.from_path(model.tokenizer_path)
            self._tokenizer.check_vocabulary(model.vocab_size)
            # Here only the caller waits for a template, and may interrupt it.
            self._template = ChatTemplate.from_path(
                self._tokenizer.path, self._tokenizer.special_tokens, isolated=False
            )
        except BaseException:
            client.close()
            raise
        self._intake = Intake(client.info, self._tokenizer, clamp=True)
        self._processor = OutputProcessor(self._tokenizer)
        self._ids = itertools.count()
        self._enqueued: deque[EngineRequest] = deque()
        self._results: dict[str, Any] = {}
        self._failures: dict[str, Exception] = {}
        limits = client.engine.config.scheduler
        # Enough to keep every row busy, and never so much that the scheduler refuses any.
        self._window = min(limits.max_num_queued_reqs, max(MIN_WINDOW, 4 * limits.max_num_seqs))
        self._window_tokens = limits.max_num_queued_tokens

    # ------------------------------------------------------------------------------ generation

    def generate(
        self,
        prompts: PromptInput | Iterable[PromptInput],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """One output a prompt, in order.

        A prompt is a string, a list of token ids, or a mapping with `prompt` or
        `prompt_token_ids`; `prompts` is one of them or any iterable of them. `sampling_params`:
        one for all, one for each, or None for the model's defaults. A sequence that failed has
        finish_reason "error". Raises `InvalidRequestError` for a prompt that cannot be served.
        """
        return list(self.generate_iter(prompts, sampling_params, use_tqdm=use_tqdm))

    def generate_iter(
        self,
        prompts: PromptInput | Iterable[PromptInput],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = False,
    ) -> Iterator[RequestOutput]:
        """As `generate`, one by one: prompts are read as they are needed and only a bounded
        window of them is held, so a million of them stream through. Closing it aborts the rest."""
        batch, total = _as_batch(prompts)
        pairs = self._with_params(batch, total, sampling_params)
        requests = (self._intake.prepare(p, _final(s), self._new_id()) for p, s in pairs)
        return self._stream(requests, total, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """One output a conversation; `messages` is one conversation or several of them."""
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if single else messages
        template = self._template
        if chat_template is not None:
            template = ChatTemplate(chat_template, self._tokenizer.special_tokens)
        if template is None:
            raise InvalidRequestError(
                "the model has no chat template: give chat_template, or use generate.",
                param="messages",
            )
        try:
            prompts = [
                {
                    "prompt": template.render(
                        conversation,
                        tools=tools,
                        add_generation_prompt=add_generation_prompt and not continue_final_message,
                        continue_final_message=continue_final_message,
                        variables=chat_template_kwargs,
                    ),
                    "add_special_tokens": False,  # the template writes them itself
                }
                for conversation in conversations
            ]
        finally:
            if template is not self._template:
                template.close()
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def beam_search(
        self, prompts: PromptInput | Iterable[PromptInput], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The best `beam_width` sequences of each prompt, best first. Raises `StepError` if a
        search fails."""
        limits = SamplingParams(
            max_tokens=params.max_tokens,
            temperature=params.temperature,
            ignore_eos=params.ignore_eos,
        )
        batch, total = _as_batch(prompts)
        requests = (
            self._intake.prepare(prompt, limits, self._new_id(), beam=params) for prompt in batch
        )
        return list(self._stream(requests, total, False))

    def enqueue(
        self, prompts: PromptInput | Iterable[PromptInput], sampling_params: Params = None
    ) -> list[str]:
        """Note requests for `wait_for_completion`; their ids. Raises as `generate` does."""
        batch, total = _as_batch(prompts)
        requests = [
            self._intake.prepare(prompt, _final(params), self._new_id())
            for prompt, params in self._with_params(batch, total, sampling_params)
        ]
        self._enqueued += requests
        return [request.request_id for request in requests]

    def wait_for_completion(self, *, use_tqdm: bool = True) -> list[RequestOutput]:
        """Run everything that was enqueued; outputs in that order."""
        requests, self._enqueued = self._enqueued, deque()
        return list(self._stream(iter(requests), len(requests), use_tqdm))

    # --------------------------------------------------------------------------------- the rest

    def get_tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """The model's own defaults (generation_config.json)."""
        return self._intake.default_sampling_params()

    def get_metrics(self) -> dict[str, int]:
        """Gauges now and counters since the start (the fields of `EngineStats`)."""
        return dataclasses.asdict(self._client.engine.scheduler.stats())

    def reset_prefix_cache(self) -> bool:
        """Forget cached prefixes. Always done (True): running requests keep the blocks they hold,
        and publish nothing more."""
        return self._client.engine.scheduler.reset_prefix_cache()

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]:
        """`function(model)`, one result a rank. Raises `ConfigError` for a model whose ranks are
        other processes: a callable crosses no border."""
        executor = self._client.engine.executor
        if not isinstance(executor, UniExecutor):
            raise ConfigError("apply_model needs the model in this process: one rank only.")
        return [function(executor.model)]

    def close(self) -> None:
        """Free the model, its memory and its processes. May be called again."""
        self._client.close()
        if self._template is not None:
            self._template.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ----------------------------------------------------------------------------------- inside

    def _stream(
        self, requests: Iterator[EngineRequest], total: int | None, use_tqdm: bool
    ) -> Iterator[Any]:
        """Results in order; at most a window of requests is open or waits to be read."""
        order: deque[tuple[str, int]] = deque()  # request id, prompt tokens
        tokens = 0
        upcoming = next(requests, None)
        try:
            with ProgressBar(total, enabled=use_tqdm) as bar:
                while True:
                    while upcoming is not None and self._has_room(order, tokens, upcoming):
                        order.append((upcoming.request_id, len(upcoming.prompt)))
                        tokens += len(upcoming.prompt)
                        self._send(upcoming)
                        upcoming = next(requests, None)
                    if not order:
                        return
                    request_id, length = order[0]
                    if request_id in self._failures:
                        raise self._failures[request_id]
                    if request_id not in self._results:
                        self._advance(bar)
                        continue
                    order.popleft()
                    tokens -= length
                    yield self._results.pop(request_id)
        finally:
            self._drop([request_id for request_id, _ in order])

    def _has_room(self, order: Sized, tokens: int, request: EngineRequest) -> bool:
        """Whether the window takes one more; alone, any request may try."""
        full = len(order) >= self._window or tokens + len(request.prompt) > self._window_tokens
        return not (full and order)

    def _send(self, request: EngineRequest) -> None:
        self._processor.add(request)
        self._client.send(AddRequests([request]))

    def _advance(self, bar: ProgressBar) -> None:
        """One step of the engine."""
        message = self._client.poll(POLL_TIME)
        if not isinstance(message, StepMessage):
            return
        processed = self._processor.process(message)
        for finish in processed.finishes:
            self._client.send(finish)
        for output in processed.outputs:
            self._results[output.request_id] = output
            bar.add(sum(len(sequence.token_ids) for sequence in output.outputs))
        for request_id, beams in processed.beams:
            self._results[request_id] = beams
            bar.add(sum(len(sequence.token_ids) for sequence in beams.sequences))
        self._failures.update(processed.failures)

    def _drop(self, request_ids: list[str]) -> None:
        """Forget requests that nobody will read; their blocks are free when this returns."""
        if not request_ids:
            return
        open_ids = [request_id for request_id in request_ids if self._processor.discard(request_id)]
        for request_id in request_ids:
            self._results.pop(request_id, None)
            self._failures.pop(request_id, None)
        if not open_ids:
            return
        with contextlib.suppress(EngineDeadError):  # then nothing is held any more
            self._client.send(AbortRequests(open_ids))
            while not len(self._processor) and self._client.engine.has_work:
                self._client.poll(0.0)

    def _new_id(self) -> str:
        return str(next(self._ids))

    def _with_params(
        self, batch: Iterable[PromptInput], total: int | None, params: Params
    ) -> Iterator[tuple[PromptInput, SamplingParams]]:
        if params is None:
            params = self.get_default_sampling_params()
        if isinstance(params, SamplingParams):
            return zip(batch, itertools.repeat(params), strict=False)
        if total is not None and len(params) != total:
            raise InvalidRequestError(
                f"there are {total} prompts but {len(params)} sampling_params: give one for all "
                "or one for each.",
                param="sampling_params",
            )
        return zip(batch, params, strict=True)


def _engine_args(**given: Any) -> EngineArgs:
    """Raises `ConfigError` for a name that is no option."""
    names = [field.name for field in flag_fields(EngineArgs)]
    for name in given.keys() - names:
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"There is no option {name}{meant}.", param=name)
    return EngineArgs(**given)


def _as_batch(prompts: Any) -> tuple[Iterable[PromptInput], int | None]:
    """The prompts as an iterable, and how many they are if that is known."""
    if isinstance(prompts, str | Mapping):
        return [prompts], 1
    if not isinstance(prompts, Sequence):
        return prompts, None
    if prompts and isinstance(prompts[0], int):
        return [prompts], 1
    return prompts, len(prompts)


def _final(params: SamplingParams) -> SamplingParams:
    if params.output_kind == OutputKind.FINAL_ONLY:
        return params
    return dataclasses.replace(params, output_kind=OutputKind.FINAL_ONLY)
