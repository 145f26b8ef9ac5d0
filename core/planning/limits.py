"""The limit of speed: bytes over bandwidth, or operations over the processor's rate.

t_decode >= max((W + sum of contexts * KV bytes) / BW, 2 P B / F)
t_prefill >= max((2 P_body n + attention) / F, W / BW)

W: bytes of weights that a step reads; P: parameters that a token uses, the head's included. The
gaps between launches, and collectives between ranks, are not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...platforms.interface import Roofline
from ..sizing import GroupSize
from .model import ModelFacts, Parameters

PREFILL_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Load:
    """What one rank reads and computes. `read_bytes`: weights of a step that uses every expert;
    `expert_bytes`: the routed experts' part of it. `cache`: as the platform lays out keys and
    values, the scales of quantized ones included where the platform answers."""

    facts: ModelFacts
    parameters: Parameters
    read_bytes: float
    expert_bytes: float
    cache: Sequence[GroupSize]
    ranks: int

    def weights_read(self, tokens: int) -> float:
        """Bytes of weights that a step of `tokens` reads."""
        idle = 1 - self.parameters.touched(tokens) if self.expert_bytes else 0.0
        return self.read_bytes - self.expert_bytes * idle

    def kv_read(self, context: int) -> float:
        """Bytes of the cache that one token's attention reads."""
        return sum(
            one.block_bytes / one.block_size * min(context, one.group.sliding_window or context)
            for one in self.cache
        )

    def decode_seconds(self, batch: int, context: int, line: Roofline, flops: float) -> float:
        """One step of `batch` sequences with `context` tokens each."""
        reading = (self.weights_read(batch) + batch * self.kv_read(context)) / line.bandwidth
        used = self.parameters.active_body + self.parameters.head
        return max(reading, 2 * used * batch / self.ranks / flops)

    def prefill_seconds(self, tokens: int, line: Roofline, flops: float) -> float:
        attention = sum(one.prefill_flops(tokens) for one in self.facts.attention)
        work = 2 * self.parameters.active_body * tokens + attention
        return max(work / self.ranks / flops, self.weights_read(tokens) / line.bandwidth)
