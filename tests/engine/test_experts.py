"""Models with experts: what reads their weights, how these are quantized, split and refused."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
import torch
from helpers.decoder_harness import Harness
from helpers.engine_loop import greedy, open_loop
from helpers.native import needs_native
from helpers.tiny_models import model_path, prompt

from trimaran.core.errors import ConfigError
from trimaran.core.models.experts import SparseMLP
from trimaran.core.models.registry import decoder_spec
from trimaran.kernels_cpu.library import library
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.strict import StrictPlatform


def config(variant: str, **changes: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((model_path(variant) / "config.json").read_text())
    return found | changes


def sparse(one: Harness, layer: int = 0) -> SparseMLP:
    found = one.decoder.layers[layer].feed_forward
    assert isinstance(found, SparseMLP)
    return found


# -- specs ---------------------------------------------------------------------------------------


def test_configurations_of_both_transformers_are_read() -> None:
    saved = config("qwen3_moe")
    older = {key: value for key, value in saved.items() if key != "num_local_experts"}
    assert decoder_spec(saved) == decoder_spec(older | {"num_experts": 12})
    spec = decoder_spec(config("qwen3_moe", decoder_sparse_step=2, mlp_only_layers=[1]))
    assert [layer.feed_forward for layer in spec.layers] == ["gated"] * 3
    spec = decoder_spec(config("qwen3_moe", use_sliding_window=True, sliding_window=17))
    assert {layer.sliding_window for layer in spec.layers} == {17}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts_per_tok": 13}, "num_experts_per_tok=13 is more than the 12 experts"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"moe_intermediate_size": None}, "'moe_intermediate_size'"),
        ({"mlp_only_layers": [-1]}, "mlp_only_layers=.* integers of at least 0"),
    ],
)
def test_a_bad_configuration_is_told(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        decoder_spec(config("qwen3_moe", **changes))


def test_ranks_that_do_not_divide_the_experts_are_refused() -> None:
    spec = decoder_spec(config("qwen3_moe", moe_intermediate_size=97))
    assert spec.rank_heads(1) == (4, 2)
    with pytest.raises(ConfigError, match="tensor_parallel_size=2 .* experts of 97"):
        spec.rank_heads(2)


# -- weights -------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("quantization", [None, "int8", "int4", "w4a16"])
def test_experts_are_read_as_they_are_packed_and_the_router_is_kept(
    quantization: str | None,
) -> None:
    one = Harness(CpuPlatform(), model_path("qwen3_moe"), quantization=quantization)
    layer = sparse(one)
    format = f"native_{quantization}" if quantization else "native"
    assert layer.gate_up.packed.format == layer.down.packed.format == format
    assert layer.gate_up.packed.shape == (12 * 2 * 96, 128)
    assert layer.down.packed.shape == (12 * 128, 96)
    assert layer.router.packed.format == "native"
    chosen = {binding.op: binding.chosen for binding in one.binder.report()}
    assert chosen["moe"] == "native"
    one.close()


@needs_native
def test_where_one_weight_cannot_be_in_int4_both_are_in_int8() -> None:
    one = Harness(CpuPlatform(), model_path("qwen3_moe_mixed"), quantization="int4")
    layer = sparse(one)  # experts of 80: no multiple of 32
    assert layer.gate_up.packed.format == layer.down.packed.format == "native_int8"
    one.close()


def test_a_platform_without_experts_by_codes_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "trimaran.ops"):
        one = Harness(StrictPlatform(), model_path("mixtral"), length=32, quantization="int8")
    assert sparse(one).down.packed.format == "dense"
    assert "does not multiply by int8 weights" in caplog.text
    one.close()


@needs_native
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe"])
def test_by_codes_a_layer_stays_near_their_values(variant: str, quantization: str) -> None:
    """`strict` multiplies by what the codes stand for; here activations are rounded besides."""
    x = torch.randn(61, 128, generator=torch.Generator().manual_seed(0))
    found = []
    for platform in (StrictPlatform(), CpuPlatform()):
        one = Harness(platform, model_path(variant), quantization=quantization)
        found.append(sparse(one)(x).clone())
        one.close()
    error = float((found[1] - found[0]).norm() / found[0].norm())
    assert 1e-4 < error < 0.02, "rounded, by steps of a 127th"


# -- steps ---------------------------------------------------------------------------------------


@needs_native
def test_a_step_with_experts_is_one_native_program() -> None:
    native = library()
    with open_loop("qwen3_moe", platform="cpu", block_size=16) as loop:
        before = native.count("moe", native.isa), native.count("silu_mul", native.isa)
        loop.run([greedy("a", list(range(5, 25)), 4)])
        after = native.count("moe", native.isa), native.count("silu_mul", native.isa)
    assert after[0] - before[0] == 3 * 4, "layers times steps"
    assert after[1] == before[1]


@needs_native
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_any_number_of_tokens_and_of_threads_gives_the_same(quantization: str | None) -> None:
    """Prompts in one step and in chunks, by one thread and by three."""
    prompts = [prompt(length, 60 + length) for length in (3, 40, 77)]
    found = []
    for threads, tokens in ((1, 256), (3, 256), (1, 19)):
        options: dict[str, Any] = {"num_threads": threads, "max_num_batched_tokens": tokens}
        options["max_num_seqs"] = 4
        with open_loop(
            "mixtral", platform="cpu", block_size=16, quantization=quantization, **options
        ) as loop:
            rows = loop.run([greedy(str(i), ids, 12) for i, ids in enumerate(prompts)])
            found.append([rows[str(i), 0].tokens for i in range(len(prompts))])
    torch.set_num_threads(1)
    assert found[0] == found[1] == found[2]
