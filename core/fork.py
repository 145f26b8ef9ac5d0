"""Several samples of one prompt: it is computed once, then forked."""

from __future__ import annotations

from .engine.messages import BeamOutput
from .request import Request
from .sequences import Sequences
from .types import PositionLogprobs

WAITS_FOR_PROMPT = "fork"


class ForkGroup:
    """The leader computes the prompt; the other children are blocked until it has.

    A child then starts from all but the last prompt token, which it computes in a block of its
    own, so that it gets logits to draw from. If the leader ends too early, another child leads.
    """

    def __init__(self, sequences: Sequences, children: list[Request]) -> None:
        self._sequences = sequences
        self._leader = children[0]
        self._blocked = children[1:]
        for child in children:
            child.controller = self
        for child in self._blocked:
            sequences.block(child, WAITS_FOR_PROMPT)

    def computed(self, request: Request, num_computed: int) -> None:
        if request is not self._leader or num_computed < request.num_prompt:
            return
        for child in self._blocked:
            child.num_cached = request.num_cached
            self._sequences.fork(request, child, request.num_prompt - 1)
            self._sequences.wake(child)
            child.controller = None
        self._blocked = []
        request.controller = None

    def reported(self, request: Request, logprobs: list[PositionLogprobs]) -> BeamOutput | None:
        raise RuntimeError("a sampled sequence yields tokens")

    def ended(self, request: Request) -> None:
        if request in self._blocked:
            self._blocked.remove(request)
        elif request is self._leader and self._blocked:
            self._leader = self._blocked.pop(0)
            self._sequences.wake(self._leader)


def admit_fork(sequences: Sequences, children: list[Request]) -> bool:
    """The feature's door: takes requests for several samples."""
    if len(children) == 1 or children[0].origin.beam is not None:
        return False
    ForkGroup(sequences, children)
    return True
