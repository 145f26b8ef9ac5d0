"""Time of a call on the device, and what the card really gives: the roofline that was measured."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from canary import moved

from trimaran.core.platform import make_platform

from .part import Bench, Found, Piece

FLUSH_BYTES = 512 << 20  # beyond the last cache of any card
ROUNDS, TINY_ROUNDS = 50, 2


class Clock:
    """An open device of the platform, and the time of calls on it with caches flushed."""

    def __init__(self, bench: Bench) -> None:
        self.platform = make_platform(bench.platform)
        self.device = self.platform.open(0)
        self.torch_device = self.device.torch_device
        self.rounds = TINY_ROUNDS if bench.tiny else ROUNDS
        self._on_card = bench.on_card
        size = FLUSH_BYTES if bench.on_card else 1 << 20
        self._flush = torch.empty(size, dtype=torch.int8, device=self.torch_device)

    @classmethod
    @contextlib.contextmanager
    def open(cls, bench: Bench) -> Iterator[Clock]:
        clock = cls(bench)
        try:
            yield clock
        finally:
            clock.device.close()

    def do(self, work: Callable[[], Any]) -> Any:
        """What `work` returns, from inside a launch that is over."""
        kept: list[Any] = []
        self.device.launch(lambda: kept.append(work())).wait()
        return kept[0]

    def time(self, call: Callable[[], Any], rounds: int | None = None) -> Found:
        """Seconds: median and range over `rounds`. On a card between two events around the replay
        of a recording, so that no launch on the host is in it; `by` says so where it is else."""
        for _ in range(2):  # compiles, and fills what is allocated once
            self.device.launch(call).wait()
        rounds = rounds or self.rounds
        if not self._on_card:
            return _spread([self._host_seconds(call) for _ in range(rounds)], "host clock")
        run, by = self._recorded(call)
        events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(rounds)]

        def work() -> None:
            for start, end in events:
                self._flush.zero_()  # takes the card longer than the host takes to launch the rest
                start.record()
                run()
                end.record()

        self.do(work)
        self.device.synchronize()
        return _spread([start.elapsed_time(end) / 1e3 for start, end in events], by)

    def _recorded(self, call: Callable[[], Any]) -> tuple[Callable[[], Any], str]:
        try:
            graph = self.do(lambda: self.device.capture(call))
        except RuntimeError as error:  # what waits for the host cannot be recorded
            return call, f"launches: not recorded: {str(error).splitlines()[0]}"
        return (call, "launches") if graph is None else (graph.replay, "recording")

    def _host_seconds(self, call: Callable[[], Any]) -> float:
        self._flush.zero_()
        start = time.perf_counter()
        self.device.launch(call).wait()
        return time.perf_counter() - start


def _spread(seconds: list[float], by: str) -> Found:
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "by": by,
    }


def measure_rates(clock: Clock, tiny: bool) -> Found:
    """GB/s of the better of a long read and a long copy; GFLOP/s of torch's bf16 product, of the
    best of some sizes. Medians, as everything that is compared with them."""
    count = (1 << 20) if tiny else (1 << 30)
    source, target = torch.zeros(2, count, dtype=torch.float32, device=clock.torch_device)
    read = source.nbytes / clock.time(source.sum, 5)["seconds"] / 1e9
    copied = 2 * source.nbytes / clock.time(lambda: target.copy_(source), 5)["seconds"] / 1e9
    rates = {}
    for size in (128,) if tiny else (4096, 8192, 16384):
        a, b = torch.randn(2, size, size, device=clock.torch_device).bfloat16()
        seconds = clock.time(lambda a=a, b=b: F.linear(a, b), 10)["seconds"]
        rates[str(size)] = 2 * size**3 / seconds / 1e9
    best = {"read_gb_s": max(read, copied), "gemm_gflop_s": max(rates.values())}
    return best | {"sum_gb_s": read, "copy_gb_s": copied, "gflop_s_by_size": rates}


def canary(bench: Bench) -> Iterator[Piece]:
    """`rates` is what all percentages are of; `steady`: the same again, and how far it moved."""
    clock = bench.opened(lambda: Clock.open(bench))
    yield "rates", lambda: measure_rates(clock(), bench.tiny)
    yield "steady", partial(_again, bench, clock)


def _again(bench: Bench, clock: Callable[[], Clock]) -> Found:
    before, after = bench.rates(), measure_rates(clock(), bench.tiny)
    two = [{key: one[key] for key in ("read_gb_s", "gemm_gflop_s")} for one in (before, after)]
    return after | {"moved_more_than_5_percent": moved(*two)}
