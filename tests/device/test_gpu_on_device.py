"""The GPU hulls on a real card; skipped with the probe's reason where there is none."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from trimaran.platforms.attention_reference import ReferenceAttention
from trimaran.platforms.attention_torch import TorchPagedAttention
from trimaran.platforms.cuda import CudaPlatform
from trimaran.platforms.gpu_ops import torch_ops
from trimaran.platforms.gpu_platform import GpuPlatform
from trimaran.platforms.interface import (
    AttentionBatch,
    AttentionSpec,
    Communicator,
    Device,
    DeviceOutOfMemory,
    GroupSpec,
    KVRegion,
    PackedWeight,
)
from trimaran.platforms.ops import DENSE, OPS
from trimaran.platforms.rocm import RocmPlatform

pytestmark = pytest.mark.device


@pytest.fixture(params=[CudaPlatform, RocmPlatform], ids=lambda cls: cls.name)
def platform(request: pytest.FixtureRequest) -> GpuPlatform:
    probe = request.param.probe()
    if probe.score == 0:
        pytest.skip(probe.reason)
    return request.param()  # type: ignore[no-any-return]


@pytest.fixture
def device(platform: GpuPlatform) -> Iterator[Device]:
    device = platform.open()
    yield device
    device.close()


def test_the_card_is_what_the_probe_said(platform: GpuPlatform, device: Device) -> None:
    info = platform.probe().devices[0]
    properties = torch.cuda.get_device_properties(device.torch_device)
    assert properties.name in info.name or info.name in properties.name
    memory = device.memory()
    assert abs(memory.total - info.memory) < 0.05 * info.memory and 0 < memory.free <= memory.total
    assert device.telemetry().memory_used is not None


def test_queued_launches_and_copies(device: Device) -> None:
    size = 1 << 22
    tensor = device.alloc((size,), torch.float32, tag="test").zero_()
    copies: list[torch.Tensor] = []
    events = []
    for step in range(20):
        host = torch.full((size,), float(step))
        there = device.to_device(host)
        host.fill_(-1e9)

        def work(there: torch.Tensor = there) -> None:
            tensor.add_(there)
            copies.append(device.to_host(tensor))

        events.append(device.launch(work))
    for step, event in enumerate(events):
        event.wait()
        assert (copies[step] == sum(range(step + 1))).all()


def test_graphs(device: Device) -> None:
    tensor = device.alloc((256,), torch.float32, tag="test").zero_()
    graphs: list[Any] = []
    device.launch(lambda: tensor.add_(1)).wait()
    device.launch(lambda: graphs.append(device.capture(lambda: tensor.add_(1)))).wait()
    for _ in range(10):
        device.launch(graphs[0].replay)
    device.synchronize()
    assert (device.to_host(tensor) == 11).all()


def test_blocks_move(device: Device) -> None:
    cache = device.alloc_kv((8, 16, 2, 64), torch.float16)
    cache.copy_(torch.arange(8.0).view(8, 1, 1, 1).expand(8, 16, 2, 64))
    region = KVRegion(cache, cache[0].numel() * 2, cache[0].numel() * 2)
    device.launch(lambda: device.move_blocks([region], [(0, 1), (1, 0), (2, 7)])).wait()
    assert device.to_host(cache)[:, 0, 0, 0].tolist() == [1, 0, 2, 3, 4, 5, 6, 2]


def test_no_room(device: Device) -> None:
    with pytest.raises(DeviceOutOfMemory):
        device.alloc((device.memory().total,), torch.float32, tag="test")
    device.alloc((4,), torch.float32, tag="test")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ops_agree_with_their_references(device: Device, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    angles = torch.randn(32, 32, generator=generator)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1)
    positions = torch.randint(0, 32, (1, 9), generator=generator)
    weight = random(48, 64)
    arguments: dict[str, tuple[Any, ...]] = {
        "rms_norm": (random(9, 64), random(64), 1e-5),
        "rope": (random(9, 4, 64), random(9, 2, 64), positions, table),
        "linear": (random(9, 64), PackedWeight(DENSE, (48, 64), (weight,)), None),
        **{op: (random(9, 128),) for op in ("silu_mul", "gelu_mul", "gelu_tanh_mul")},
    }
    for op, (impl,) in torch_ops().items():
        expected = OPS[op].reference(*arguments[op])
        found = impl(*(_there(device, argument) for argument in arguments[op]))
        tolerance = OPS[op].tolerance[dtype]
        for x, y in zip(_all(found), _all(expected), strict=True):
            torch.testing.assert_close(x.cpu(), y, rtol=tolerance.rtol, atol=tolerance.atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "extra",
    [{}, {"sliding_window": 20}, {"softcap": 3.0}, {"alibi_slopes": (0.5, 0.25, 0.125, 0.0625)}],
    ids=str,
)
def test_attention_agrees_with_the_reference(
    device: Device, dtype: torch.dtype, extra: dict[str, Any]
) -> None:
    spec = AttentionSpec(4, 2, 64, 0.125, dtype, dtype, 16, **extra)
    queries, lengths = [5, 1, 70, 1], [5, 90, 70, 17]
    starts = [sum(queries[:i]) for i in range(5)]
    tables = torch.randperm(24).add(1).view(4, 6).int()
    total = 4 * 96
    slots = (tables.long().unsqueeze(2) * 16 + torch.arange(16)).view(-1)
    query, key, value = (
        torch.randn(n, h, 64).to(dtype) for n, h in ((77, 4), (total, 2), (total, 2))
    )
    found = []
    for impl in (TorchPagedAttention(), ReferenceAttention()):
        kv = impl.alloc(device, spec, 25)
        there = [device.to_device(x) for x in (query, key, value, tables, slots)]
        device.synchronize()
        impl.write(there[1], there[2], kv, there[4])
        metadata = impl.plan(spec, AttentionBatch(starts, lengths, there[3], there[4][:77]))
        found.append(impl.run(there[0], kv, spec, metadata).float().cpu())
    tolerance = 2e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(found[0], found[1], rtol=tolerance, atol=tolerance)


def _there(device: Device, argument: Any) -> Any:
    if isinstance(argument, torch.Tensor):
        return argument.to(device.torch_device)
    if isinstance(argument, PackedWeight):
        tensors = tuple(_there(device, tensor) for tensor in argument.tensors)
        return PackedWeight(argument.format, argument.shape, tensors)
    return argument


def _all(result: Any) -> tuple[torch.Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def test_abort_ends_a_collective_that_nobody_else_joins(
    platform: GpuPlatform, tmp_path: Path
) -> None:
    """Two members in one process; the second one never comes to the collective."""
    indices = [info.index for info in platform.probe().devices]
    if len(indices) < 2 or not torch.distributed.is_nccl_available():
        pytest.skip("two cards, and a torch with NCCL, are needed")
    devices = [platform.open(index) for index in indices[:2]]

    def join(rank: int) -> Communicator:
        group = GroupSpec(rank, 2, f"file://{tmp_path}/group", timeout=300.0)
        return platform.communicator(group, devices[rank])

    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(join, (0, 1))
    tensor = devices[0].alloc((1024,), torch.float32, tag="test")
    event = devices[0].launch(lambda: None if first.all_reduce(tensor) is tensor else None)
    time.sleep(1.0)
    assert not event.done()
    first.abort()
    deadline = time.monotonic() + 30
    while not event.done():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    second.abort()
    for device in devices:
        device.close()
