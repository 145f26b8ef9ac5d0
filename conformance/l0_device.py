"""L0: an open device: its memory and the accounts of it, copies both ways, moves of blocks."""

from __future__ import annotations

import gc
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from ..platforms.interface import Capabilities, Device, DeviceOutOfMemory, KVRegion
from . import l0_launches
from .base import Examination, Subject, expect, expect_raises, refuse_foreign_members
from .lab import equal, fetch, on_device, opened

MIB = 1 << 20


def table(capabilities: Capabilities) -> Mapping[str, Examination]:
    return {
        "device/open": check_open,
        "device/alloc": check_alloc,
        "device/alloc_kv": check_alloc_kv,
        "device/memory": check_memory,
        "device/out of memory": check_out_of_memory,
        "device/order": l0_launches.check_order,
        "device/events": l0_launches.check_events,
        "device/errors": l0_launches.check_errors,
        "device/to_device": check_to_device,
        "device/to_host": check_to_host,
        "device/run_ahead": l0_launches.check_run_ahead,
        "device/move_blocks": check_move_blocks,
        "device/synchronize": l0_launches.check_synchronize,
        "device/close": l0_launches.check_close,
        "device/graph": l0_launches.check_replay
        if capabilities.graph_replay
        else l0_launches.check_no_graph,
    }


def check_open(subject: Subject) -> None:
    """Two can be open at once, of one platform; one that does not exist is a ValueError."""
    platform = subject.platform()
    known = [one.index for one in platform.probe().devices]
    other = next((one for one in known if one != subject.device), subject.device)
    with opened(subject, platform) as first:
        second = subject.platform().open(other, 1)
        try:
            for device, index in ((first, subject.device), (second, other)):
                expect(isinstance(device, Device), f"open() returned {device!r}")
                refuse_foreign_members(type(device), Device)
                expect(device.index == index, f"device {index} says that it is {device.index}")
            numbers = [torch.arange(50.0) + i for i in range(2)]
            there = [d.to_device(n) for d, n in zip((first, second), numbers, strict=True)]
            for device, tensor, number in zip((first, second), there, numbers, strict=True):
                (found,) = fetch(device, tensor)
                expect(equal(found, number), "two open devices disturb each other")
        finally:
            second.close()
    for wrong in (max(known) + 1, -1):
        expect_raises(
            ValueError,
            partial(platform.open, wrong, 1),
            f"open({wrong}) raises no ValueError, although there is no such device",
        )


def check_alloc(subject: Subject) -> None:
    """Memory of every shape and dtype, on the device, that holds what is written."""
    dtypes = (torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.uint8, torch.bool)
    generator = torch.Generator().manual_seed(subject.seed)
    with opened(subject) as device:
        for shape in ((), (0, 3), (1,), (3, 5), (129, 2, 7)):
            for dtype in dtypes:
                found = device.alloc(shape, dtype, "conformance")
                said = f"alloc({shape}, {dtype})"
                expect(tuple(found.shape) == shape, f"{said} has shape {tuple(found.shape)}")
                expect(found.dtype == dtype, f"{said} is of {found.dtype}")
                here = found.device.type == device.torch_device.type
                expect(here, f"{said} is on {found.device}, not {device.torch_device}")
                expect(found.is_contiguous(), f"{said} is not contiguous")
                value = torch.randint(0, 2, shape, generator=generator).to(dtype)
                source = device.to_device(value)
                on_device(device, partial(found.copy_, source))
                expect(equal(fetch(device, found)[0], value), f"{said} does not keep its content")


def check_alloc_kv(subject: Subject) -> None:
    """KV memory is zeroed, also where it had been used."""
    with opened(subject) as device:
        for _ in range(3):
            for size in (MIB, 40, 3 * MIB):
                cache = device.alloc_kv((2, size // 8), torch.float32)
                (found,) = fetch(device, cache)
                expect(not found.any() and not found.isnan().any(), "alloc_kv is not zeroed")
                used = device.alloc((2, size // 8), torch.float32, "conformance")
                on_device(device, partial(cache.fill_, 7))
                on_device(device, partial(used.fill_, 7))
                del cache, used, found
                gc.collect()


def check_memory(subject: Subject) -> None:
    """Accounts by tag: they rise with what is allocated and fall when it ends."""
    with opened(subject) as device:
        start = device.memory()
        plausible = start.total > 0 and 0 <= start.free <= start.total
        expect(plausible, f"memory(): {start.free} bytes free of {start.total}")

        class Owner:
            """Stands for a library's object."""

        held = [
            device.alloc((MIB,), torch.float32, "first"),
            device.alloc((MIB,), torch.int8, "first"),
            device.alloc((3 * MIB,), torch.uint8, "second"),
            device.alloc_kv((2, MIB), torch.bfloat16),
        ]
        owner = Owner()
        device.account(owner, 5 * MIB, "library")
        wanted = {"first": 5 * MIB, "second": 3 * MIB, "kv": 4 * MIB, "library": 5 * MIB}
        _expect_bytes(device, start.by_tag, wanted)
        del held[0], held[-1], owner
        gc.collect()
        wanted |= {"first": MIB, "kv": 0, "library": 0}
        _expect_bytes(device, start.by_tag, wanted)
        held.clear()
        gc.collect()
        _expect_bytes(device, start.by_tag, dict.fromkeys(wanted, 0))


def _expect_bytes(device: Device, before: Mapping[str, int], wanted: Mapping[str, int]) -> None:
    """What was asked for, whatever an allocator makes of it."""
    now = device.memory().by_tag
    for tag, size in wanted.items():
        found = now.get(tag, 0) - before.get(tag, 0)
        expect(found == size, f"{found} bytes under the tag {tag!r} where {size} are held")


def check_out_of_memory(subject: Subject) -> None:
    """More than there is raises DeviceOutOfMemory, and the device goes on."""
    with opened(subject) as device:
        size = 64 * max(device.memory().total, 1 << 40)
        expect_raises(
            DeviceOutOfMemory,
            lambda: device.alloc((size,), torch.uint8, "huge"),
            f"alloc of {size} bytes raises no DeviceOutOfMemory",
        )
        expect(not device.memory().by_tag.get("huge"), "what was refused stands in the accounts")
        (found,) = fetch(device, device.to_device(torch.ones(3)))
        expect(equal(found, torch.ones(3)), "after running out of memory the device computes wrong")


def check_to_device(subject: Subject) -> None:
    """The copy is of the moment of the call: the host may write to its tensor at once."""
    with opened(subject) as device:
        for size in (1, 1000, MIB):
            staging = torch.empty(size)
            copies = []
            for i in range(4):
                copies.append(device.to_device(staging.fill_(i)))
            staging.fill_(-1)
            for i, found in enumerate(fetch(device, *copies)):
                right = equal(found, torch.full((size,), float(i)))
                expect(right, "to_device sees what the host wrote after the call")
        transposed = torch.arange(12).view(3, 4).t()
        (found,) = fetch(device, device.to_device(transposed))
        expect(equal(found, transposed), "to_device of a transposed tensor")


def check_to_host(subject: Subject) -> None:
    """The copy is of the moment of the call, inside a launch and after all of them."""
    with opened(subject) as device:
        tensor = device.to_device(torch.zeros(70_000))
        copies: list[Tensor] = []

        def work() -> None:
            for _ in range(3):
                copies.append(device.to_host(tensor))
                tensor.add_(1)

        device.launch(work).wait()
        copies.append(device.to_host(tensor))
        on_device(device, lambda: tensor.fill_(-1))
        for i, found in enumerate(copies):
            right = equal(found, torch.full((70_000,), float(i)))
            expect(right, f"to_host number {i}: not the value at the call, but {float(found[0])}")


PAIRS: Mapping[str, list[tuple[int, int]]] = {
    "none": [],
    "one": [(1, 4)],
    "a chain": [(0, 1), (1, 2), (2, 3)],
    "a chain backwards": [(2, 3), (1, 2), (0, 1)],
    "a cycle": [(0, 5), (5, 3), (3, 0)],
    "one source twice": [(6, 1), (6, 2)],
    "onto itself": [(2, 2)],
    "many": [(i, (i + 3) % 9) for i in range(9)],
}


def check_move_blocks(subject: Subject) -> None:
    """Blocks move whole, as if all were read before any is written, and nothing else changes."""
    with opened(subject) as device:
        for dtype in (torch.float32, torch.bfloat16):
            for name, pairs in PAIRS.items():
                wide = device.alloc_kv((9, 2, 12), dtype)  # blocks of 24 elements, and of 12 in 24
                small = device.alloc_kv((9, 7), dtype)
                values = [
                    torch.arange(one.numel()).view(one.shape).to(dtype) for one in (wide, small)
                ]
                given = [device.to_device(one) for one in values]
                size = dtype.itemsize
                regions = [
                    KVRegion(wide[:, 1], 24 * size, 12 * size),
                    KVRegion(small, 7 * size, 7 * size),
                ]

                def work(
                    pairs: list[tuple[int, int]] = pairs,
                    into: tuple[Tensor, Tensor] = (wide, small),
                    given: list[Tensor] = given,
                    regions: list[KVRegion] = regions,
                ) -> None:
                    for target, value in zip(into, given, strict=True):
                        target.copy_(value)
                    device.move_blocks(regions, pairs)

                on_device(device, work)
                expected = [one.clone() for one in values]
                for source, target in pairs:
                    expected[0][target, 1] = values[0][source, 1]
                    expected[1][target] = values[1][source]
                right = all(map(equal, fetch(device, wide, small), expected))
                expect(right, f"move_blocks of {name}", case=f"pairs = {pairs}, {dtype}")
