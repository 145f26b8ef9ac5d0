"""L0: an open device: memory and its accounts, the order of launches, copies, events, errors."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..platforms.interface import Capabilities, Device, DeviceOutOfMemory, Graph, KVRegion
from .base import Examination, Failed, Subject, expect
from .lab import fetch, on_device, opened

MIB = 1 << 20
POLL_FOR = 60.0  # seconds


def table(capabilities: Capabilities) -> Mapping[str, Examination]:
    return {
        "device/open": check_open,
        "device/alloc": check_alloc,
        "device/alloc_kv": check_alloc_kv,
        "device/memory": check_memory,
        "device/out of memory": check_out_of_memory,
        "device/order": check_order,
        "device/events": check_events,
        "device/errors": check_errors,
        "device/to_device": check_to_device,
        "device/to_host": check_to_host,
        "device/run_ahead": check_run_ahead,
        "device/move_blocks": check_move_blocks,
        "device/synchronize": check_synchronize,
        "device/close": check_close,
        "device/graph": check_replay if capabilities.graph_replay else check_no_graph,
    }


def equal(found: Tensor, expected: Tensor) -> bool:
    return found.shape == expected.shape and bool(torch.equal(found, expected))


def expect_raises(kind: type[Exception], call: Callable[[], Any], otherwise: str) -> None:
    try:
        call()
    except kind:
        return
    raise Failed(otherwise)


def adding_one(tensor: Tensor) -> Callable[[], None]:
    def work() -> None:
        tensor.add_(1)

    return work


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
                value = torch.randint(0, 2, shape).to(dtype)
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
    """An allocator may round up; by a quarter is too much."""
    now = device.memory().by_tag
    for tag, size in wanted.items():
        found = now.get(tag, 0) - before.get(tag, 0)
        said = f"{found} bytes under the tag {tag!r} where {size} are held"
        expect(size <= found <= size * 1.25, said)


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


def check_order(subject: Subject) -> None:
    """Launches run once each, in order, copies to the device among them."""
    with opened(subject) as device:
        ran: list[int] = []
        total = device.to_device(torch.zeros(1, dtype=torch.int64))
        events = []
        for i in range(40):
            step = device.to_device(torch.tensor([i]))

            def work(i: int = i, step: Tensor = step) -> None:
                ran.append(i)
                total.mul_(3).add_(step).remainder_(1_000_003)

            events.append(device.launch(work))
        for event in events:
            event.wait()
        expect(ran == list(range(40)), f"launched 0 to 39 in order, ran {ran}")
        expected = 0
        for i in range(40):
            expected = (expected * 3 + i) % 1_000_003
        (found,) = fetch(device, total)
        expect(int(found) == expected, "work of launches is not done in their order")


def check_events(subject: Subject) -> None:
    """An event is done no sooner than its launch's results are there, and then stays so."""
    with opened(subject) as device:
        matrix = device.to_device(torch.eye(256) * 0.5)
        for i in range(8):
            value = device.to_device(torch.full((256, 256), float(i)))
            copies: list[Tensor] = []

            def work(value: Tensor = value, copies: list[Tensor] = copies) -> None:
                for _ in range(8):
                    value = value @ matrix
                copies.append(device.to_host(value))

            event = device.launch(work)
            deadline = time.monotonic() + POLL_FOR
            while not event.done():
                expect(time.monotonic() < deadline, f"an event is not done after {POLL_FOR} s")
            right = bool(copies) and equal(copies[0], torch.full((256, 256), i * 0.5**8))
            expect(right, "event.done() before the launch's results have arrived")
            event.wait()
            event.wait()
            expect(event.done(), "an event that was waited for is not done")


class _Planted(Exception):
    """Raised by the work of a launch, to see where it arrives."""


def check_errors(subject: Subject) -> None:
    """What the work of a launch raises arrives at its event's wait, there alone, and the device
    goes on."""
    with opened(subject) as device:

        def fail() -> None:
            raise _Planted("planted")

        tensor = device.to_device(torch.zeros(4))
        before = device.launch(adding_one(tensor))
        broken = device.launch(fail)
        after = device.launch(adding_one(tensor))
        before.wait()
        expect_raises(
            _Planted, broken.wait, "an error raised in a launch is not raised by its event's wait"
        )
        after.wait()
        (found,) = fetch(device, tensor)
        expect(equal(found, torch.full((4,), 2.0)), "a failed launch disturbs its neighbours")


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


def check_run_ahead(subject: Subject) -> None:
    """As many launches in flight as it claims to take, on one tensor: each sees its own input."""
    ahead = subject.platform().capabilities(subject.device).run_ahead
    with opened(subject) as device:
        buffer = device.alloc((5000,), torch.float32, "conformance")
        staging = torch.empty(5000)
        for _ in range(5):
            copies: list[Tensor] = []
            events = []
            for i in range(ahead + 2):
                given = device.to_device(staging.fill_(i))

                def work(given: Tensor = given, copies: list[Tensor] = copies) -> None:
                    buffer.copy_(given).mul_(2)
                    copies.append(device.to_host(buffer))

                events.append(device.launch(work))
            staging.fill_(-7)
            for i, event in enumerate(events):
                event.wait()
                right = equal(copies[i], torch.full((5000,), 2.0 * i))
                expect(right, f"launch {i} of {len(events)} in flight sees another's input")


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


def check_synchronize(subject: Subject) -> None:
    """After it everything launched is done."""
    with opened(subject) as device:
        tensor = device.to_device(torch.zeros(1000))
        events = [device.launch(adding_one(tensor)) for _ in range(5)]
        device.synchronize()
        expect(all(event.done() for event in events), "synchronize() before the launches are done")
        right = equal(device.to_host(tensor), torch.full((1000,), 5.0))
        expect(right, "synchronize() before the launches' work is done")


def check_close(subject: Subject) -> None:
    """Closing twice is closing once, and another one can be opened afterwards."""
    for _ in range(2):
        with opened(subject) as device:
            fetch(device, device.to_device(torch.ones(3)))
            device.close()
            device.close()


def check_no_graph(subject: Subject) -> None:
    """Without graph replay, nothing is captured."""
    with opened(subject) as device:
        tensor = device.to_device(torch.zeros(3))
        captured = on_device(device, lambda: device.capture(adding_one(tensor)))
        expect(captured is None, "capture() returns a graph, although it claims no graph_replay")


def check_replay(subject: Subject) -> None:
    """A replayed graph computes from what its tensors hold now."""
    with opened(subject) as device:
        source, target = (device.alloc((300,), torch.float32, "conformance") for _ in range(2))

        def work() -> None:
            target.copy_(source).mul_(2).add_(1)

        first = device.to_device(torch.full((300,), 1.0))
        on_device(device, lambda: source.copy_(first))
        on_device(device, work)
        graph = on_device(device, lambda: device.capture(work))
        if not isinstance(graph, Graph):
            raise Failed(f"capture() returned {graph!r}, although it claims graph_replay")
        again: Graph = graph
        for i in range(4):
            given = device.to_device(torch.full((300,), 10.0 + i))

            def replay(given: Tensor = given) -> None:
                source.copy_(given)
                target.zero_()
                again.replay()

            on_device(device, replay)
            right = equal(fetch(device, target)[0], torch.full((300,), 21.0 + 2 * i))
            expect(right, "a replayed graph does not compute from what its tensors hold now")
