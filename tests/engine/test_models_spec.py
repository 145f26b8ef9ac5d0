"""Families: config.json in the forms of transformers 4 and 5, and configurations that are wrong."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers.tiny_models import VARIANTS, model_path, reference

from trimaran.core.errors import ConfigError
from trimaran.core.models.registry import FAMILIES, decoder_spec
from trimaran.core.models.rope import cos_sin_table
from trimaran.core.models.spec import LayerGroup

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 1024,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
}


def qwen(**changes: Any) -> dict[str, Any]:
    return LLAMA | {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 64} | changes


def test_an_old_sparse_llama_config() -> None:
    """As Llama 1 and 2 were first saved: no kv heads, no head_dim, no rope keys, nulls."""
    spec = decoder_spec(LLAMA | {"rope_scaling": None, "head_dim": None})
    assert (spec.num_kv_heads, spec.head_dim, spec.rope.theta) == (4, 32, 10000.0)
    assert spec.rope.kind == "default"
    assert not (spec.tie_embeddings or spec.qkv_bias or spec.qk_norm)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_the_rope_table_is_that_of_transformers(variant: str) -> None:
    spec = decoder_spec(json.loads((model_path(variant) / "config.json").read_text()))
    rotary = reference(variant).model.rotary_emb
    cos, sin = rotary(torch.zeros(1), torch.arange(300).unsqueeze(0))
    half = spec.rope.dim // 2
    expected = torch.cat((cos[0, :, :half], sin[0, :, :half]), dim=-1)
    torch.testing.assert_close(cos_sin_table(spec.rope, 300), expected, rtol=0, atol=1e-6)


def test_scaled_rope_in_both_forms() -> None:
    scaling = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    }
    old = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}}
    new = LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    assert decoder_spec(old) == decoder_spec(new)
    assert decoder_spec(new).rope.kind == "llama3"
    oldest = LLAMA | {"rope_scaling": {"type": "linear", "factor": 4.0}}
    assert decoder_spec(oldest).rope.factor == 4.0


@pytest.mark.parametrize("key", [k for k in LLAMA if k != "architectures"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"lacks the required key '{key}'") as caught:
        decoder_spec({k: v for k, v in LLAMA.items() if k != key})
    assert caught.value.param == key


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": "128"}, "hidden_size='128' must be of type int"),
        ({"hidden_size": True}, "hidden_size=True must be of type int"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a finite"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"hidden_act": "relu2"}, "hidden_act='relu2' is not supported .supported: gelu"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type='dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling lacks the required key 'factor'"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' must be of type dict"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 must be of type bool"),
        ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM' must be of type"),
        ({"head_dim": 33}, "cannot turn 33 of 33 channels"),
        ({"partial_rotary_factor": 1.5}, "cannot turn 48 of 32 channels"),
    ],
)
def test_a_wrong_value_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        decoder_spec(LLAMA | change)


@pytest.mark.parametrize("names", [["GPT2LMHeadModel"], [], None])
def test_an_unknown_architecture_lists_the_known(names: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        decoder_spec(LLAMA | {"architectures": names})
    assert all(name in str(caught.value) for name in FAMILIES)


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        (qwen(), [None] * 4),
        (qwen(use_sliding_window=True, max_window_layers=3), [None, None, None, 64]),
        (qwen(use_sliding_window=True, max_window_layers=0), [64] * 4),
        (qwen(use_sliding_window=True, max_window_layers=28), [None] * 4),
        (
            qwen(
                use_sliding_window=True,
                layer_types=["sliding_attention", "full_attention"] * 2,
            ),
            [64, None, 64, None],
        ),
        (LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": 7}, [7] * 4),
        (LLAMA | {"architectures": ["MistralForCausalLM"], "sliding_window": None}, [None] * 4),
        (LLAMA | {"architectures": ["MistralForCausalLM"]}, [4096] * 4),
    ],
)
def test_sliding_windows(config: dict[str, Any], windows: list[int | None]) -> None:
    assert [layer.sliding_window for layer in decoder_spec(config).layers] == windows


@pytest.mark.parametrize(
    "types", [["full_attention"] * 3, ["full_attention"] * 3 + ["mamba"], ["sliding_attention"] * 4]
)
def test_layer_types_that_do_not_fit(types: list[str]) -> None:
    with pytest.raises(ConfigError, match="layer_types"):
        decoder_spec(qwen(layer_types=types))


def test_layers_of_one_window_share_a_cache_group() -> None:
    config = qwen(use_sliding_window=True, layer_types=["sliding_attention", "full_attention"] * 2)
    assert decoder_spec(config).cache_groups() == (
        LayerGroup("window_64", (0, 2), 64),
        LayerGroup("full", (1, 3), None),
    )


def test_qwen3_heads_are_128_wide_by_default() -> None:
    assert decoder_spec(LLAMA | {"architectures": ["Qwen3ForCausalLM"]}).head_dim == 128


@pytest.mark.parametrize(("ranks", "share"), [(1, (4, 2)), (2, (2, 1)), (4, (1, 1))])
def test_heads_on_ranks(ranks: int, share: tuple[int, int]) -> None:
    assert decoder_spec(LLAMA | {"num_key_value_heads": 2}).rank_heads(ranks) == share


@pytest.mark.parametrize("ranks", [3, 8])
def test_heads_that_do_not_divide(ranks: int) -> None:
    with pytest.raises(ConfigError, match=f"tensor_parallel_size={ranks}"):
        decoder_spec(LLAMA).rank_heads(ranks)
