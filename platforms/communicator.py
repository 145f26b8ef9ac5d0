"""Collectives over host memory: a group of one, and Gloo between processes of one machine."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .interface import Communicator, GroupSpec


class LocalCommunicator(Communicator):
    """The group of one: every collective is the identity."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        return tensor

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        return tensor

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass


class GlooCommunicator(Communicator):
    """Gloo over the loopback interface, found through a file all members see.

    It makes its process group itself and touches no default group, so that several engines can
    live in one process. Sums are taken in fp32 whatever the tensor's dtype, so that every rank
    rounds the same number once.
    """

    def __init__(self, group: GroupSpec) -> None:
        self.rank, self.size = group.rank, group.size
        gloo: Any = dist.ProcessGroupGloo
        store = dist.FileStore(rendezvous_path(group), group.size)
        options = gloo._Options()
        options._devices = [gloo.create_device(interface="lo")]
        options._timeout = timedelta(seconds=group.timeout)
        self._group: Any = gloo(store, group.rank, group.size, options)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        wide = tensor.float().contiguous() if tensor.is_floating_point() else tensor.contiguous()
        self._group.allreduce([wide]).wait()
        return tensor if wide is tensor else tensor.copy_(wide)

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        part = tensor.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)]
        self._group.allgather([parts], [part]).wait()
        return torch.cat(parts, dim=dim)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        options = dist.BroadcastOptions()
        options.rootRank = source
        whole = tensor.contiguous()
        self._group.broadcast([whole], options).wait()
        return tensor if whole is tensor else tensor.copy_(whole)

    def barrier(self) -> None:
        self._group.barrier().wait()

    def close(self) -> None:
        self._group = None

    def abort(self) -> None:
        """Nothing to do: the members that were ended broke its connections, and each call that
        needs one of these raises."""


def rendezvous_path(group: GroupSpec) -> str:
    """The file that the members of a group meet at."""
    prefix = "file://"
    if not group.rendezvous.startswith(prefix):
        raise ValueError(f"A group's rendezvous is a file:// URL, not {group.rendezvous!r}.")
    return group.rendezvous.removeprefix(prefix)


def open_communicator(group: GroupSpec) -> Communicator:
    """The communicator of a member; returns when all members are there (or after the timeout)."""
    return LocalCommunicator() if group.size == 1 else GlooCommunicator(group)
