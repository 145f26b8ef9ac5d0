"""A full batch of decodes, step by step: how long the host works for a step, how long the device
idles, what is launched, and how the kernels' time compares with the bytes they must move."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import shapes
import torch
import workloads
from torch.profiler import ProfilerActivity, profile

from trimaran.core.config import EngineArgs
from trimaran.core.engine.engine import Engine
from trimaran.core.engine.inproc import QueueInbox
from trimaran.core.engine.messages import AddRequests, EngineRequest
from trimaran.core.executor import open_executor
from trimaran.core.resolve import resolve
from trimaran.core.sampling_params import SamplingParams
from trimaran.core.types import Prompt

from .engine import engine_args, limits_of
from .part import Bench, Found, Piece, Skip

LAUNCHES = ("LaunchKernel", "GraphLaunch", "MemcpyAsync", "MemsetAsync")
TOP = 12


class Handle:
    """A step whose result is waited for by asking: so the wait is told from the host's work."""

    def __init__(self, owner: Waits, inner: Any) -> None:
        self._owner, self._inner = owner, inner

    def done(self) -> bool:
        return bool(self._inner.done())

    def result(self) -> Any:
        start = time.perf_counter()
        while not self._inner.done():
            pass
        self._owner.waited += time.perf_counter() - start
        return self._inner.result()


class Waits:
    """An executor that adds up how long its steps were waited for."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self.description = executor.description
        self.waited = 0.0

    def submit(self, plan: Any) -> Handle:
        return Handle(self, self._executor.submit(plan))

    def close(self) -> None:
        self._executor.close()


@dataclass(frozen=True)
class Load:
    """`running` sequences of `prompt` tokens; `steps` are timed, twice, and `traced` recorded.
    `spare`: more tokens of each than that, for the steps in which others' prompts are computed."""

    running: int
    prompt: int
    steps: int
    traced: int
    spare: int
    warm: int = 12

    @property
    def output(self) -> int:
        return self.warm + 2 * self.steps + self.traced + self.spare


class Steady:
    """An engine in which every sequence of a load decodes."""

    def __init__(self, bench: Bench, load: Load) -> None:
        length = str(load.prompt + load.output + 32)
        args = engine_args(bench, max_model_len=length, max_num_seqs=load.running)
        config = resolve(EngineArgs(**args))
        self.load, self.inbox = load, QueueInbox()
        self.waits = Waits(open_executor(config))
        self.engine = Engine(config, self.waits, inbox=self.inbox, outbox=lambda message: None)
        self.vocab = shapes.SHAPES[bench.shape]["vocab_size"]

    def __enter__(self) -> Steady:
        params = SamplingParams(
            temperature=0.0, max_tokens=self.load.output, ignore_eos=True, seed=0
        )
        self.inbox.put(AddRequests([self._request(i, params) for i in range(self.load.running)]))
        self.engine.step()
        while not self._decoding():
            self.engine.step()
        for _ in range(self.load.warm):  # compiles and records this size
            self.engine.step()
        return self

    def _request(self, number: int, params: SamplingParams) -> EngineRequest:
        (tokens,) = workloads.batch_one(self.vocab, number, self.load.prompt, 1).prompts
        return EngineRequest(str(number), Prompt.of_tokens(tokens), params)

    def __exit__(self, *_: object) -> None:
        self.engine.close()

    def _decoding(self) -> bool:
        stats = self.engine.scheduler.stats()
        if not self.engine.has_work:
            raise RuntimeError(f"the load ended before all of it decoded: {stats}")
        full = stats.num_running == self.load.running
        return full and not stats.num_waiting and stats.last_step_tokens == self.load.running

    def timed(self) -> Found:
        """Medians over steps, in milliseconds."""
        steps, waits = [], []
        for _ in range(self.load.steps):
            before, start = self.waits.waited, time.perf_counter()
            self.engine.step()
            steps.append(time.perf_counter() - start)
            waits.append(self.waits.waited - before)
        if not self._decoding():
            raise RuntimeError("sequences ended, or waited, while steps were timed")
        works = [step - wait for step, wait in zip(steps, waits, strict=True)]
        return {
            "running": self.load.running,
            "step_ms": 1e3 * statistics.median(steps),
            "host_ms": 1e3 * statistics.median(works),
            "host_ms_most": 1e3 * max(works),
            "wait_ms": 1e3 * statistics.median(waits),
            "tok_s": self.load.running / statistics.median(steps),
        }

    def traced(self) -> Any:
        kinds = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            kinds.append(ProfilerActivity.CUDA)
        with profile(activities=kinds) as found:
            for _ in range(self.load.traced):
                self.engine.step()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        return found


def steady(bench: Bench) -> Iterator[Piece]:
    load = Load(4, 8, 8, 3, 32) if bench.tiny else Load(256, 512, 100, 20, 300)
    engine = bench.opened(lambda: Steady(bench, load))
    yield "host", lambda: _host(bench, engine)
    yield "trace", lambda: _trace(bench, engine)


def _host(bench: Bench, engine: Callable[[], Steady]) -> Found:
    """Everything of a step but waiting for the device. Where a step is computed on the host, that
    is in it, and `host_ms` is no figure of the engine's own work: `computes_on_host` says so."""
    found = engine().timed()
    limits, load = limits_of(bench), engine().load
    if limits is not None:
        context = load.prompt + load.warm + load.steps / 2
        most = limits.decode_tokens_per_second(load.running, context)
        found["percent_of_limit"] = 100 * found["tok_s"] / most
    return found | {"computes_on_host": not bench.on_card}


def _trace(bench: Bench, engine: Callable[[], Steady]) -> Found:
    one, limits = engine(), limits_of(bench)
    step_ms = one.timed()["step_ms"]
    events = one.traced().events()
    on_device = [event for event in events if event.device_type.name in ("CUDA", "HIP")]
    kinds = Counter(next((kind for kind in LAUNCHES if kind in event.name), "") for event in events)
    launches = {k: n / one.load.traced for k, n in kinds.items() if k}
    if not on_device:
        raise Skip(f"no work of a device in the profile of platform {bench.platform}")
    busy_ms = _union(on_device) / 1e3 / one.load.traced
    found = {
        "step_ms": step_ms,
        "device_busy_ms": busy_ms,
        "idle_share": max(0.0, 1 - busy_ms / step_ms),
        "launches_a_step": sum(launches.values()),
        "launches_by_kind": launches,
        "kernels_a_step": len(on_device) / one.load.traced,
        "top": _top(on_device, one.load.traced),
    }
    if limits is not None:
        context = one.load.prompt + one.load.warm + 1.5 * one.load.steps
        needed_ms = 1e3 * one.load.running
        needed_ms /= limits.decode_tokens_per_second(one.load.running, context)
        # No counter of the memory is read: at the measured bandwidth the kernels cannot have
        # moved more than this times what is needed.
        found |= {"bytes_needed_ms": needed_ms, "bytes_moved_at_most": busy_ms / needed_ms}
    return found


def _union(events: list[Any]) -> float:
    """Microseconds in which at least one of them ran."""
    total, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.time_range.start):
        start = max(event.time_range.start, end)
        total += max(0.0, event.time_range.end - start)
        end = max(end, event.time_range.end)
    return total


def _top(events: list[Any], steps: int) -> list[Found]:
    spent: Counter[str] = Counter()
    for event in events:
        spent[event.name] += event.time_range.end - event.time_range.start
    return [
        {"kernel": name[:120], "ms_a_step": us / 1e3 / steps} for name, us in spent.most_common(TOP)
    ]
