"""From the engine's token ids to what users read: text, log-probabilities, finish reasons."""

from __future__ import annotations

from dataclasses import dataclass, field

from .engine.messages import EngineRequest, FinishSequence, StepMessage
from .errors import TrimaranError
from .text.tokenizer import Tokenizer
from .types import BeamSearchOutput, RequestOutput


@dataclass(slots=True)
class Processed:
    """What one step means to the front end: per request what is new, and what to tell the engine."""

    outputs: list[RequestOutput] = field(default_factory=list)
    beams: list[tuple[str, BeamSearchOutput]] = field(default_factory=list)
    failures: list[tuple[str, TrimaranError]] = field(default_factory=list)
    finishes: list[FinishSequence] = field(default_factory=list)


class OutputProcessor:
    """Keeps the text state of every open request."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        raise NotImplementedError

    def add(self, request: EngineRequest, arrival: float | None = None) -> None:
        raise NotImplementedError

    def discard(self, request_id: str) -> bool:
        """Forget a request (its later outputs are ignored); False if it was not open."""
        raise NotImplementedError

    def process(self, message: StepMessage) -> Processed:
        raise NotImplementedError
