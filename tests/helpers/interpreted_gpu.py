"""A GPU's kernels in Triton's interpreter: what the GPU hulls offer, on the reference device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trimaran.platforms.cuda import CudaPlatform
from trimaran.platforms.gpu_cards import Survey
from trimaran.platforms.interface import (
    AttentionImpl,
    AttentionSpec,
    KVConstraints,
    OpImpl,
    WeightPacker,
)
from trimaran.platforms.strict import StrictPlatform


class NoCard(CudaPlatform):
    """The hull on a machine without cards: its kernels take the table of any GPU."""

    @classmethod
    def survey(cls) -> Survey:
        return Survey(())


class InterpretedGpu(StrictPlatform):
    """Ops, attention and packers of the hull; memory and the queue are those of `strict`, so that
    nothing may be read before it is there."""

    hull = NoCard()

    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        return self.hull.ops()

    def attention(self, spec: AttentionSpec) -> Sequence[AttentionImpl]:
        return self.hull.attention(spec)

    def weight_packers(self) -> Mapping[str, WeightPacker]:
        return self.hull.weight_packers()

    def kv_constraints(self, spec: AttentionSpec) -> KVConstraints:
        return self.hull.kv_constraints(spec)
