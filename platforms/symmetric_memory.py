"""Sums of small messages over memory that all ranks' cards see: torch's symmetric memory.

A rank copies its message into its buffer; then one kernel reads what the others have in theirs. In
one shot each rank adds all of it, in two each adds its share and writes that to the others; where
the switch adds (multicast), that takes the place of the second. Nothing waits on the host, and the
buffer stays where it is, so that a step can be recorded. The kernels wait for all ranks, on the
device and without an end: `abort` does not reach them, `--step-timeout` does.

All shots add in fp32 and round once. Every rank adds in the order of the ranks beginning with
itself in one shot, so that ranks may differ in the last bit of fp32; in two they are equal.
"""

from __future__ import annotations

import uuid
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from .interface import Device

ONE_SHOT, TWO_SHOTS, MULTICAST, NCCL = "one shot", "two shots", "multicast", "NCCL"
ALIGNMENT = 16
"""Bytes of the widest load; messages are multiples of it for each rank's share."""
DTYPES = (torch.bfloat16, torch.float32)
"""Those of torch's kernels (`CUDASymmetricMemoryOps.cu`)."""


class Limits(NamedTuple):
    """The largest messages, in bytes, that go in one shot, and in two or by multicast."""

    one: int
    two: int


LIMITS = Limits(256 << 10, 10 << 20)
"""kOneShotThreshBytes and kTwoShotThreshBytes of torch's `intra_node_comm.cu`; measured by nobody
here."""


def missing(rocm: bool, peers: bool) -> str:
    """Why there is none; empty: there is. `peers`: do the cards reach each other's memory?"""
    if rocm:
        return "torch's kernels for it are CUDA's"
    if not peers:
        return "the cards do not reach each other's memory"
    names = ("one_shot_all_reduce_out", "two_shot_all_reduce_", "multimem_all_reduce_")
    absent = [name for name in names if not hasattr(torch.ops.symm_mem, name)]
    return f"torch {torch.__version__} lacks {', '.join(absent)}" if absent else ""


class NamedGroup(NamedTuple):
    """A group by the name that torch knows it by, as long as `group` is held."""

    name: str
    group: Any


class SymmetricSums:
    """One rank's buffer of `LIMITS.two` bytes, and the kernels over those of all ranks. `ops`:
    torch's, or what stands in for them."""

    def __init__(
        self, buffer: Tensor, group: NamedGroup, size: int, multicast: bool, ops: Any
    ) -> None:
        self._buffer, self.group, self._size, self._ops = buffer, group, size, ops
        self._second = MULTICAST if multicast else TWO_SHOTS

    def way(self, tensor: Tensor) -> str:
        """How this message is added, by what is the same on all ranks: its size and type."""
        if tensor.dtype not in DTYPES or not tensor.is_contiguous():
            return NCCL
        if not tensor.nbytes or tensor.nbytes % (ALIGNMENT * self._size):
            return NCCL
        if tensor.nbytes <= LIMITS.one:
            return ONE_SHOT
        return self._second if tensor.nbytes <= LIMITS.two else NCCL

    def add(self, tensor: Tensor, way: str) -> Tensor:
        """The sum over all ranks, in place."""
        message = self._buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        message.copy_(tensor)
        if way == ONE_SHOT:
            # What begins off is the one rank's matter: all go the same way, or wait for ever.
            off = tensor.data_ptr() % ALIGNMENT
            out = torch.empty_like(tensor) if off else tensor
            self._ops.one_shot_all_reduce_out(message, "sum", self.group.name, out)
            return tensor.copy_(out) if off else tensor
        shots = {
            TWO_SHOTS: self._ops.two_shot_all_reduce_,
            MULTICAST: self._ops.multimem_all_reduce_,
        }
        shots[way](message, "sum", self.group.name)
        return tensor.copy_(message)


def alloc_buffer(device: Device) -> Tensor:
    """This rank's. Raises what torch raises where the card or its driver has no such memory."""
    buffer = symmetric.empty(LIMITS.two, dtype=torch.uint8, device=device.torch_device)
    device.account(buffer, buffer.nbytes, tag="collectives")
    return buffer


def open_sums(group: NamedGroup, size: int, buffer: Tensor) -> SymmetricSums:
    """Of what `register_group` and `alloc_buffer` returned; every rank waits for all others.
    Raises what torch raises where the cards do not reach the memory."""
    memory: Any = symmetric
    handle = memory.rendezvous(buffer, group.name)
    return SymmetricSums(buffer, group, size, bool(handle.multicast_ptr), torch.ops.symm_mem)


def register_group(
    store: dist.Store, joined: Any, kind: Any, rank: int, size: int, where: torch.device
) -> NamedGroup:
    """Make the backend `joined`, of the `kind` that torch calls it, known under a name by which the
    kernels find a group; no default group is touched. The name is the same on all ranks, and no
    other group's. Raises RuntimeError for a second rank in one process."""
    if rank == 0:
        store.set("symmetric-name", f"trimaran-{uuid.uuid4()}")
    name = store.get("symmetric-name").decode()
    group: Any = dist.ProcessGroup(dist.PrefixStore("symmetric", store), rank, size)
    group._set_default_backend(kind)
    group._register_backend(torch.device(where.type), kind, joined)
    group._set_group_name(name)
    distributed: Any = torch._C._distributed_c10d
    distributed._register_process_group(name, group)
    memory: Any = symmetric._SymmetricMemory
    memory.set_group_info(name, rank, size, dist.PrefixStore("memory", store))
    return NamedGroup(name, group)


def forget_group(group: NamedGroup) -> None:
    distributed: Any = torch._C._distributed_c10d
    distributed._unregister_process_group(group.name)
