"""The reference meaning of a `StepGraph`: what a device that compiles one has to compute."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .interface import (
    Output,
    StepFn,
    StepGraph,
    StepInput,
    StepMetadata,
    StepNode,
    Value,
    View,
)
from .ops import OPS

OUTSIDE_OPS = ("attention", "kv_write")
"""Methods of `AttentionImpl` (`run` and `write`) that are nodes beside the ops."""


def interpret(graph: StepGraph) -> StepFn:
    """The step, one node after the other. Raises ValueError if the graph is not well formed."""
    check_graph(graph)

    def step(metadata: Sequence[Any], num_tokens: int) -> Tensor:
        if not (graph.any_size or num_tokens == graph.num_tokens):
            raise ValueError(f"A step of {num_tokens} tokens; the graph has {graph.num_tokens}.")
        return StepRun(graph, graph.nodes, metadata, num_tokens).result()

    return step


def uses_of(graph: StepGraph) -> Counter[Value]:
    """How often each value is read."""
    read = [argument for node in graph.nodes for argument in node.arguments]
    bases = (one.base if isinstance(one, View) else one for one in (*read, graph.result))
    return Counter(base for base in bases if isinstance(base, Value))


class StepRun:
    """One step of a graph, one node after the other. `nodes`: the graph's, or what stands for
    them; None where another node does a node's work."""

    def __init__(
        self,
        graph: StepGraph,
        nodes: Sequence[StepNode | None],
        metadata: Sequence[Any],
        num_tokens: int,
    ) -> None:
        self._graph = graph
        self._nodes = nodes
        self._metadata = metadata
        self._num_tokens = num_tokens
        self._values: dict[Value, Tensor] = {}

    def result(self) -> Tensor:
        for index, node in enumerate(self._nodes):
            if node is None:
                continue
            found = node.call(*map(self._resolve, node.arguments))
            for position, tensor in enumerate(self._as_outputs(found, node, index)):
                self._values[Value(index, position)] = tensor
        result: Tensor = self._resolve(self._graph.result)
        return result

    def _shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """What `shape`, of an output or a view, is in this step."""
        return (self._num_tokens, *shape[1:]) if self._graph.any_size else shape

    def _resolve(self, argument: Any) -> Any:
        if isinstance(argument, Value):
            return self._values[argument]
        if isinstance(argument, View):
            base = self._values[argument.base].contiguous()  # strides count in that layout
            start = base.storage_offset() + argument.offset
            return base.as_strided(self._shape(argument.shape), argument.stride, start)
        if isinstance(argument, StepInput):
            return argument.tensor[..., : self._num_tokens]
        if isinstance(argument, StepMetadata):
            return self._metadata[argument.group]
        return argument

    def _as_outputs(self, found: Any, node: StepNode, index: int) -> tuple[Tensor, ...]:
        outputs = () if found is None else found if isinstance(found, tuple) else (found,)
        made = tuple(Output(tuple(output.shape), output.dtype) for output in outputs)
        expected = tuple(Output(self._shape(out.shape), out.dtype) for out in node.outputs)
        if made != expected:
            raise ValueError(f"Node {index} ({node.op}) made {made}, not {expected}.")
        return outputs


def check_graph(graph: StepGraph) -> None:
    """Every op is known, every value is made before it is used, and in a graph for any size every
    first dimension counts tokens. Raises ValueError."""
    for index, node in enumerate(graph.nodes):
        if node.op not in OUTSIDE_OPS and any(part not in OPS for part in node.op.split("+")):
            raise ValueError(f"Node {index} is {node.op!r}, no op and no chain of ops.")
        user = f"Node {index} ({node.op})"
        for argument in node.arguments:
            _check_value(argument, graph, index, user)
        for output in node.outputs:
            _check_shape(output.shape, graph, f"{user} makes")
    _check_value(graph.result, graph, len(graph.nodes), "The result")


def _check_value(argument: Any, graph: StepGraph, before: int, user: str) -> None:
    if isinstance(argument, View):
        _check_shape(argument.shape, graph, f"{user} reads a view")
    value = argument.base if isinstance(argument, View) else argument
    if not isinstance(value, Value):
        return
    if not (
        0 <= value.node < before and 0 <= value.position < len(graph.nodes[value.node].outputs)
    ):
        raise ValueError(f"{user} reads {value}, which no node before it makes.")


def _check_shape(shape: tuple[int, ...], graph: StepGraph, user: str) -> None:
    if graph.any_size and shape[:1] != (graph.num_tokens,):
        raise ValueError(f"{user} {shape}, in a graph for any size with {graph.num_tokens} tokens.")
