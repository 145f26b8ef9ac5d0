"""Collectives between processes of one host over memory that they share, Gloo where they cannot.

The memory has no name in any file system: the first rank makes it, the others open it through that
process, and it ends with the last process that maps it, killed or not. Before anyone uses it, all
ranks have said that they can, so that all choose alike.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import secrets
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels_cpu.collective import FOREVER, TOKEN_BYTES, SharedGroup, shared_bytes
from ..kernels_cpu.library import NativeUnavailable, unavailable
from .communicator import GlooCommunicator, LocalCommunicator, rendezvous_path
from .interface import Communicator, GroupSpec

logger = logging.getLogger("trimaran.cpu")

_SUMMED = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
_NO = "no: "


class SharedMemoryCommunicator(Communicator):
    """Sums are taken in the order of the ranks, in fp32 for all floats, so that every rank rounds
    the same number once. A collective that fails ends the group: its ranks are out of step."""

    def __init__(self, group: GroupSpec, shared: SharedGroup) -> None:
        self.rank, self.size = group.rank, group.size
        self._shared: SharedGroup | None = shared

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if tensor.dtype in _SUMMED:
            whole = tensor.contiguous()
        else:
            whole = (tensor.float() if tensor.is_floating_point() else tensor.long()).contiguous()
        self._open.all_reduce(whole)
        return tensor if whole is tensor else tensor.copy_(whole)

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        part = tensor.contiguous()
        dim %= part.dim()
        whole = part.new_empty(
            (*part.shape[:dim], self.size * part.shape[dim], *part.shape[dim + 1 :])
        )
        self._open.all_gather(part, whole, part.shape[dim:].numel() * part.itemsize)
        return whole

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        whole = tensor.contiguous()
        self._open.broadcast(whole, source)
        return tensor if whole is tensor else tensor.copy_(whole)

    def barrier(self) -> None:
        self._open.barrier()

    def close(self) -> None:
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.leave()

    def abort(self) -> None:
        """Wake what waits in a collective, on any rank; it raises, as do all that follow."""
        shared = self._shared
        if shared is not None:
            shared.abort()

    @property
    def _open(self) -> SharedGroup:
        if self._shared is None:
            raise RuntimeError("The communicator is closed.")
        return self._shared


def open_cpu_communicator(group: GroupSpec) -> Communicator:
    """The communicator of a member; returns when all members are there (or after the timeout)."""
    if group.size == 1:
        return LocalCommunicator()
    try:
        shared = _meet(group)
    except _Refused as reason:
        if group.rank == 0:
            logger.warning("the %d ranks meet through Gloo: %s", group.size, reason)
        return GlooCommunicator(group)
    logger.info("the %d ranks meet in shared memory", group.size)
    return SharedMemoryCommunicator(group, shared)


def how_ranks_meet() -> str:
    """What `open_cpu_communicator` is going to choose on this host, for people."""
    reason = unavailable()
    return f"Gloo ({reason})" if reason else "shared memory"


class _Refused(Exception):
    """A member cannot share memory with the others; the message says which and why."""


def _meet(group: GroupSpec) -> SharedGroup:
    """Through a file at the group's rendezvous: the first rank says where its memory is, the others
    whether they could open it, and the first one what comes of that. Raises _Refused on all ranks
    alike, RuntimeError where one does not come in time."""
    path = rendezvous_path(group)
    store = dist.FileStore(f"{path}.memory", group.size)
    store.set_timeout(timedelta(seconds=min(group.timeout, FOREVER)))
    with contextlib.ExitStack() as until_met:
        if group.rank == 0:
            memory, offer = until_met.enter_context(_made(group.size))
            store.set("offer", offer)
            answers = [store.get(f"answer {rank}").decode() for rank in range(1, group.size)]
            refusals = [one for one in (offer, *answers) if one.startswith(_NO)]
            store.set("members", refusals[0] if refusals else " ".join([_me(), *answers]))
        else:
            memory, answer = _found(store.get("offer").decode(), group)
            store.set(f"answer {group.rank}", answer)
        members = store.get("members").decode()
    if members.startswith(_NO):
        raise _Refused(members.removeprefix(_NO))
    assert memory is not None  # or this rank has refused
    return SharedGroup(memory, group.rank, group.size, _watched(members), group.timeout)


@contextlib.contextmanager
def _made(size: int) -> Iterator[tuple[mmap.mmap | None, str]]:
    """New memory, and where others find it while this context lasts; or why there is none."""
    token = secrets.token_bytes(TOKEN_BYTES)
    try:
        _need_watching()
        count = shared_bytes(size)
        descriptor = os.memfd_create("trimaran-collectives", os.MFD_CLOEXEC)
    except (NativeUnavailable, OSError) as error:
        yield None, f"{_NO}{error}"
        return
    try:
        os.ftruncate(descriptor, count)
        memory = mmap.mmap(descriptor, count)
        memory[:TOKEN_BYTES] = token
        yield memory, f"{_process_space()} {_me()} {descriptor} {token.hex()}"
    finally:
        os.close(descriptor)


def _found(offer: str, group: GroupSpec) -> tuple[mmap.mmap | None, str]:
    """The memory that the first rank offers, and the answer: this process, or why it is not found.
    On another host, or among other processes, the same path may be anything."""
    if offer.startswith(_NO):
        return None, _me()
    space, process, descriptor, token = offer.split()
    try:
        _need_watching()
        count = shared_bytes(group.size)
        if space != _process_space():
            raise OSError("it runs on another host, or in another container, than rank 0")
        with open(f"/proc/{process}/fd/{descriptor}", "r+b") as file:
            if os.fstat(file.fileno()).st_size != count:
                raise OSError("what rank 0 offers is not there, or of another version")
            memory = mmap.mmap(file.fileno(), count)
        if memory[:TOKEN_BYTES] != bytes.fromhex(token):
            raise OSError("what rank 0 offers is not there")
    except (NativeUnavailable, OSError) as error:
        return None, f"{_NO}rank {group.rank}: {error}"
    return memory, _me()


def _me() -> str:
    return str(os.getpid())


def _process_space() -> str:
    """The processes that this one can name: those of its namespace, on this boot of this host."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"


def _need_watching() -> None:
    """Raises OSError where the end of a process cannot be waited for (Linux before 5.3)."""
    os.close(os.pidfd_open(os.getpid()))


def _watched(members: str) -> list[int]:
    """Descriptors that tell of the members' ends. Raises RuntimeError for one that has ended."""
    descriptors: list[int] = []
    try:
        for process in members.split():
            descriptors.append(os.pidfd_open(int(process)))
    except OSError as error:
        for descriptor in descriptors:
            os.close(descriptor)
        raise RuntimeError(f"Rank {len(descriptors)} has ended before all met: {error}") from None
    return descriptors
