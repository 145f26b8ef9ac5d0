"""A mixture of experts in place of a layer's one MLP."""

from __future__ import annotations

from torch import Tensor

from ..ops import WeightUse
from ..quantization.scheme import PLAIN, WeightScheme
from .layers import BuildContext, ColumnLinear, Part, RowLinear
from .weights import Layer


class SparseMLP(Layer):
    """The router's scores, and then the op `moe`, which reads the experts' projections as two
    stacked weights. Ranks split each expert by its width, as they split an MLP; the router is
    small and decides by little, so that every rank has all of it, and it is never quantized."""

    def __init__(self, context: BuildContext, layer: int) -> None:
        spec, comm, names = context.spec, context.comm, context.spec.names
        experts, hidden = spec.experts, spec.hidden_size
        assert experts is not None, "the family that names this layer gives its experts"
        self._comm = comm
        self._top_k, self._renormalize = experts.top_k, experts.renormalize
        width = experts.width // comm.size
        sizes = {"hidden": hidden, "width": width, "experts": experts.count}
        use = WeightUse("moe", {**sizes, "top_k": experts.top_k})
        columns, rows = _schemes(context, hidden, width)
        router = Part(names.of("router", layer), experts.count, 0, experts.count)
        self.router = ColumnLinear(context, hidden, [router], bias=False, scheme=PLAIN)
        parts = [
            Part.of_rank(names.of(name, layer, expert), experts.width, comm)
            for expert in range(experts.count)
            for name in ("expert_gate", "expert_up")
        ]
        self.gate_up = ColumnLinear(context, hidden, parts, bias=False, use=use, scheme=columns)
        downs = [names.of("expert_down", layer, expert) for expert in range(experts.count)]
        self.down = RowLinear(
            context, downs, experts.width, hidden, bias=False, use=use, scheme=rows
        )
        format = context.binder.weight_format(columns, context.dtype, use)
        self._moe = context.bind(use.op, format, **use.sizes)
        self.children = (self.router, self.gate_up, self.down)

    def __call__(self, hidden: Tensor) -> Tensor:
        scores = self.router(hidden)
        weights = self.gate_up.packed, self.down.packed
        mixed = self._moe(hidden, scores, *weights, self._top_k, self._renormalize)
        return self._comm.all_reduce(mixed)


def _schemes(context: BuildContext, hidden: int, width: int) -> tuple[WeightScheme, WeightScheme]:
    """Of gate_up and down. One op reads both in one format: where one of them cannot be in 4 bits,
    both are as that one."""
    columns, rows = context.binder.scheme(hidden), context.binder.scheme(width)
    if columns.format == rows.format:
        return columns, rows
    finer = rows if columns.group else columns
    return finer, finer
