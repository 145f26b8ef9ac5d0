"""Two platforms open in one process and serving at the same time, each as if it were alone."""

from __future__ import annotations

import asyncio
import threading

import pytest

from trimaran import LLM, AsyncEngine, SamplingParams
from trimaran.core.args import EngineArgs

NAMES = ("cpu", "strict")
PROMPTS = ["What is", "The capital of", "Write a", "1, 2, 3,", "Hello", "What is the"]
PARAMS = [SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)] * 3 + [
    SamplingParams(max_tokens=24, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(3)
]


def args(name: str) -> EngineArgs:
    return EngineArgs(platform=name, dtype="float32", max_model_len=64, max_num_seqs=4)


def tokens_of(llm: LLM) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in llm.generate(PROMPTS, PARAMS)]


@pytest.fixture(scope="module")
def alone() -> dict[str, list[list[int]]]:
    """Tokens of each platform with no other one open."""
    found = {}
    for name in NAMES:
        with LLM.from_engine_args(args(name)) as llm:
            found[name] = tokens_of(llm)
    return found


@pytest.mark.slow
def test_two_llms_generate_at_the_same_time_as_each_alone(
    alone: dict[str, list[list[int]]],
) -> None:
    together: dict[str, list[list[list[int]]]] = {name: [] for name in NAMES}
    both = threading.Barrier(len(NAMES), timeout=60)
    overlaps: list[bool] = []
    running = set[str]()

    def generate(name: str, llm: LLM) -> None:
        both.wait()
        running.add(name)
        for _ in range(2):
            together[name].append(tokens_of(llm))
            overlaps.append(len(running) == len(NAMES))
        running.discard(name)

    with LLM.from_engine_args(args("cpu")) as cpu, LLM.from_engine_args(args("strict")) as strict:
        threads = [
            threading.Thread(target=generate, args=pair)
            for pair in zip(NAMES, (cpu, strict), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=240)
    assert any(overlaps), "they did not run at the same time"
    assert together == {name: [alone[name]] * 2 for name in NAMES}


@pytest.mark.slow
async def test_two_async_engines_stream_at_the_same_time_as_each_alone(
    alone: dict[str, list[list[int]]],
) -> None:
    order: list[str] = []

    async def stream(name: str, engine: AsyncEngine, index: int) -> list[int]:
        last: list[int] = []
        async for output in engine.generate(PROMPTS[index], PARAMS[index]):
            order.append(name)
            last = list(output.outputs[0].token_ids)
        return last

    engines = [AsyncEngine.from_args(args(name), in_process=True) for name in NAMES]
    try:
        for engine in engines:
            await engine.start()
        found = await asyncio.gather(
            *(
                stream(name, engine, index)
                for name, engine in zip(NAMES, engines, strict=True)
                for index in range(len(PROMPTS))
            )
        )
    finally:
        for engine in engines:
            await engine.close()
    switches = sum(before != after for before, after in zip(order, order[1:], strict=False))
    assert switches > 2, "one was served after the other"
    assert found == [*alone["cpu"], *alone["strict"]]
