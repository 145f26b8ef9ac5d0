"""Tracing: the decoder's forward as a `StepGraph`, for platforms that compile whole steps.

The decoder knows nothing of it. Where a platform compiles steps, the bound ops and the groups'
attention are wrapped when they are bound; while a trace runs, each call becomes a node, and is
computed only where none like it was. Between them the decoder may only look at tensors in other
shapes: whatever else it does to one has no place in a graph, is noticed, and ends the trace.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from ...platforms.interface import (
    AttentionBatch,
    AttentionImpl,
    AttentionSpec,
    Device,
    LayerKV,
    Output,
    PackedWeight,
    StepGraph,
    StepInput,
    StepMetadata,
    StepNode,
    Support,
    Value,
    View,
)
from .decoder import Decoder
from .step import StepGroup

METADATA = 3
"""Which argument of `AttentionImpl.run` is the step's metadata."""


class TraceError(Exception):
    """The decoder does something that a `StepGraph` cannot say."""


class StepTracer:
    """Records the calls that go through what it has wrapped, while it traces; otherwise they go
    straight on."""

    def __init__(self) -> None:
        self._recording: _Recording | None = None

    def wrap(self, op: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, which `op` is bound to, so that it can be traced."""

        def traced(*args: Any) -> Any:
            return self.call(op, call, args)

        return functools.update_wrapper(traced, call, assigned=(), updated=())

    def watch(self, groups: Sequence[StepGroup]) -> None:
        """Wrap the groups' attention; their order is that of a compiled step's metadata."""
        for index, group in enumerate(groups):
            group.impl = TracedAttention(self, group.impl, index)

    def call(
        self, op: str, call: Callable[..., Any], args: tuple[Any, ...], group: int | None = None
    ) -> Any:
        recording = self._recording
        if recording is None or recording.in_node:  # the parts of a composed op are no nodes
            return call(*args)
        return recording.run(op, call, args, group)

    def trace(self, decoder: Decoder) -> StepGraph:
        """Run the step that stands in the buffers, inside a launch, and return its graph. Raises
        TraceError."""
        recording = self._recording = _Recording(decoder.buffers.inputs())
        try:
            with recording:
                hidden = decoder.forward()
            result = recording.refer(hidden)
        finally:
            self._recording = None
        if not isinstance(result, Value | View):
            raise TraceError("the decoder's result comes from no op")
        return StepGraph(decoder.buffers.num_tokens, tuple(recording.nodes), result)


class _Recording(TorchDispatchMode):
    """One trace. Every torch call that its thread makes passes by it."""

    def __init__(self, inputs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """`inputs`: see `StepBuffers.inputs`."""
        super().__init__()
        self._inputs = [(view, StepInput(whole)) for view, whole in inputs]
        self.nodes: list[StepNode] = []
        self.in_node = False
        self._like: dict[tuple[Any, ...], Callable[[], Any]] = {}
        # By storage, the last first. A reference that is weak lets the memory go with the tensor,
        # and yet no later storage can be taken for this one, as one at the same address could.
        self._made: dict[StorageWeakRef, list[tuple[Value, _Layout]]] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """torch's question; by yes, its default, the first call imports its compiler: a second."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if not (self.in_node or _is_view(func)):
            raise TraceError(f"{func} runs between two ops; only views may")
        return func(*args, **(kwargs or {}))

    def run(
        self, op: str, call: Callable[..., Any], args: tuple[Any, ...], group: int | None
    ) -> Any:
        arguments = [self.refer(argument) for argument in args]
        if group is not None:
            arguments[METADATA] = StepMetadata(group)
        self.in_node = True
        try:
            found = self._outcome(call, args)
        finally:
            self.in_node = False
        outputs = _outputs(found)
        for position, output in enumerate(outputs):
            made = self._made.setdefault(_storage(output), [])
            made.insert(0, (Value(len(self.nodes), position), _Layout.of(output)))
        kinds = tuple(Output(tuple(made.shape), made.dtype) for made in outputs)
        self.nodes.append(StepNode(op, call, tuple(arguments), kinds))
        return found

    def _outcome(self, call: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """What `call` makes of arguments like these. Only what it is like counts, and layers repeat
        each other: so it is computed for the first of them, and zero for the others."""
        key = (call, _kind(args))
        if key in self._like:
            return self._like[key]()
        found = call(*args)
        given = {_storage(argument) for argument in args if isinstance(argument, Tensor)}
        if not any(_storage(output) in given for output in _outputs(found)):  # not in place
            self._like[key] = _maker(found)
        return found

    def refer(self, argument: Any) -> Any:
        """A tensor that a node made, or a view of one, by that node; an input of the step by what
        it is a part of; anything else was there before the step and is constant."""
        if not isinstance(argument, Tensor):
            return argument
        made = self._made.get(_storage(argument))
        if made is None:
            return self._refer_outside(argument)
        layout = _Layout.of(argument)
        for value, output in made:
            if output == layout:
                return value
        for value, output in made:
            if (offset := output.offset_of(layout)) is not None:
                return View(value, layout.shape, layout.stride, offset)
        raise TraceError(f"a view {tuple(layout)} lies in no contiguous output of an op")

    def _refer_outside(self, tensor: Tensor) -> Tensor | StepInput:
        for view, found in self._inputs:
            if tensor is view:
                return found
        for _, found in self._inputs:
            if _overlap(tensor, found.tensor):
                raise TraceError("an op reads a part of the token ids, the positions or the slots")
        return tensor


def _is_view(func: Any) -> bool:
    """Does this torch op only return views of what it is given?"""
    returned = [r.alias_info for r in func._schema.returns]
    return bool(returned) and all(alias and not alias.is_write for alias in returned)


def _outputs(found: Any) -> tuple[Tensor, ...]:
    """What an op returned, one by one."""
    return () if found is None else found if isinstance(found, tuple) else (found,)


def _kind(argument: Any) -> Any:
    """What an op's results are like depends on this of an argument."""
    if isinstance(argument, Tensor):
        return tuple(argument.shape), argument.stride(), argument.dtype
    if isinstance(argument, tuple):
        return tuple(map(_kind, argument))
    if isinstance(argument, PackedWeight):
        inside = (_kind(one) if isinstance(one, Tensor) else type(one) for one in argument.tensors)
        return argument.format, argument.shape, *inside
    return argument if isinstance(argument, int | float | str) else id(argument)


def _maker(found: Any) -> Callable[[], Any]:
    """What makes zeros like `found`, without holding on to it."""
    if found is None:
        return lambda: None
    if isinstance(found, tuple):
        makers = [_maker(one) for one in found]
        return lambda: tuple(make() for make in makers)
    shape, stride, dtype, device = tuple(found.shape), found.stride(), found.dtype, found.device
    size = _extent(shape, stride)
    return lambda: torch.zeros(size, dtype=dtype, device=device).as_strided(shape, stride)


def _extent(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Elements from the first to the last, both included."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def _storage(tensor: Tensor) -> StorageWeakRef:
    return StorageWeakRef(tensor.untyped_storage())


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Of two contiguous tensors, or views of such."""
    return _storage(a) == _storage(b) and not (a.data_ptr() >= _end(b) or b.data_ptr() >= _end(a))


def _end(tensor: Tensor) -> int:
    """The address behind its last element."""
    extent = _extent(tensor.shape, tensor.stride())
    return int(tensor.data_ptr() + extent * tensor.element_size())


class _Layout(NamedTuple):
    """Where in its storage a tensor lies."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    contiguous: bool

    @classmethod
    def of(cls, tensor: Tensor) -> _Layout:
        shape, contiguous = tuple(tensor.shape), tensor.is_contiguous()
        return cls(int(tensor.storage_offset()), shape, tensor.stride(), tensor.dtype, contiguous)

    def offset_of(self, view: _Layout) -> int | None:
        """Elements from the start of this to that of `view`; None if it is no view of it."""
        offset = view.offset - self.offset
        extent = _extent(view.shape, view.stride)
        inside = offset >= 0 and offset + extent <= math.prod(self.shape)
        return offset if inside and self.contiguous and view.dtype == self.dtype else None


class TracedAttention(AttentionImpl):
    """An implementation whose `write` and `run` can be traced."""

    def __init__(self, tracer: StepTracer, impl: AttentionImpl, group: int) -> None:
        self._tracer = tracer
        self._impl = impl
        self._group = group
        self.name, self.priority, self.layout = impl.name, impl.priority, impl.layout

    def write(self, key: Tensor, value: Tensor, kv: LayerKV, slots: Tensor) -> None:
        self._tracer.call("kv_write", self._impl.write, (key, value, kv, slots))

    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Any) -> Tensor:
        args = (query, kv, spec, metadata)
        attended: Tensor = self._tracer.call("attention", self._impl.run, args, self._group)
        return attended

    def supports(self, spec: AttentionSpec) -> Support:
        return self._impl.supports(spec)

    def alloc(self, device: Device, spec: AttentionSpec, num_blocks: int) -> LayerKV:
        return self._impl.alloc(device, spec, num_blocks)

    def block_bytes(self, spec: AttentionSpec) -> int:
        return self._impl.block_bytes(spec)

    def plan(self, spec: AttentionSpec, batch: AttentionBatch) -> Any:
        return self._impl.plan(spec, batch)

    def plan_recorded(self, spec: AttentionSpec, block_tables: Tensor, seq_lens: Tensor) -> Any:
        return self._impl.plan_recorded(spec, block_tables, seq_lens)

    def export_blocks(self, kv: LayerKV, spec: AttentionSpec, blocks: Tensor) -> Tensor:
        return self._impl.export_blocks(kv, spec, blocks)

    def import_blocks(
        self, kv: LayerKV, spec: AttentionSpec, blocks: Tensor, canonical: Tensor
    ) -> None:
        self._impl.import_blocks(kv, spec, blocks, canonical)
