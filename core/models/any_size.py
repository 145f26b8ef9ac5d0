"""One graph for steps of any size: that two traces, of different numbers of tokens, differ in
nothing else."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ...platforms.interface import (
    StepGraph,
    StepInput,
    StepMetadata,
    StepNode,
    Value,
    View,
)
from .trace import TraceError

EXAMPLES = (3, 2)
"""Tokens of the steps to trace: few, which costs little, and not 1, with which a stride says
nothing."""

_Pair = tuple[int, int]
_PLAIN = (Value, StepMetadata, int, float, str, torch.dtype, type(None))


def any_size(graph: StepGraph, other: StepGraph) -> StepGraph:
    """`graph` as one for any size; `other` is the same step with another number of tokens. Raises
    TraceError saying where more than that differs."""
    sizes = (graph.num_tokens, other.num_tokens)
    if len(graph.nodes) != len(other.nodes):
        counts = f"{len(graph.nodes)} and {len(other.nodes)} ops"
        raise TraceError(f"steps of {sizes[0]} and {sizes[1]} tokens have {counts}")
    for index, (one, two) in enumerate(zip(graph.nodes, other.nodes, strict=True)):
        if difference := _difference(one, two, sizes):
            raise TraceError(f"op {index} ({one.op}) depends on the number of tokens: {difference}")
    if not _same(graph.result, other.result, sizes):
        raise TraceError("which value the result is depends on the number of tokens")
    return dataclasses.replace(graph, any_size=True)


def _difference(one: StepNode, two: StepNode, sizes: _Pair) -> str:
    if one.op != two.op or one.call != two.call:
        return f"it is {two.op} of {two.call} with {sizes[1]}"
    if len(one.arguments) != len(two.arguments) or len(one.outputs) != len(two.outputs):
        return "it has more or fewer arguments or results"
    for position, (a, b) in enumerate(zip(one.arguments, two.arguments, strict=True)):
        if not _same(a, b, sizes):
            return f"its argument {position}"
    for a, b in zip(one.outputs, two.outputs, strict=True):
        if a.dtype != b.dtype or not _counts(a.shape, b.shape, sizes):
            return f"its result is {a.shape} with {sizes[0]}, {b.shape} with {sizes[1]}"
    return ""


def _same(a: Any, b: Any, sizes: _Pair) -> bool:
    """Are two arguments the same but for the first dimension of a view?"""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):  # a view of a constant is made each time
        return _memory(a) == _memory(b)
    if type(a) is not type(b):
        return False
    if isinstance(a, View):
        same = (a.base, a.stride, a.offset) == (b.base, b.stride, b.offset)
        return same and _counts(a.shape, b.shape, sizes)
    if isinstance(a, StepInput):
        return a.tensor is b.tensor
    return isinstance(a, _PLAIN) and bool(a == b)


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _counts(a: tuple[int, ...], b: tuple[int, ...], sizes: _Pair) -> bool:
    """Does the first dimension, and no other, count tokens?"""
    return (a[:1], b[:1]) == (sizes[:1], sizes[1:]) and a[1:] == b[1:]
