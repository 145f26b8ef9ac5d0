"""Neighbouring ops of a step graph that one GPU kernel computes together: the norms of query and
key heads, the rotary embedding and the write to the cache; what rounds the input of a linear layer
with the op before it (`gpu_rounding`)."""

from __future__ import annotations

import dataclasses
import inspect
from collections import Counter
from typing import Any, NamedTuple

from torch import Tensor

from ..kernels_cuda.portable import cache
from .gpu_attention import TritonAttention
from .gpu_rounding import rounded_at_once
from .gpu_triton import TritonOp
from .interface import LayerKV, StepGraph, StepNode, Value, View
from .step_graph import uses_of


class RopeWrite:
    """`rope(rms_norm(query), rms_norm(key))` and `kv_write` of the key and the value; the norms may
    be left out. Returns the query."""

    def __init__(self, impl: TritonAttention, normed: bool) -> None:
        self._impl = impl
        self._normed = normed

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv: LayerKV,
        slots: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        *norms: Any,
    ) -> Tensor:
        heads = None
        if self._normed:
            query_weight, eps, key_weight, _ = norms
            heads = cache.HeadNorms(query_weight, key_weight, eps)
        rotation = cache.Rotation(positions, cos_sin)
        return self._impl.rope_write(query, key, value, rotation, kv, slots, heads)


class _Found(NamedTuple):
    """The nodes that one kernel takes over, by number; the norms may be None."""

    rope: int
    write: int
    norms: tuple[int, int] | None


def fused(graph: StepGraph) -> list[StepNode | None]:
    """The graph's nodes, those that a kernel takes over from its neighbours left out (None), so
    that the values of the others keep their numbers."""
    nodes: list[StepNode | None] = list(graph.nodes)
    for found in _find(graph):
        rope, write = graph.nodes[found.rope], graph.nodes[found.write]
        query, key, *rotation = rope.arguments
        _, value, kv, slots = write.arguments
        norms: list[Any] = []
        if found.norms is not None:
            query, *of_query = graph.nodes[found.norms[0]].arguments
            key, *of_key = graph.nodes[found.norms[1]].arguments
            norms = [*of_query, *of_key]
            for node in found.norms:
                nodes[node] = None
        call = RopeWrite(owner_of(write), bool(norms))
        arguments = (query, key, value, kv, slots, *rotation, *norms)
        nodes[found.write] = None
        nodes[found.rope] = dataclasses.replace(
            rope, call=call, arguments=arguments, outputs=rope.outputs[:1]
        )
    return rounded_at_once(graph, nodes)


def _find(graph: StepGraph) -> list[_Found]:
    uses, found = uses_of(graph), []
    for index, node in enumerate(graph.nodes):
        key = node.arguments[0] if node.op == "kv_write" else None
        if not (isinstance(key, Value) and uses[key] == 1 and key.position == 1):
            continue
        rope = graph.nodes[key.node]
        if not (_is_triton(rope, "rope") and isinstance(owner_of(node), TritonAttention)):
            continue
        if _made_after(node.arguments[1], key.node):
            continue
        query_norm, key_norm = (_norm_before(graph, one, uses) for one in rope.arguments[:2])
        norms = None
        if query_norm is not None and key_norm is not None:
            same = _eps(graph, query_norm) == _eps(graph, key_norm)
            norms = (query_norm, key_norm) if same else None
        found.append(_Found(key.node, index, norms))
    return found


def _norm_before(graph: StepGraph, argument: Any, uses: Counter[Value]) -> int | None:
    """The number of the norm that makes `argument` for this use alone."""
    if not isinstance(argument, Value) or uses[argument] != 1:
        return None
    return argument.node if _is_triton(graph.nodes[argument.node], "rms_norm") else None


def _eps(graph: StepGraph, norm: int) -> float:
    eps: float = graph.nodes[norm].arguments[2]
    return eps


def _is_triton(node: StepNode, op: str) -> bool:
    impl = inspect.unwrap(node.call)
    return isinstance(impl, TritonOp) and impl.op == op


def owner_of(node: StepNode) -> Any:
    """Whose method a node calls; None: it calls no method."""
    return getattr(inspect.unwrap(node.call), "__self__", None)


def _made_after(argument: Any, index: int) -> bool:
    base = argument.base if isinstance(argument, View) else argument
    return isinstance(base, Value) and base.node >= index
