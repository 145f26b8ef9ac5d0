"""The engine without its process: a scheduler and an executor in the smallest possible loop."""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from helpers import tiny_models

from trimaran.conformance.engines import Found
from trimaran.core.config import EngineArgs, EngineConfig
from trimaran.core.engine.messages import BeamOutput, EngineRequest, SequenceOutput
from trimaran.core.executor import Executor, open_executor
from trimaran.core.plan import StepOutput, StepPlan
from trimaran.core.resolve import resolve
from trimaran.core.sampling_params import BeamSearchParams, SamplingParams
from trimaran.core.scheduler import Scheduler
from trimaran.core.types import Prompt

MAX_STEPS = 5_000


class Loop:
    """Runs requests to their end, with as many steps in flight as the configuration says."""

    def __init__(self, config: EngineConfig, executor: Executor | None = None) -> None:
        self.config = config
        self.executor = executor or open_executor(config)
        self.scheduler = Scheduler(config.scheduler, config.cache)
        self.beams: dict[str, BeamOutput] = {}
        self.largest_batch = 0
        self._in_flight: deque[tuple[StepPlan, Any]] = deque()
        self.found: dict[tuple[str, int], Found] = {}

    def run(
        self, requests: Iterable[EngineRequest], *, arrivals: random.Random | None = None
    ) -> dict[tuple[str, int], Found]:
        """(request id, child index) → what it yielded. `arrivals`: requests come in random order,
        a few between steps; otherwise all at once."""
        waiting = list(requests)
        if arrivals is not None:
            arrivals.shuffle(waiting)
        self.found = {}
        for _ in range(MAX_STEPS):
            count = len(waiting) if arrivals is None else min(len(waiting), arrivals.randint(0, 3))
            for _ in range(count):
                self.scheduler.add(waiting.pop(0))
            self.step()
            if not (waiting or self.busy):
                return self.found
        raise AssertionError(f"unfinished after {MAX_STEPS} steps")

    @property
    def busy(self) -> bool:
        return bool(self._in_flight) or self.scheduler.has_work

    def step(self) -> None:
        plan = self.scheduler.schedule()
        if not plan.empty:
            self.largest_batch = max(self.largest_batch, len(plan.rows))
            self._in_flight.append((plan, self.executor.submit(plan)))
            if len(self._in_flight) <= self.config.scheduler.run_ahead:
                return
        if self._in_flight:
            oldest, handle = self._in_flight.popleft()
            self._take(*self.scheduler.update(oldest, self._result(handle)))

    def _result(self, handle: Any) -> StepOutput:
        return handle.result()

    def _take(self, outputs: list[SequenceOutput], beams: list[BeamOutput]) -> None:
        for output in outputs:
            found = self.found.setdefault((output.request_id, output.index), Found())
            assert found.finish_reason is None, f"output after the end of {output.request_id}"
            found.tokens += output.token_ids
            found.logprobs += output.logprobs or []
            found.prompt_logprobs += output.prompt_logprobs or []
            found.finish_reason = output.finish_reason
            found.error = output.error
            found.num_cached = max(found.num_cached, output.num_cached)
            found.num_preemptions = max(found.num_preemptions, output.num_preemptions)
        self.beams.update((beam.request_id, beam) for beam in beams)

    def close(self) -> None:
        self.executor.close()


@contextmanager
def open_loop(variant: str, **args: Any) -> Iterator[Loop]:
    """A loop over a tiny model in fp32; `args` are fields of EngineArgs."""
    values: dict[str, Any] = {
        "model": str(tiny_models.model_path(variant)),
        "dtype": "float32",
        "max_model_len": "256",
        "max_num_seqs": 64,
        "kv_cache_memory_bytes": "64M",
        # A second thread gains nothing on models this small, and spins where cores are shared.
        "num_threads": 1,
    }
    loop = Loop(resolve(EngineArgs(**(values | args))))
    try:
        yield loop
    finally:
        loop.close()


def greedy(request_id: str, prompt: Sequence[int], count: int, **params: Any) -> EngineRequest:
    """A greedy request for exactly `count` tokens."""
    values: dict[str, Any] = {
        "temperature": 0.0,
        "max_tokens": count,
        "ignore_eos": True,
        "seed": 0,
    }
    return EngineRequest(
        request_id=request_id,
        prompt=Prompt.of_tokens(list(prompt)),
        params=SamplingParams(**(values | params)),
        eos_token_ids=[2],
    )


def beam(request_id: str, prompt: Sequence[int], params: BeamSearchParams) -> EngineRequest:
    request = greedy(request_id, prompt, params.max_tokens)
    return dataclasses.replace(request, beam=params)
