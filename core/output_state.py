"""What the front end keeps of one open request: text, tokens and log-probabilities so far."""

from __future__ import annotations

from .engine.messages import EngineRequest, FinishSequence, SequenceOutput
from .sampling_params import BeamSearchParams, OutputKind, SamplingParams
from .text.detokenizer import IncrementalDetokenizer, open_detokenizer
from .text.stop import StopMatcher, StopStrings
from .text.tokenizer import Tokenizer
from .types import (
    CompletionOutput,
    FinishReason,
    Logprob,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
)


class SequenceState:
    """One sequence. `text`, `token_ids` and `logprobs` hold what the next output shows: all so
    far, or with deltas what is new since the last one."""

    __slots__ = (
        "_detokenizer",
        "_matcher",
        "_params",
        "cumulative_logprob",
        "finish_reason",
        "index",
        "logprobs",
        "num_tokens",
        "num_unsent",
        "pieces",
        "stop_reason",
        "token_ids",
    )

    def __init__(
        self,
        index: int,
        params: SamplingParams,
        detokenizer: IncrementalDetokenizer | None,
        matcher: StopMatcher | None,
    ) -> None:
        self.index = index
        self._params = params
        self._detokenizer = detokenizer
        self._matcher = matcher
        self.num_tokens = 0
        self.num_unsent = 0
        self.pieces: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[PositionLogprobs] = []
        self.cumulative_logprob = 0.0
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def absorb(self, output: SequenceOutput) -> FinishSequence | None:
        """Take in one step's tokens; returns the cut if a stop string was found in them."""
        stop = output.finish_reason is FinishReason.STOP
        for position, token in enumerate(output.token_ids):
            # The engine itself stops only at tokens; that last token is no part of the text.
            is_stop_token = stop and position == len(output.token_ids) - 1
            shown = not is_stop_token or self._params.include_stop_str_in_output
            self._append(token, output.logprobs[position] if output.logprobs else None)
            if shown and self._detokenizer is not None:
                self._show(self._detokenizer.push(token))
            if self._matched():
                return FinishSequence(output.request_id, self.index, self.num_tokens)
        if output.finish_reason is not None:
            self._finish(output)
        return None

    def take(self, kind: OutputKind, decode: Tokenizer | None) -> CompletionOutput:
        """The next output's view of this sequence; with deltas, what it shows is then gone."""
        wanted = self._params.logprobs is not None
        result = CompletionOutput(
            index=self.index,
            text="".join(self.pieces),
            token_ids=self.token_ids,
            cumulative_logprob=self.cumulative_logprob if wanted else None,
            logprobs=[decode_logprobs(at, decode) for at in self.logprobs] if wanted else None,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )
        self.num_unsent = 0
        if kind == OutputKind.DELTA:
            self.pieces, self.token_ids, self.logprobs = [], [], []
        else:
            self.pieces, self.token_ids = [result.text], list(self.token_ids)
        return result

    def _append(self, token: int, logprobs: PositionLogprobs | None) -> None:
        self.num_tokens += 1
        self.num_unsent += 1
        self.token_ids.append(token)
        if logprobs is not None:
            self.logprobs.append(logprobs)
            self.cumulative_logprob += logprobs.logprobs[0]

    def _show(self, text: str) -> None:
        if self._matcher is not None:
            text = self._matcher.feed(text, armed=self.num_tokens > self._params.min_tokens)
        if text:
            self.pieces.append(text)

    def _matched(self) -> bool:
        if self._matcher is None or self._matcher.matched is None:
            return False
        self.finish_reason = str(FinishReason.STOP)
        self.stop_reason = self._matcher.matched
        return True

    def _finish(self, output: SequenceOutput) -> None:
        if self._detokenizer is not None:
            self._show(self._detokenizer.flush())
        if self._matched():
            return
        if self._matcher is not None:
            self.pieces.append(self._matcher.flush())
        self.finish_reason = str(output.finish_reason)
        # An error has no stop token; its message stands where users look for the reason.
        self.stop_reason = output.error if output.error is not None else output.stop_reason


class RequestState:
    """One request and its n sequences."""

    __slots__ = (
        "_changed",
        "_kind",
        "_num_open",
        "_params",
        "_prompt_sent",
        "_request",
        "_sequences",
        "_tokenizer",
        "metrics",
        "num_cached",
        "prompt_logprobs",
    )

    def __init__(self, request: EngineRequest, tokenizer: Tokenizer | None, arrival: float) -> None:
        self._request = request
        self._params = params = request.params
        self._kind = params.output_kind
        self._tokenizer = tokenizer
        self._changed: dict[int, SequenceState] = {}
        self._prompt_sent = False
        self._num_open = params.n
        self.metrics = RequestMetrics(arrival=arrival)
        self.num_cached = 0
        self.prompt_logprobs: list[PositionLogprobs] = []
        stops = StopStrings(params.stop) if params.stop else None
        self._sequences = [
            SequenceState(
                index,
                params,
                self._open_detokenizer(),
                StopMatcher(stops, params.include_stop_str_in_output) if stops else None,
            )
            for index in range(params.n)
        ]

    @property
    def finished(self) -> bool:
        return self._num_open == 0

    @property
    def beam(self) -> BeamSearchParams | None:
        """Of a beam search: then its result comes as one `BeamOutput`, and nothing before it."""
        return self._request.beam

    def absorb(self, output: SequenceOutput, now: float) -> FinishSequence | None:
        sequence = self._sequences[output.index]
        if sequence.finish_reason is not None:
            return None  # said before the engine heard of the cut
        if output.prompt_logprobs:
            self.prompt_logprobs += output.prompt_logprobs
        self.num_cached = max(self.num_cached, output.num_cached)
        self.metrics.num_preemptions = max(self.metrics.num_preemptions, output.num_preemptions)
        self.metrics.first_scheduled = self.metrics.first_scheduled or output.first_scheduled
        if output.token_ids:
            self.metrics.first_token = self.metrics.first_token or now
            self.metrics.last_token = now
        finish = sequence.absorb(output)
        if sequence.finish_reason is not None:
            self._num_open -= 1
            self._changed[output.index] = sequence
        elif output.token_ids:
            self._changed[output.index] = sequence
        return finish

    def due(self) -> bool:
        """Whether an output is to be sent now."""
        if self.finished:
            return True
        if self._kind == OutputKind.FINAL_ONLY:
            return False
        return any(map(self._is_due, self._changed.values()))

    def emit(self) -> RequestOutput:
        delta = self._kind == OutputKind.DELTA
        chosen = self._sequences
        if delta and len(chosen) > 1:
            chosen = [sequence for _, sequence in sorted(self._changed.items())]
        prompt_logprobs = None
        if self._params.prompt_logprobs is not None and not (delta and self._prompt_sent):
            tail = [decode_logprobs(at, self._tokenizer) for at in self.prompt_logprobs]
            prompt_logprobs = [None, *tail]
            self._prompt_sent = True
        outputs = [sequence.take(self._kind, self._tokenizer) for sequence in chosen]
        self._changed.clear()
        return RequestOutput(
            request_id=self._request.request_id,
            prompt=self._request.prompt.text,
            prompt_token_ids=self._request.prompt.token_ids,
            outputs=outputs,
            finished=self.finished,
            prompt_logprobs=prompt_logprobs,
            num_cached_tokens=self.num_cached,
            metrics=self.metrics,
        )

    def _is_due(self, sequence: SequenceState) -> bool:
        """At the first token, at every interval, and at the end."""
        return (
            sequence.finish_reason is not None
            or sequence.num_unsent == sequence.num_tokens
            or sequence.num_unsent >= self._params.stream_interval
        )

    def _open_detokenizer(self) -> IncrementalDetokenizer | None:
        if self._tokenizer is None or not self._params.detokenize:
            return None
        return open_detokenizer(
            self._tokenizer,
            self._request.prompt.token_ids,
            skip_special_tokens=self._params.skip_special_tokens,
            spaces_between_special_tokens=self._params.spaces_between_special_tokens,
        )


def decode_logprobs(at: PositionLogprobs, tokenizer: Tokenizer | None) -> dict[int, Logprob]:
    """The user-facing map of one position: the token that stands there first, then the top ones."""
    entries: dict[int, Logprob] = {}
    for token, logprob, rank in zip(at.token_ids, at.logprobs, at.ranks, strict=True):
        if token not in entries:
            text = tokenizer.token_text(token) if tokenizer else None
            entries[token] = Logprob(logprob, rank, text)
    return entries
