"""From the engine's token ids to what users read: text, log-probabilities, finish reasons."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

from .engine.faults import revive
from .engine.messages import BeamOutput, EngineRequest, FinishSequence, SequenceOutput, StepMessage
from .errors import StepError, TrimaranError
from .output_state import RequestState
from .text.tokenizer import Tokenizer
from .types import BeamSearchOutput, BeamSequence, FinishReason, RequestOutput

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Processed:
    """What one step means to the front end.

    `outputs`: what is new, at most one entry a request; `failures`: requests that ended without a
    result; `finishes`: stop strings found, for the engine to hear of.
    """

    outputs: list[RequestOutput] = field(default_factory=list)
    beams: list[tuple[str, BeamSearchOutput]] = field(default_factory=list)
    failures: list[tuple[str, TrimaranError]] = field(default_factory=list)
    finishes: list[FinishSequence] = field(default_factory=list)


class OutputProcessor:
    """Keeps the text state of every open request.

    `add` and `discard` may be called from another thread than `process`: each is one operation on
    a dictionary. Outputs of requests that are not open (discarded, or cut at a stop string) are
    ignored: the engine may say more before it hears of it.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._states: dict[str, RequestState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def add(self, request: EngineRequest, arrival: float | None = None) -> None:
        """`arrival` in `time.monotonic()` seconds. Raises `KeyError` if the id is open."""
        if request.request_id in self._states:
            raise KeyError(request.request_id)
        moment = time.monotonic() if arrival is None else arrival
        self._states[request.request_id] = RequestState(request, self._tokenizer, moment)

    def discard(self, request_id: str) -> bool:
        """Forget a request; False if it was not open."""
        return self._states.pop(request_id, None) is not None

    def process(self, message: StepMessage) -> Processed:
        """One pass over one step's message. A failure in one request is that request's own."""
        processed = Processed()
        now = time.monotonic()
        changed: dict[str, RequestState] = {}
        for output in message.outputs:
            state = self._states.get(output.request_id)
            if state is None:
                continue
            if state.beam is not None:
                self._end_search(output, processed)
                continue
            try:
                finish = state.absorb(output, now)
            except Exception as error:
                logger.exception("request %r: its output cannot be processed", output.request_id)
                self.discard(output.request_id)
                text = f"its output cannot be processed: {type(error).__name__}: {error}"
                processed.failures.append((output.request_id, StepError(text)))
                continue
            if finish is not None:
                processed.finishes.append(finish)
            changed[output.request_id] = state
        for request_id, state in changed.items():
            if request_id in self._states and state.due():
                processed.outputs.append(state.emit())
                if state.finished:
                    self.discard(request_id)
        self._add_beams(message.beams, processed)
        for refused in message.rejected:
            if self.discard(refused.request_id):
                reason = revive(refused.kind, refused.message, refused.param, refused.retry_after)
                processed.failures.append((refused.request_id, reason))
        return processed

    def _end_search(self, output: SequenceOutput, processed: Processed) -> None:
        """A search says nothing of its own sequences unless it ends without a result."""
        if output.finish_reason is None:
            return
        self.discard(output.request_id)
        reason = output.error or f"the beam search ended early: {output.finish_reason}"
        processed.failures.append((output.request_id, StepError(reason)))

    def _add_beams(self, beams: list[BeamOutput], processed: Processed) -> None:
        for beam in beams:
            state = self._states.pop(beam.request_id, None)
            if state is not None and state.beam is not None:
                result = self._decode_beams(beam, state.beam.include_stop_str_in_output)
                processed.beams.append((beam.request_id, result))

    def _decode_beams(self, beam: BeamOutput, keep_stop: bool) -> BeamSearchOutput:
        columns = zip(
            beam.token_ids,
            beam.cumulative_logprobs,
            beam.scores,
            beam.finish_reasons,
            strict=True,
        )
        return BeamSearchOutput(
            [
                BeamSequence(
                    token_ids,
                    self._beam_text(token_ids, keep_stop or reason is not FinishReason.STOP),
                    cumulative_logprob,
                    score,
                    str(reason),
                )
                for token_ids, cumulative_logprob, score, reason in columns
            ]
        )

    def _beam_text(self, token_ids: list[int], whole: bool) -> str:
        """The engine ends a beam only at a stop token, which stands last."""
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(token_ids if whole else token_ids[:-1])
