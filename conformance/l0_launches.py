"""L0: launches of an open device: their order, events, errors, synchronisation, recorded graphs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..core.ops import OpBinder
from ..platforms.interface import Device, Event, Graph
from .base import Failed, Subject, expect, expect_raises, refuse_foreign_members
from .lab import adding_one, equal, fetch, on_device, opened

POLL_FOR = 60.0  # seconds


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
            expect(isinstance(event, Event), f"launch() returned {event!r}")
            refuse_foreign_members(type(event), Event)
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
    """A replayed graph (moves, then a linear) computes from what its tensors hold now."""
    with opened(subject) as device:
        source, target = (device.alloc((300,), torch.float32, "conformance") for _ in range(2))

        def work() -> None:
            target.copy_(source).mul_(2).add_(1)

        for given, found in _replayed(device, work, source, target):
            right = equal(found, 2 * given + 1)
            expect(right, "a replayed graph does not compute from what its tensors hold now")
    with opened(subject) as device:
        rows = device.alloc((4, 64), torch.float32, "conformance")
        product = device.alloc((4, 64), torch.float32, "conformance")
        weight = device.to_device(torch.eye(64) * 2)
        device.synchronize()
        binder = OpBinder(subject.platform(), device)
        linear = binder.bind("linear", torch.float32, in_features=64, out_features=64)
        packed = binder.pack(weight)

        def multiply() -> None:
            product.copy_(linear(rows, packed, None))

        for given, found in _replayed(device, multiply, rows, product):
            right = equal(found, 2 * given)
            expect(right, "a replayed linear does not compute from what its tensors hold now")


def _replayed(
    device: Device, work: Callable[[], None], source: Tensor, target: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """`work` recorded once, which makes `target` of `source`: several values of the one, each with
    what a replay made of it."""
    values = [torch.full(source.shape, float(value)) for value in (1, 10, 11, 12, 13)]
    first = device.to_device(values[0])
    on_device(device, lambda: source.copy_(first))
    on_device(device, work)
    graph = on_device(device, lambda: device.capture(work))
    if not isinstance(graph, Graph):
        raise Failed(f"capture() returned {graph!r}, although it claims graph_replay")
    refuse_foreign_members(type(graph), Graph)
    again: Graph = graph
    for value in values[1:]:
        given = device.to_device(value)

        def replay(given: Tensor = given) -> None:
            source.copy_(given)
            target.zero_()
            again.replay()

        on_device(device, replay)
        yield value, fetch(device, target)[0]
