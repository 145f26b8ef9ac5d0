"""Token-exact against `transformers` with a GPU's kernels in every place where the hulls have one:
tiny models, fp32, through scheduler, runner and sampler."""

from __future__ import annotations

import random

import pytest
from helpers.engine_loop import Loop, greedy, open_loop
from helpers.generate_reference import Case, greedy_cases
from helpers.interpreted_gpu import REPLAYS

NUM_TOKENS = 10
GPU = "helpers.interpreted_gpu:InterpretedGpu"

pytestmark = pytest.mark.slow


def few_cases(model: str) -> tuple[Case, ...]:
    return greedy_cases(model, 64, 24)[::16]


def check(loop: Loop, cases: tuple[Case, ...], **options: random.Random) -> None:
    requests = [greedy(str(i), case.prompt, NUM_TOKENS) for i, case in enumerate(cases)]
    found = loop.run(requests, **options)
    for index, case in enumerate(cases):
        row = found[str(index), 0]
        assert row.error is None
        assert row.tokens == case.tokens[:NUM_TOKENS], f"prompt {index}: {len(case.prompt)} tokens"


@pytest.mark.parametrize("model", ["qwen3", "llama3", "mistral", "qwen3_moe"])
def test_mixed_batches(model: str, caplog: pytest.LogCaptureFixture) -> None:
    """Prompts in chunks beside requests that decode, in an order of their own; steps in which all
    decode are recorded, and replayed for any lengths."""
    REPLAYS.clear()
    with (
        caplog.at_level("INFO", "trimaran.ops"),
        open_loop(model, platform=GPU, max_num_batched_tokens=24, max_num_seqs=8) as loop,
    ):
        check(loop, few_cases(model), arrivals=random.Random(1))
    for op in ("attention", "rms_norm", "rope", "silu_mul", *(["moe"] if "moe" in model else [])):
        assert f"{op}: triton" in caplog.text
    assert len(REPLAYS) >= NUM_TOKENS // 2


def test_a_prefix_from_the_cache() -> None:
    with open_loop("qwen3", platform=GPU, max_num_batched_tokens=64) as loop:
        check(loop, few_cases("qwen3"))
        check(loop, few_cases("qwen3"))
