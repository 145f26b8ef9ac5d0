"""Beam search as a client of fork. The bookkeeping is that of `transformers`'
`generate(num_beams=…, early_stopping=False)`, so that both find the same sequences."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import nlargest
from typing import NamedTuple

from .engine.messages import BeamOutput
from .request import Request
from .sampling_params import BeamSearchParams
from .sequences import Sequences
from .types import FinishReason, PositionLogprobs

WAITS_FOR_BEAMS = "beam"


class _Candidate(NamedTuple):
    """A beam and a token that could follow it; `score` is the cumulative log-probability."""

    score: float
    beam: int
    token: int


@dataclass(frozen=True, slots=True)
class _Hypothesis:
    """A finished sequence. `score` is its cumulative log-probability over length ** penalty."""

    score: float
    cumulative: float
    tokens: list[int]
    reason: FinishReason


class BeamSearch:
    """The controller of one beam search, over `beam_width` sequences.

    Each round every beam computes its tokens, reports the most probable next ones and blocks.
    When all have reported, the best continuations become the new beams. A beam that lost its
    blocks meanwhile is computed again; its report stands.
    """

    def __init__(self, sequences: Sequences, children: list[Request]) -> None:
        params = children[0].origin.beam
        assert params is not None
        self._params: BeamSearchParams = params
        self._sequences = sequences
        self._children = children[:]
        self._beams = children[:1]  # best first
        self._scores = [0.0]
        self._reports: dict[Request, PositionLogprobs] = {}
        self._hypotheses: list[_Hypothesis] = []  # at most beam_width, best first
        for child in children:
            child.controller = self
        for child in children[1:]:
            sequences.block(child, WAITS_FOR_BEAMS)

    def computed(self, request: Request, num_computed: int) -> None:
        """Nothing to do: the report of the same step says more."""

    def reported(self, request: Request, logprobs: list[PositionLogprobs]) -> BeamOutput | None:
        """A beam's most probable next tokens. Returns the result if that ends the search."""
        self._reports[request] = logprobs[-1]
        self._sequences.block(request, WAITS_FOR_BEAMS)
        if len(self._reports) < len(self._beams):
            return None
        return self._advance()

    def ended(self, request: Request) -> None:
        """A beam was aborted or failed: without it the search makes no sense."""
        others, self._children = self._children, []
        for child in others:
            if not child.finished:
                self._sequences.end(child, request.finish_reason or FinishReason.ABORT)

    def _advance(self) -> BeamOutput | None:
        candidates = self._candidates()
        length = len(self._beams[0].tokens) + 1
        reasons = [self._finish_reason(candidate.token, length) for candidate in candidates]
        self._keep_finished(candidates, reasons)
        running = [c for c, reason in zip(candidates, reasons, strict=True) if reason is None]
        running = running[: self._params.beam_width]
        if not running or not self._can_improve(running[0].score, length):
            return self._finish()
        self._continue_with(running)
        return None

    def _candidates(self) -> list[_Candidate]:
        """The best continuations over all beams, as many as one beam reports, best first."""
        found = []
        for beam, (request, score) in enumerate(zip(self._beams, self._scores, strict=True)):
            report = self._reports[request]
            seen = dict(zip(report.token_ids, report.logprobs, strict=True))
            found += [
                _Candidate(score + logprob, beam, token)
                for token, logprob in seen.items()
                if token >= 0
            ]
        # Of equal scores the first in (beam, token) order wins, as in a top-k of the flat scores.
        found.sort(key=lambda candidate: (-candidate.score, candidate.beam, candidate.token))
        return found[: self._beams[0].sampling.logprobs]

    def _finish_reason(self, token: int, length: int) -> FinishReason | None:
        if token in self._children[0].stop_ids:
            return FinishReason.STOP
        return FinishReason.LENGTH if length >= self._children[0].max_total else None

    def _keep_finished(
        self, candidates: list[_Candidate], reasons: list[FinishReason | None]
    ) -> None:
        """Only a candidate among the best `beam_width` may end there; the others are there to
        have enough beams to go on with."""
        width = self._params.beam_width
        for candidate, reason in zip(candidates[:width], reasons[:width], strict=True):
            if reason is not None:
                parent = self._beams[candidate.beam]
                tokens = [*parent.tokens[parent.num_prompt :], candidate.token]
                score = candidate.score / len(tokens) ** self._params.length_penalty
                self._hypotheses.append(_Hypothesis(score, candidate.score, tokens, reason))
        # Stable: of equal scores the earlier stays.
        self._hypotheses = nlargest(width, self._hypotheses, key=lambda found: found.score)

    def _can_improve(self, best_running: float, length: int) -> bool:
        if len(self._hypotheses) < self._params.beam_width:
            return True
        num_generated = length - self._children[0].num_prompt
        best_possible: float = best_running / num_generated**self._params.length_penalty
        return best_possible > self._hypotheses[-1].score

    def _continue_with(self, winners: list[_Candidate]) -> None:
        """Each parent goes on as its first continuation; the others are forked from it into the
        sequences of beams that lost."""
        parents = [self._beams[winner.beam] for winner in winners]
        taken = set(parents)
        spare = [child for child in self._children if child not in taken]
        beams: list[Request] = []
        for parent in parents:
            if parent in beams:
                child = spare.pop()
                self._copy(parent, child)
                beams.append(child)
            else:
                beams.append(parent)
        # Tokens are appended only now: until here the parents are what was computed.
        for child, winner in zip(beams, winners, strict=True):
            child.tokens.append(winner.token)
            self._sequences.wake(child)
        for loser in spare:
            self._sequences.drop_blocks(loser)
        self._beams = beams
        self._scores = [winner.score for winner in winners]
        self._reports = {}

    def _copy(self, parent: Request, child: Request) -> None:
        self._sequences.drop_blocks(child)
        child.tokens[:] = parent.tokens
        child.kv.chains.clear()
        child.num_cached = parent.num_cached
        self._sequences.fork(parent, child, parent.num_computed)

    def _finish(self) -> BeamOutput:
        found = self._hypotheses
        children, self._children = self._children, []
        self._sequences.num_tokens_generated += sum(len(hypothesis.tokens) for hypothesis in found)
        for child in children:
            self._sequences.end(child, FinishReason.STOP)
        return BeamOutput(
            children[0].request_id,
            [hypothesis.tokens for hypothesis in found],
            [hypothesis.cumulative for hypothesis in found],
            [hypothesis.score for hypothesis in found],
            [hypothesis.reason for hypothesis in found],
        )


def admit_beams(sequences: Sequences, children: list[Request]) -> bool:
    """The feature's door: takes beam searches."""
    if children[0].origin.beam is None:
        return False
    BeamSearch(sequences, children)
    return True
