"""A whole step as one native call: the step graph as a program of kernel calls over one arena.

Every value of the graph gets a place in the arena that is large enough for the largest step, so
that all addresses are known when the step is compiled; places are used again once nothing reads
them any more. A step is then the number of tokens, the attention plans, and one call.
"""

from __future__ import annotations

import ctypes
import dataclasses
import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels_cpu.library import Call, library
from .cpu_attention import NativeAttention
from .cpu_fusion import fused
from .cpu_native import NativeOp, Operand
from .host_device import huge_pages
from .interface import (
    Output,
    StepFn,
    StepGraph,
    StepInput,
    StepLimits,
    StepNode,
    Value,
    View,
)

logger = logging.getLogger("trimaran.cpu")

LINE = 64
"""Bytes that places in the arena are aligned to: a cache line."""


_BYTE = torch.uint8


class NotNative(Exception):
    """A node that no native kernel computes; the message names it."""


def compile_step(graph: StepGraph, limits: StepLimits) -> StepFn | None:
    """The step as a native program; None, with the reason in the log, where an op of the graph is
    bound to something else than a native kernel."""
    assert graph.any_size and limits.max_tokens is not None
    try:
        return _Compiler(graph, limits.max_tokens).step()
    except NotNative as reason:
        logger.info("steps run op by op: %s", reason)
        return None


class _Compiler:
    def __init__(self, graph: StepGraph, max_tokens: int) -> None:
        self._graph = graph
        self._nodes = [node and _with_scratch(node) for node in fused(graph)]
        self._native = library()
        sizes = [
            [_place_bytes(output, max_tokens) for output in node.outputs] if node else []
            for node in self._nodes
        ]
        offsets, self._arena_bytes = place(sizes, last_uses(self._nodes, graph.result))
        self._arena = huge_pages((self._arena_bytes,), _BYTE)
        start = self._arena.data_ptr()
        self._address = {value: start + offset for value, offset in offsets.items()}
        self._start = start

    def step(self) -> StepFn:
        calls = [self._call(node, index) for index, node in enumerate(self._nodes) if node]
        native, program = self._native, self._native.program(calls)
        result, keep = self._result(), self._graph  # the program's constants live in its graph
        plans: list[Any] = []

        def step(metadata: Sequence[Any], num_tokens: int) -> Tensor:
            assert keep is not None
            plans[:] = metadata
            table = (ctypes.c_void_p * len(metadata))(*(plan.address for plan in metadata))
            native.run(program, num_tokens, ctypes.addressof(table))
            return result[:num_tokens]

        return step

    def _result(self) -> Tensor:
        """The arena seen as all rows of the step's result."""
        operand = self._operand(self._graph.result)
        row = math.prod(operand.shape)
        bytes_from = operand.address - self._start
        rows = (self._arena_bytes - bytes_from) // (operand.dtype.itemsize * operand.strides[0])
        typed = self._arena[bytes_from:].view(operand.dtype)
        return typed.as_strided((rows, row), (operand.strides[0], 1))

    def _call(self, node: StepNode, index: int) -> Call:
        out = [self._operand(Value(index, position)) for position in range(len(node.outputs))]
        impl: Any = inspect.unwrap(node.call)
        owner = getattr(impl, "__self__", None)
        if isinstance(impl, NativeOp):
            given = list(node.arguments)
            for at in impl.tensors:
                given[at] = self._operand(given[at])
            given = [one.tensor if isinstance(one, StepInput) else one for one in given]
            kernel, dtype = impl.kernel_of(given), impl.dtype_of(given)
            call = self._native.call(kernel, dtype, per_token=1)
            impl.fill(call, out, given)
            return call
        if isinstance(owner, NativeAttention):
            return self._attention(owner, node, out)
        name = getattr(owner or impl, "name", impl)
        raise NotNative(f"{node.op} is bound to {name}, which is no native kernel")

    def _attention(self, impl: NativeAttention, node: StepNode, out: Sequence[Operand]) -> Call:
        if node.op == "kv_write":
            key, value, kv, slots = node.arguments
            call = self._native.call("kv_write", self._operand(key).dtype, per_token=1)
            address = slots.tensor.data_ptr()
            impl.fill_write(call, self._operand(key), self._operand(value), kv, address)
            return call
        query, kv, spec, metadata = node.arguments
        call = self._native.call("attention", spec.dtype, per_token=1)
        impl.fill_run(call, out[0], self._operand(query), kv, spec, metadata.group)
        return call

    def _operand(self, argument: Any) -> Operand:
        if isinstance(argument, StepInput):
            return Operand.of(argument.tensor)
        base = argument.base if isinstance(argument, View) else argument
        if not isinstance(base, Value):
            raise NotNative(f"an op reads {argument!r} as if it had a row a token")
        node = self._nodes[base.node]
        assert node is not None, "what was fused away is read by nobody"
        output = node.outputs[base.position]
        address = self._address[base]
        if not isinstance(argument, View):
            return Operand(address, output.dtype, output.shape[1:], contiguous(output.shape))
        shifted = address + argument.offset * output.dtype.itemsize
        operand = Operand(shifted, output.dtype, argument.shape[1:], argument.stride)
        if not operand.inner_is_contiguous:
            raise NotNative(f"an op reads a view with strides {argument.stride}")
        return operand


def _with_scratch(node: StepNode) -> StepNode:
    """The node with the memory that its kernel works in as one more output, which nobody reads."""
    impl = inspect.unwrap(node.call)
    size = impl.row_scratch(node.arguments, node.outputs) if isinstance(impl, NativeOp) else 0
    if not size:
        return node
    scratch = Output((node.outputs[0].shape[0], size), _BYTE)
    return dataclasses.replace(node, outputs=(*node.outputs, scratch))


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    return tuple(math.prod(shape[at + 1 :]) for at in range(len(shape)))


def last_uses(nodes: Sequence[StepNode | None], result: Value | View) -> dict[Value, int]:
    """The last node that reads each value, or the one that makes it; the result is read after all
    of them."""
    uses = {}
    for index, node in enumerate(nodes):
        if node is None:
            continue
        for position in range(len(node.outputs)):
            uses[Value(index, position)] = index
        for argument in node.arguments:
            base = argument.base if isinstance(argument, View) else argument
            if isinstance(base, Value):
                uses[base] = index
    uses[result.base if isinstance(result, View) else result] = len(nodes)
    return uses


def place(
    sizes: Sequence[Sequence[int]], uses: Mapping[Value, int]
) -> tuple[dict[Value, int], int]:
    """Offsets of all values, and the bytes of the arena: each value goes where it fits first among
    those that are still to be read. `sizes`: bytes of each node's outputs."""
    offsets: dict[Value, int] = {}
    living: dict[Value, tuple[int, int]] = {}
    total = 0
    for index, outputs in enumerate(sizes):
        living = {value: span for value, span in living.items() if uses[value] >= index}
        for position, size in enumerate(outputs):
            value, at = Value(index, position), 0
            for start, end in sorted(living.values()):
                if start - at >= size:
                    break
                at = max(at, end)
            offsets[value], living[value] = at, (at, at + size)
            total = max(total, at + size)
    return offsets, total


def _place_bytes(output: Output, max_tokens: int) -> int:
    size = max_tokens * math.prod(output.shape[1:]) * output.dtype.itemsize
    return -(-size // LINE) * LINE
