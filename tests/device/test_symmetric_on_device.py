"""Sums of two cards over symmetric memory, each rank a process of its own."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest
import torch

from trimaran.platforms.accelerator_communicator import NcclCommunicator
from trimaran.platforms.cuda import CudaPlatform
from trimaran.platforms.interface import Graph, GroupSpec
from trimaran.platforms.symmetric_memory import LIMITS, NCCL

pytestmark = pytest.mark.device


def member(rank: int, path: str) -> None:
    platform = CudaPlatform()
    device = platform.open(rank)
    group = GroupSpec(rank, 2, f"file://{path}", timeout=120.0, low_latency=True)
    comm = platform.communicator(group, device)
    assert isinstance(comm, NcclCommunicator) and comm._sums is not None
    for dtype in (torch.bfloat16, torch.float32):
        for size in (32, 4096, LIMITS.one, LIMITS.one + 32, LIMITS.two, LIMITS.two + 32):
            tensor = torch.full((size // dtype.itemsize,), rank + 1.0, dtype=dtype)
            there = device.to_device(tensor)
            assert (comm._sums.way(there) == NCCL) == (size > LIMITS.two)

            def added(there: torch.Tensor = there) -> None:
                there.fill_(rank + 1.0)
                comm.all_reduce(there)

            for _ in range(3):  # the buffer is used again
                device.launch(added).wait()
            assert device.to_host(there).eq(3.0).all()
    there = device.alloc((2048,), torch.bfloat16, tag="test")
    graphs: list[Graph | None] = []

    def work() -> None:
        there.copy_(comm.all_reduce(there.clone()))

    def replayed() -> None:
        there.fill_(rank + 1.0)
        assert graphs[0] is not None
        graphs[0].replay()

    device.launch(work).wait()
    device.launch(lambda: graphs.append(device.capture(work))).wait()
    for _ in range(3):
        device.launch(replayed).wait()
        assert device.to_host(there).eq(3.0).all()
    comm.close()
    device.close()


def test_sums_of_two_cards(tmp_path: Path) -> None:
    devices = CudaPlatform.probe().devices
    if len(devices) < 2 or not CudaPlatform().capabilities(0).peer_to_peer:
        pytest.skip("two cards of NVIDIA's that reach each other's memory are needed")
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=member, args=(r, str(tmp_path / "group"))) for r in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
        assert rank.exitcode == 0
