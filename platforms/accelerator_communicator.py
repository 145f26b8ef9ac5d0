"""Collectives between GPUs: NCCL, or RCCL under the same name, else Gloo through host memory."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .communicator import GlooCommunicator, LocalCommunicator, rendezvous_path
from .interface import Communicator, Device, GroupSpec
from .symmetric_memory import (
    NCCL,
    NamedGroup,
    SymmetricSums,
    alloc_buffer,
    forget_group,
    missing,
    open_sums,
    register_group,
)

logger = logging.getLogger("trimaran.platforms")


def missing_nccl() -> str:
    """Why this torch has no NCCL (RCCL in ROCm's builds); empty: it has."""
    return "" if dist.is_nccl_available() else f"torch {torch.__version__} is built without NCCL"


def open_accelerator_communicator(
    group: GroupSpec, device: Device, peers: bool = False
) -> Communicator:
    """The communicator of a member; returns when all members are there (or after the timeout).
    `peers`: the cards reach each other's memory."""
    if group.size == 1:
        return LocalCommunicator()
    reason = missing_nccl()
    if not reason:
        return NcclCommunicator(group, device, peers)
    logger.warning("collectives go through host memory: %s", reason)
    return HostStagedCommunicator(GlooCommunicator(group))


class NcclCommunicator(Communicator):
    """NCCL on the current stream: a call returns when the work is queued.

    It makes its process group itself and touches no default group, so that several engines can
    live in one process. A kernel that waits for a missing member spins until `abort`; without it
    torch's watchdog ends this process after the group's timeout, with the collective's name.

    With `GroupSpec.low_latency` small sums go over symmetric memory where all ranks have it
    (`symmetric_memory.py`); `abort` does not end those.
    """

    _sums: SymmetricSums | None = None

    def __init__(self, group: GroupSpec, device: Device, peers: bool = False) -> None:
        self.rank, self.size = group.rank, group.size
        nccl: Any = dist.ProcessGroupNCCL
        store = dist.FileStore(rendezvous_path(group), group.size)
        options = nccl.Options()
        options._timeout = timedelta(seconds=group.timeout)
        self._joined: Any = nccl(store, group.rank, group.size, options)
        self._token = torch.zeros(1, device=device.torch_device)
        self.barrier()  # NCCL connects at the first collective
        if group.low_latency:
            self._sums = self._open_sums(store, device, peers)

    def _open_sums(self, store: Any, device: Device, peers: bool) -> SymmetricSums | None:
        """None on all ranks if one of them has none; the first says why in the log."""
        reason = missing(torch.version.hip is not None, peers)
        group: NamedGroup | None = None
        buffer: Tensor | None = None
        sums: SymmetricSums | None = None
        kind: Any = dist.ProcessGroup.BackendType
        where = self._token.device
        try:
            if not reason:
                group = register_group(store, self._group, kind.NCCL, self.rank, self.size, where)
                buffer = alloc_buffer(device)
        except Exception as error:  # of an interface that torch calls alpha
            reason = f"{type(error).__name__}: {error}"
        # Agreed before the ranks wait for each other, and after it; each asks as often.
        if not self._all(buffer is not None):
            reason = reason or "another rank has none"
        try:
            if group is not None and buffer is not None and not reason:
                sums = open_sums(group, self.size, buffer)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        if not self._all(sums is not None):
            reason, sums = reason or "another rank has none", None
        if group is not None and sums is None:
            forget_group(group)
        if self.rank == 0:
            said = f"by NCCL alone: {reason}" if reason else "over symmetric memory"
            logger.info("small sums of %d ranks go %s", self.size, said)
        return sums

    def _all(self, here: bool) -> bool:
        """Is it so on all ranks?"""
        asked = torch.full((1,), float(here), device=self._token.device)
        return bool(self.all_reduce(asked).item() == self.size)

    @property
    def _group(self) -> Any:
        group = self._joined
        if group is None:
            raise RuntimeError("The communicator is closed.")
        return group

    def all_reduce(self, tensor: Tensor) -> Tensor:
        group = self._group
        if self._sums is not None and (way := self._sums.way(tensor)) != NCCL:
            return self._sums.add(tensor, way)
        whole = tensor.contiguous()
        group.allreduce([whole]).wait()
        return tensor if whole is tensor else tensor.copy_(whole)

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        part = tensor.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)]
        self._group.allgather([parts], [part]).wait()
        return torch.cat(parts, dim=dim)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        whole = tensor.contiguous()
        self._group.broadcast([whole], options).wait()
        return tensor if whole is tensor else tensor.copy_(whole)

    def barrier(self) -> None:
        self.all_reduce(self._token).item()  # waits for the device, not only for the queue

    def close(self) -> None:
        group = self._leave()
        if group is not None:
            group.shutdown()

    def abort(self) -> None:
        group = self._leave()
        if group is not None:
            group.abort()  # ends its kernels and its watchdog (PyTorch's pull request 132291)

    def _leave(self) -> Any:
        """The group, which is no longer this object's; None where it was left before."""
        group, self._joined = self._joined, None
        sums, self._sums = self._sums, None
        if sums is not None:
            forget_group(sums.group)
        return group


class HostStagedCommunicator(Communicator):
    """Another communicator's collectives on copies in host memory. Each call waits for the device
    twice: correct, and slow."""

    def __init__(self, host: Communicator) -> None:
        self.rank, self.size = host.rank, host.size
        self._host = host

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(self._host.all_reduce(tensor.cpu()))

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        return self._host.all_gather(tensor.cpu(), dim).to(tensor.device)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        return tensor.copy_(self._host.broadcast(tensor.cpu(), source))

    def barrier(self) -> None:
        self._host.barrier()

    def close(self) -> None:
        self._host.close()

    def abort(self) -> None:
        self._host.abort()
