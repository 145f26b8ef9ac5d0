"""The simulated capture is as blind as a card's: else what is replayed on it proves little."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.simulated_capture import CaptureError, RecordingDevice, SimulatedGraph, launch
from torch import Tensor


@pytest.fixture
def device() -> Iterator[RecordingDevice]:
    device = RecordingDevice(0, 0.0)
    yield device
    device.close()


def record(device: RecordingDevice, work: Callable[[], object]) -> SimulatedGraph:
    found: list[SimulatedGraph] = []
    device.launch(lambda: found.append(device.capture(work))).wait()
    return found[0]


def replay(device: RecordingDevice, graph: SimulatedGraph) -> None:
    device.launch(graph.replay).wait()


def test_recording_computes_nothing_and_a_replay_computes_anew(device: RecordingDevice) -> None:
    source, target = torch.ones(3), torch.zeros(3)
    graph = record(device, lambda: target.copy_(source * 2 + torch.arange(3)))
    assert target.tolist() == [0, 0, 0]
    for value in (1.0, 5.0):
        source.fill_(value)
        replay(device, graph)
        assert target.tolist() == [2 * value, 2 * value + 1, 2 * value + 2]
    assert (device.captures, device.replays) == (1, 2)


def test_what_the_host_decided_stays(device: RecordingDevice) -> None:
    """A number, a shape and a view are the ones of the recording."""
    source, target = torch.arange(4.0), torch.zeros(4)
    settings = {"scale": 2.0, "first": 1}

    def work() -> None:
        target.zero_()
        target[settings["first"] :].copy_(source[settings["first"] :] * settings["scale"])

    graph = record(device, work)
    settings.update(scale=10.0, first=0)
    replay(device, graph)
    assert target.tolist() == [0, 2, 4, 6]


def test_in_place_out_and_several_results(device: RecordingDevice) -> None:
    source, values, ids = torch.tensor([3.0, 9.0, 4.0]), torch.zeros(2), torch.zeros(2).long()

    def work() -> None:
        top, where = (source + 1).topk(2)
        torch.add(top, 1, out=values)
        ids.copy_(where)
        ids.add_(10)

    graph = record(device, work)
    replay(device, graph)
    assert values.tolist() == [11, 6] and ids.tolist() == [11, 12]


def test_a_kernel_reads_values_at_each_replay(device: RecordingDevice) -> None:
    count, target = torch.tensor(2), torch.zeros(4)

    def kernel(target: Tensor, count: Tensor) -> None:
        target[: int(count)] += 1

    graph = record(device, lambda: launch(kernel, target, count=count))
    assert target.tolist() == [0, 0, 0, 0]
    replay(device, graph)
    count.fill_(1)
    replay(device, graph)
    assert target.tolist() == [2, 1, 0, 0]


READS: dict[str, Callable[[Tensor], object]] = {
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool((x > 0).any()),
    "int": lambda x: int(x.sum()),
    "index": lambda x: [1, 2, 3][x[0].long()],
    "numpy": lambda x: x.numpy(),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "from the host": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
}


@pytest.mark.parametrize("read", READS)
def test_values_do_not_travel_while_recording(device: RecordingDevice, read: str) -> None:
    source = torch.ones(3)
    with pytest.raises(CaptureError):
        record(device, lambda: READS[read](source * 1))
    graph = record(device, lambda: source.add_(1))  # and the device goes on
    replay(device, graph)
    assert source.tolist() == [2, 2, 2]


def test_copies_by_the_device_are_refused_while_recording(device: RecordingDevice) -> None:
    source = torch.ones(3)
    for copy in (device.to_host, device.to_device):
        with pytest.raises(CaptureError):
            record(device, lambda copy=copy: copy(source))
    with pytest.raises(RuntimeError, match="outside a launch"):
        device.capture(lambda: None)


def test_memory_that_was_freed_is_noticed(device: RecordingDevice) -> None:
    """What a recording reads it does not keep alive."""
    target, passing = torch.zeros(3), [torch.ones(3)]
    graph = record(device, lambda: target.copy_(passing[0]))
    replay(device, graph)
    assert target.tolist() == [1, 1, 1]
    passing.clear()
    with pytest.raises(CaptureError, match="freed"):
        replay(device, graph)


def test_what_was_made_while_recording_holds_poison_after_a_replay(
    device: RecordingDevice,
) -> None:
    source, made = torch.ones(3), list[Tensor]()
    graph = record(device, lambda: made.append(source * 3))
    assert made[0].isnan().all()
    replay(device, graph)
    assert made[0].isnan().all()
