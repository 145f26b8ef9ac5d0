"""The reference meaning of a `StepGraph`: what a device that compiles one has to compute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .interface import Output, StepFn, StepGraph, StepMetadata, StepNode, Value, View
from .ops import OPS

OUTSIDE_OPS = ("attention", "kv_write")
"""Methods of `AttentionImpl` (`run` and `write`) that are nodes beside the ops."""


def interpret(graph: StepGraph) -> StepFn:
    """The step, one node after the other. Raises ValueError if the graph is not well formed."""
    check_graph(graph)

    def step(metadata: Sequence[Any]) -> Tensor:
        values: dict[Value, Tensor] = {}
        for index, node in enumerate(graph.nodes):
            found = node.call(*(_resolve(a, values, metadata) for a in node.arguments))
            for position, tensor in enumerate(_as_outputs(found, node, index)):
                values[Value(index, position)] = tensor
        result: Tensor = _resolve(graph.result, values, metadata)
        return result

    return step


def check_graph(graph: StepGraph) -> None:
    """Every op is known, and every value is made before it is used. Raises ValueError."""
    for index, node in enumerate(graph.nodes):
        if node.op not in OUTSIDE_OPS and any(part not in OPS for part in node.op.split("+")):
            raise ValueError(f"Node {index} is {node.op!r}, no op and no chain of ops.")
        for argument in node.arguments:
            _check_value(argument, graph, index, f"Node {index} ({node.op})")
    _check_value(graph.result, graph, len(graph.nodes), "The result")


def _check_value(argument: Any, graph: StepGraph, before: int, user: str) -> None:
    value = argument.base if isinstance(argument, View) else argument
    if not isinstance(value, Value):
        return
    if not (
        0 <= value.node < before and 0 <= value.position < len(graph.nodes[value.node].outputs)
    ):
        raise ValueError(f"{user} reads {value}, which no node before it makes.")


def _resolve(argument: Any, values: dict[Value, Tensor], metadata: Sequence[Any]) -> Any:
    if isinstance(argument, Value):
        return values[argument]
    if isinstance(argument, View):
        base = values[argument.base].contiguous()  # strides count in that layout
        start = base.storage_offset() + argument.offset
        return base.as_strided(argument.shape, argument.stride, start)
    if isinstance(argument, StepMetadata):
        return metadata[argument.group]
    return argument


def _as_outputs(found: Any, node: StepNode, index: int) -> tuple[Tensor, ...]:
    outputs = () if found is None else found if isinstance(found, tuple) else (found,)
    made = tuple(Output(tuple(output.shape), output.dtype) for output in outputs)
    if made != node.outputs:
        raise ValueError(f"Node {index} ({node.op}) made {made}, not {node.outputs}.")
    return outputs
