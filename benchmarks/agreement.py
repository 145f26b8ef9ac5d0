"""Do the peers compute the same model? No figure counts unless they do.

Every peer scores the same random prompts: the most probable next token with its log-probability,
and the log-probability of each prompt token after those before it. The root mean square of the
differences between two peers' prompt log-probabilities is the gate: the logits of these random
weights spread by 0.64 (0.02 · √1024), so that two unrelated models differ by about 0.9, and nothing
that computes another model stays below the bounds. The next token itself is reported; its nearest
rivals among 150,000 are closer than any rounding of the weights.

A peer is held against our own peer of the same width where one runs, else against our widest.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

from fleet import Fleet, Peer, PeerSpec

NUM_PROMPTS, PROMPT_TOKENS = 8, 64


@dataclass(frozen=True)
class Bound:
    """The most that two peers may differ: `rms` over the prompts' log-probabilities, `next_token`
    in the log-probability of the most probable next token."""

    rms: float
    next_token: float


# By the bits of the narrower one's weights.
BOUNDS = {16: Bound(0.05, 0.1), 8: Bound(0.1, 0.15), 4: Bound(0.45, 0.6)}


def agreement(fleet: Fleet, vocab: int) -> dict[str, Any]:
    """The comparison by peer's name; peers that disagree are marked as failed in the fleet.

    Raises SystemExit when one of ours disagrees with our widest, or cannot be asked.
    """
    rng = random.Random(9)
    prompts = [[rng.randrange(10, vocab) for _ in range(PROMPT_TOKENS)] for _ in range(NUM_PROMPTS)]
    scores: dict[str, list[dict[str, Any]]] = {}
    for peer in fleet.peers:
        if answer := fleet.turn(peer, lambda peer: peer.ask("score", prompts=prompts)):
            scores[peer.name] = answer
        elif peer.spec.is_ours:
            raise SystemExit(fleet.failed[peer.name])
    ours = [peer.spec for peer in fleet.peers if peer.spec.is_ours]
    report = {}
    for peer in fleet.alive():
        against = reference(peer.spec, ours)
        found = compare(scores[peer.name], scores[against.name]) | {"against": against.name}
        report[peer.name] = found
        if reason := disagreement(found, BOUNDS[min(peer.spec.bits, against.bits)]):
            refuse(fleet, peer, f"{peer.name} disagrees with {against.name}: {reason}")
    return report


def reference(spec: PeerSpec, ours: list[PeerSpec]) -> PeerSpec:
    """Ours of the same width (our own are held against our widest)."""
    widest = max(ours, key=lambda other: other.bits)
    same = [other for other in ours if other.bits == spec.bits and not spec.is_ours]
    return same[0] if same else widest


def compare(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> dict[str, Any]:
    pairs = list(zip(theirs, ours, strict=True))
    squares = [
        (a - b) ** 2
        for one, other in pairs
        for a, b in zip(one["prompt_logprobs"], other["prompt_logprobs"], strict=True)
    ]
    same = sum(a["token"] == b["token"] for a, b in pairs)
    return {
        "rms": round(math.sqrt(sum(squares) / len(squares)), 5),
        "max_logprob_gap": round(max(abs(a["logprob"] - b["logprob"]) for a, b in pairs), 4),
        "same_token": f"{same}/{len(pairs)}",
    }


def disagreement(found: dict[str, Any], bound: Bound) -> str:
    """Which bound was broken, in words; empty when none was."""
    if not found["rms"] <= bound.rms:
        return f"{found['rms']} RMS over the prompts' log-probabilities, {bound.rms} allowed."
    if not found["max_logprob_gap"] <= bound.next_token:
        gap = found["max_logprob_gap"]
        return f"{gap} in the next token's log-probability, {bound.next_token} allowed."
    return ""


def refuse(fleet: Fleet, peer: Peer, reason: str) -> None:
    if peer.spec.is_ours:
        raise SystemExit(reason)
    fleet.failed[peer.name] = reason
    peer.close()
