"""Ops by the native kernels: one call of one kernel each, alone or as part of a whole step.

An op says how a `Call` is filled in from operands. Run alone, the operands are tensors; in a
compiled step they are places in its arena (`cpu_step`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..kernels_cpu.library import ELEMENTS, Call, library, unavailable
from .interface import OpImpl, OpSignature, Output, Support

SMALL_BYTES = 1 << 20
"""An op alone that reads and writes no more is done before a second thread would be there."""


class Operand(NamedTuple):
    """Where a tensor lies. The leading dimension counts tokens; `shape` is the rest of its shape
    and `strides`, in elements, are all of its strides."""

    address: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Operand:
        return cls(tensor.data_ptr(), tensor.dtype, tuple(tensor.shape[1:]), tensor.stride())

    @property
    def inner_is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides[1:]), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


class NativeOp(OpImpl):
    """An op by one native kernel. `tensors`: which of the op's arguments are tensors with a row a
    token, the one that says how many first; all others are constants (weights, numbers, None).
    `reads_weights`: the constants are most of what it reads, so that it is never small."""

    name = "native"
    priority = 10
    reads_weights = False
    kernel: str
    tensors: tuple[int, ...] = (0,)

    def supports(self, sig: OpSignature) -> Support:
        if reason := unavailable():
            return Support.no(reason)
        if sig.dtype not in ELEMENTS:
            return Support.no(f"no kernel for {sig.dtype}")
        return Support.yes(f"own kernel, {library().isa}")

    def kernel_of(self, args: Sequence[Any]) -> str:
        """The kernel for these arguments."""
        return self.kernel

    def dtype_of(self, args: Sequence[Any]) -> torch.dtype:
        """The element type that the kernel works in; `args`: tensors or operands."""
        dtype: torch.dtype = args[self.tensors[0]].dtype
        return dtype

    @abstractmethod
    def outputs(self, args: Sequence[Any]) -> Sequence[Output]:
        """What the op makes of these arguments, contiguous each."""

    def row_scratch(self, args: Sequence[Any], made: Sequence[Output]) -> int:
        """Bytes of memory that the kernel works in for each row; 0: none. `made`: the outputs; of
        `args` only constants may be looked at."""
        return 0

    @abstractmethod
    def fill(self, call: Call, out: Sequence[Operand], args: Sequence[Any]) -> None:
        """Complete `call`, which has the kernel, the element type and the number of rows. `args`:
        the op's own, operands in place of `tensors`. `out`: the scratch memory, if any, last."""

    def __call__(self, *args: Any) -> Any:
        outputs = self.outputs(args)
        made = [torch.empty(shape, dtype=dtype) for shape, dtype in outputs]
        given = list(args)
        for index in self.tensors:
            if not Operand.of(args[index]).inner_is_contiguous:
                args = (*args[:index], args[index].contiguous(), *args[index + 1 :])
            given[index] = Operand.of(args[index])
        native = library()
        rows = len(args[self.tensors[0]])
        call = native.call(self.kernel_of(args), self.dtype_of(args), rows)
        out = [Operand.of(tensor) for tensor in made]
        if row_bytes := self.row_scratch(args, outputs):
            scratch = torch.empty(rows, row_bytes, dtype=torch.uint8)
            out.append(Operand.of(scratch))
        self.fill(call, out, given)
        small = args[self.tensors[0]].nbytes + sum(tensor.nbytes for tensor in made) <= SMALL_BYTES
        native.run_one(call, alone=small and not self.reads_weights)
        return tuple(made) if len(made) > 1 else made[0]
