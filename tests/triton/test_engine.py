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

from trimaran.core.runner import recorded
from trimaran.kernels_cuda.portable import activation, cache, norm
from trimaran.platforms import gpu_fusion, gpu_weights

NUM_TOKENS = 10
GPU = "helpers.interpreted_gpu:InterpretedGpu"

DRAWS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.1, "min_p": 0.05},
)

pytestmark = pytest.mark.slow


def few_cases(model: str) -> tuple[Case, ...]:
    return greedy_cases(model, 64, 24)[::16]


def replays(loop: Loop) -> int:
    count: int = loop.executor.device.replays  # type: ignore[attr-defined]
    return count


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
    with (
        caplog.at_level("INFO", "trimaran"),
        open_loop(model, platform=GPU, max_num_batched_tokens=24, max_num_seqs=8) as loop,
    ):
        check(loop, few_cases(model), arrivals=random.Random(1))
        assert replays(loop) >= NUM_TOKENS // 2
    for op in ("attention", "rms_norm", "rope", "moe" if "moe" in model else "silu_mul"):
        assert f"{op}: triton" in caplog.text
    assert "not recorded" not in caplog.text


def test_a_prefix_from_the_cache() -> None:
    with open_loop("qwen3", platform=GPU, max_num_batched_tokens=64) as loop:
        check(loop, few_cases("qwen3"))
        check(loop, few_cases("qwen3"))


def test_one_launch_for_norms_rotation_and_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """And recordings whose tables become too narrow are made anew."""
    launches: Counter[str] = Counter()
    for name in ("write", "rope", "rope_write"):
        monkeypatch.setattr(cache, name, counted(launches, getattr(cache, name)))
    monkeypatch.setattr(recorded, "FIRST_REACH", 32)
    case = next(c for c in greedy_cases("qwen3", 64, 24) if len(c.prompt) == 31)
    with open_loop("qwen3", platform=GPU, enable_prefix_caching=False) as loop:
        check(loop, (case,))
        # One step is the prompt's, and one runs for each width; the second one is recorded.
        assert replays(loop) == NUM_TOKENS - 3
    layers, traces, run, captures = 3, 2, 3, 1
    assert launches["rope_write"] == layers * (run + captures)
    assert launches["write"] <= traces  # which compute one layer's


def test_recordings_have_no_more_tokens_than_a_step_has_room_for() -> None:
    """Five decode together where a step holds five: the next size would be eight."""
    cases = sorted(greedy_cases("qwen3", 64, 24), key=lambda case: len(case.prompt))[:5]
    with open_loop("qwen3", platform=GPU, max_num_seqs=5, max_num_batched_tokens=5) as loop:
        check(loop, tuple(cases))
        assert loop.largest_batch == 5
        assert replays(loop) > 0


def test_rows_draw_in_recordings() -> None:
    """The tokens that steps draw which run, beside greedy rows, by the same kernels."""
    cases = greedy_cases("qwen3", 64, 24)[::16]
    requests = [
        greedy(str(i), case.prompt, NUM_TOKENS, seed=i + 2**40, **params)
        for i, (case, params) in enumerate(zip(cases, DRAWS, strict=True))
    ]
    found = []
    for recording in (True, False):
        with open_loop("qwen3", platform=GPU, max_num_seqs=4) as loop:
            if not recording:
                loop.executor._rank.runner._recorded = None  # type: ignore[attr-defined]
            found.append(loop.run(requests))
            assert replays(loop) >= (NUM_TOKENS - 4 if recording else 0)
    for key, row in found[1].items():
        assert found[0][key].tokens == row.tokens


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
