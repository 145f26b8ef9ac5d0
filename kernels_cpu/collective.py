"""Collectives of the ranks of one host, over memory that they share: the native entry points."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .library import ELEMENTS, NativeUnavailable, library

SLOT_BYTES = 1 << 20
"""What a rank gives at once; larger tensors go in pieces. Each rank has two of them."""
TOKEN_BYTES = 16
"""At the beginning of the memory, for its members to recognise it by."""
FOREVER = 1e9
"""Seconds; longer ones do not fit into nanoseconds."""

_INT64 = 3
_FAILURES = (
    "",
    "the group was aborted",
    "timed out after {milliseconds:.0f}ms waiting for rank {rank}",
    "the process of rank {rank} has ended",
    "rank {rank} has closed the group",
    "rank {rank} is in another collective, or gives a tensor of another size",
)
"""By `Status` in csrc/collective.h."""


class CollectiveFailed(RuntimeError):
    """A collective that cannot come to an end; its group is of no use any more."""


class _Group(ctypes.Structure):
    """`Group` in csrc/collective.h."""

    _fields_ = [
        ("shared", ctypes.c_void_p),
        ("processes", ctypes.c_void_p),
        ("slot_bytes", ctypes.c_int64),
        ("timeout", ctypes.c_int64),
        ("rank", ctypes.c_int32),
        ("size", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("step", ctypes.c_uint32),
        ("piece", ctypes.c_uint32),
        ("missing", ctypes.c_int32),
    ]


def shared_bytes(size: int) -> int:
    """Bytes of the memory that a group of `size` ranks shares; it begins as zeros, after the token.
    Raises NativeUnavailable."""
    native = _native()
    count: int = native.trimaran_shared_bytes(size, ctypes.c_int64(SLOT_BYTES))
    if not count:
        raise NativeUnavailable(f"shared memory serves no group of {size} ranks")
    return count


class SharedGroup:
    """A rank's view of a group. Collectives are for one thread; `abort` is for any."""

    def __init__(
        self, memory: mmap.mmap, rank: int, size: int, processes: Sequence[int], timeout: float
    ) -> None:
        """`processes`: for each rank a descriptor that becomes readable when its process ends; they
        are closed with the group. `timeout` in seconds."""
        self._native = _native()
        self._processes = (ctypes.c_int32 * size)(*processes)
        # What a call reads stays as long as the group, and that as long as the call.
        weakref.finalize(self, _close_all, tuple(processes))
        self._memory = (ctypes.c_char * len(memory)).from_buffer(memory)
        self._group = _Group(
            ctypes.addressof(self._memory),
            ctypes.addressof(self._processes),
            SLOT_BYTES,
            int(min(timeout, FOREVER) * 1e9),
            rank,
            size,
        )
        self._at = ctypes.byref(self._group)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum in place: `tensor` is contiguous, of fp32, bf16, fp16 or int64."""
        element = _INT64 if tensor.dtype == torch.int64 else ELEMENTS[tensor.dtype]
        self._threads()
        status = self._native.trimaran_all_reduce(
            self._at, tensor.data_ptr(), tensor.numel(), element
        )
        self._check("all_reduce", status)

    def all_gather(self, part: Tensor, whole: Tensor, inner: int) -> None:
        """Each rank's contiguous `part`, cut into rows of `inner` bytes, to `whole`, in which the
        ranks' rows lie beside each other."""
        self._threads()
        status = self._native.trimaran_all_gather(
            self._at, part.data_ptr(), whole.data_ptr(), part.nbytes, inner
        )
        self._check("all_gather", status)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        self._threads()
        status = self._native.trimaran_broadcast(self._at, tensor.data_ptr(), tensor.nbytes, source)
        self._check("broadcast", status)

    def barrier(self) -> None:
        self._check("barrier", self._native.trimaran_barrier(self._at))

    def abort(self) -> None:
        """Collectives of all ranks raise, those that wait now and those to come."""
        self._native.trimaran_abort(self._at)

    def leave(self) -> None:
        """Whoever waits for this rank from now on waits in vain, and is told so."""
        self._native.trimaran_leave(self._at)

    def _threads(self) -> None:
        self._group.num_threads = torch.get_num_threads()

    def _check(self, collective: str, status: int) -> None:
        if status:
            rank, milliseconds = self._group.missing, self._group.timeout / 1e6
            reason = _FAILURES[status].format(rank=rank, milliseconds=milliseconds)
            raise CollectiveFailed(
                f"{collective} on rank {self._group.rank} of {self._group.size}: {reason}."
            )


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _native() -> Any:
    """The library with its collectives. Raises NativeUnavailable."""
    native = library().entry_points
    if not hasattr(native, "trimaran_group_bytes"):
        raise NativeUnavailable("the native library has no collectives: build it again")
    if native.trimaran_group_bytes() != ctypes.sizeof(_Group):
        raise NativeUnavailable("the native library has other collectives: build it again")
    pointer, size, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    native.trimaran_shared_bytes.restype = size
    native.trimaran_all_reduce.argtypes = (pointer, pointer, size, number)
    native.trimaran_all_gather.argtypes = (pointer, pointer, pointer, size, size)
    native.trimaran_broadcast.argtypes = (pointer, pointer, size, number)
    for name in ("barrier", "abort", "leave"):
        getattr(native, f"trimaran_{name}").argtypes = (pointer,)
    return native
