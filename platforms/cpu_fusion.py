"""Neighbouring ops of a step graph that one native kernel computes together."""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter
from collections.abc import Sequence
from typing import Any

from ..kernels_cpu.library import Call
from .cpu_native import NativeOp, Operand
from .cpu_ops import NativeRmsNorm, NativeRope
from .interface import Output, StepGraph, StepNode, Value
from .step_graph import uses_of


class NativeQkNormRope(NativeOp):
    """The norms of query and key heads and the rotary embedding: `rope(rms_norm(query, …),
    rms_norm(key, …), positions, cos_sin)`, called with what these take."""

    op, kernel = "rms_norm+rope", "qk_norm_rope"
    tensors = (0, 1, 2)

    def outputs(self, args: Sequence[Any]) -> Sequence[Output]:
        return [Output(tuple(x.shape), x.dtype) for x in args[:2]]

    def fill(self, call: Call, out: Sequence[Operand], args: Sequence[Any]) -> None:
        NativeRope().fill(call, out, args[:4])
        query_weight, query_eps, key_weight, key_eps = args[4:]
        call.input[4:6] = query_weight.data_ptr(), key_weight.data_ptr()
        call.f[0:2] = query_eps, key_eps


def fused(graph: StepGraph) -> list[StepNode | None]:
    """The graph's nodes, those that a kernel takes over from its neighbours left out (None), so
    that the values of the others keep their numbers."""
    nodes: list[StepNode | None] = list(graph.nodes)
    uses = uses_of(graph)
    for index, node in enumerate(graph.nodes):
        if not isinstance(inspect.unwrap(node.call), NativeRope):
            continue
        query_norm, key_norm = (_norm_before(graph, one, uses) for one in node.arguments[:2])
        if query_norm is None or key_norm is None:
            continue
        query, *of_query = graph.nodes[query_norm].arguments
        key, *of_key = graph.nodes[key_norm].arguments
        arguments = (query, key, *node.arguments[2:], *of_query, *of_key)
        nodes[index] = dataclasses.replace(node, call=NativeQkNormRope(), arguments=arguments)
        nodes[query_norm] = nodes[key_norm] = None
    return nodes


def _norm_before(graph: StepGraph, argument: Any, uses: Counter[Value]) -> int | None:
    """The number of the norm that makes `argument` for this use alone."""
    if not isinstance(argument, Value) or uses[argument] != 1:
        return None
    call = inspect.unwrap(graph.nodes[argument.node].call)
    return argument.node if isinstance(call, NativeRmsNorm) else None
