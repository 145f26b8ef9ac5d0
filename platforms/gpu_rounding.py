"""Linear layers by 8-bit weights round their input to 8 bits as well: in a step graph the op before
them rounds at once, in the launch that it is, and what it made is never written in more bits."""

from __future__ import annotations

import dataclasses
import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels_cuda.portable import activation, norm
from ..kernels_cuda.portable.tuning import Table
from .gpu_triton import TritonOp
from .gpu_weights import QuantizedLinear
from .interface import Output, StepGraph, StepNode, Value
from .step_graph import uses_of

Outputs = tuple[Tensor, ...]
"""Codes, what else the op makes, and the scales of the codes, fp32 `[tokens]`."""


def _norm(dtype: torch.dtype, table: Table, x: Tensor, weight: Tensor, eps: float) -> Outputs:
    codes, scales, _ = norm.rms_norm_quantized(x, weight, eps, table, dtype=dtype)
    return codes, scales


def _add_norm(
    dtype: torch.dtype, table: Table, x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> Outputs:
    codes, scales, total = norm.rms_norm_quantized(
        x, weight, eps, table, dtype=dtype, residual=residual
    )
    assert total is not None
    return codes, total, scales


def _gated(kind: str) -> Callable[..., Outputs]:
    def call(dtype: torch.dtype, table: Table, gate_up: Tensor) -> Outputs:
        return activation.gated_quantized(gate_up, kind, table, dtype=dtype)

    return call


MAKERS: dict[str, Callable[..., Outputs]] = {
    "rms_norm": _norm,
    "add_rms_norm": _add_norm,
    "silu_mul": _gated("silu"),
    "gelu_mul": _gated("gelu"),
    "gelu_tanh_mul": _gated("gelu_tanh"),
}
"""Ops whose kernel can round its first output."""


def rounded_at_once(graph: StepGraph, nodes: Sequence[StepNode | None]) -> list[StepNode | None]:
    """`nodes` stand for the graph's; values keep their numbers. An output is rounded where linear
    layers alone read it, all of them by codes of one type."""
    found = list(nodes)
    uses = uses_of(graph)
    for value, readers in _readers(nodes).items():
        maker = nodes[value.node]
        dtypes = {code_dtype(node) for node in readers.values()}
        if maker is None or len(dtypes) != 1 or uses[value] != len(readers):
            continue
        impl = inspect.unwrap(maker.call)
        (dtype,) = dtypes
        if value.position or dtype is None or not _rounds(impl):
            continue
        scales = Value(value.node, len(maker.outputs))
        found[value.node] = _rounding(maker, impl, dtype)
        for index, node in readers.items():
            found[index] = _by_codes(node, scales)
    return found


def _readers(nodes: Sequence[StepNode | None]) -> dict[Value, dict[int, StepNode]]:
    """By the value that they multiply, the linear layers with their numbers."""
    found: defaultdict[Value, dict[int, StepNode]] = defaultdict(dict)
    for index, node in enumerate(nodes):
        if node is not None and node.op == "linear" and isinstance(node.arguments[0], Value):
            found[node.arguments[0]][index] = node
    return found


def code_dtype(linear: StepNode) -> torch.dtype | None:
    """What the layer rounds its input to; None: it does not."""
    impl = inspect.unwrap(linear.call)
    return impl.code_dtype(linear.arguments[1]) if isinstance(impl, QuantizedLinear) else None


def _rounds(impl: Any) -> bool:
    return isinstance(impl, TritonOp) and impl.op in MAKERS


def _rounding(maker: StepNode, impl: TritonOp, dtype: torch.dtype) -> StepNode:
    make, table = MAKERS[impl.op], impl.table
    first, *rest = maker.outputs
    outputs = (Output(first.shape, dtype), *rest, Output(first.shape[:1], torch.float32))
    return dataclasses.replace(maker, call=lambda *args: make(dtype, table, *args), outputs=outputs)


def _by_codes(linear: StepNode, scales: Value) -> StepNode:
    impl: QuantizedLinear = inspect.unwrap(linear.call)
    codes, weight, bias = linear.arguments
    dtype = linear.outputs[0].dtype
    return dataclasses.replace(
        linear,
        call=lambda codes, scales: impl.multiply(codes, scales, weight, bias, dtype),
        arguments=(codes, scales),
    )
