"""Token-exact against `transformers` with a GPU's kernels in every place where the hulls have one:
tiny models, fp32, through scheduler, runner and sampler."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from helpers.engine_loop import Loop, greedy, open_loop
from helpers.generate_reference import Case, greedy_cases
from helpers.interpreted_gpu import REPLAYS

from trimaran.kernels_cuda.portable import activation, cache, norm
from trimaran.platforms import gpu_fusion, gpu_step, gpu_weights

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


def counted(calls: Counter[str], launch: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        calls[launch.__name__] += 1
        return launch(*args, **options)

    return call


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
    for op in ("attention", "rms_norm", "rope", "moe" if "moe" in model else "silu_mul"):
        assert f"{op}: triton" in caplog.text
    assert len(REPLAYS) >= NUM_TOKENS // 2


def test_a_prefix_from_the_cache() -> None:
    with open_loop("qwen3", platform=GPU, max_num_batched_tokens=64) as loop:
        check(loop, few_cases("qwen3"))
        check(loop, few_cases("qwen3"))


def test_one_launch_for_norms_rotation_and_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """And recordings whose tables become too narrow are made anew."""
    launches: Counter[str] = Counter()
    for name in ("write", "rope", "rope_write"):
        monkeypatch.setattr(cache, name, counted(launches, getattr(cache, name)))
    monkeypatch.setattr(gpu_step, "FIRST_WIDTH", 1)
    REPLAYS.clear()
    case = next(c for c in greedy_cases("qwen3", 64, 24) if len(c.prompt) == 31)
    with open_loop("qwen3", platform=GPU, enable_prefix_caching=False) as loop:
        check(loop, (case,))
    layers, steps = 3, NUM_TOKENS
    assert launches["rope_write"] >= layers * steps
    assert launches["write"] < layers  # the two traces compute one layer's
    assert len(REPLAYS) >= NUM_TOKENS - 5  # one that runs, one that is recorded, for each width


def test_recordings_have_no_more_tokens_than_a_step_has_room_for() -> None:
    """Five decode together where a step holds five: the next size would be eight."""
    cases = sorted(greedy_cases("qwen3", 64, 24), key=lambda case: len(case.prompt))[:5]
    with open_loop("qwen3", platform=GPU, max_num_seqs=5, max_num_batched_tokens=5) as loop:
        check(loop, tuple(cases))
        assert loop.largest_batch == 5


def test_norms_and_activations_round_for_int8_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens as where each linear layer rounds its input itself, by fewer launches."""
    cases = few_cases("qwen3")[:2]
    tokens, launches = [], []
    for fuse in (gpu_fusion.rounded_at_once, lambda graph, nodes: nodes):
        calls: Counter[str] = Counter()
        with monkeypatch.context() as patch:
            patch.setattr(gpu_fusion, "rounded_at_once", fuse)
            for module, name in (
                (gpu_weights, "quantize_tokens"),
                (norm, "rms_norm_quantized"),
                (activation, "gated_quantized"),
            ):
                patch.setattr(module, name, counted(calls, getattr(module, name)))
            with open_loop("qwen3", platform=GPU, quantization="int8") as loop:
                found = loop.run([greedy(str(i), case.prompt, 4) for i, case in enumerate(cases)])
        tokens.append([found[str(i), 0].tokens for i in range(len(cases))])
        launches.append(calls)
    fused, plain = launches
    assert tokens[0] == tokens[1] and all(len(one) == 4 for one in tokens[0])
    assert not plain["rms_norm_quantized"] and not plain["gated_quantized"]
    assert fused["rms_norm_quantized"] == 2 * fused["gated_quantized"] > 0
    assert plain["quantize_tokens"] == fused["quantize_tokens"] + 3 * fused["gated_quantized"]
