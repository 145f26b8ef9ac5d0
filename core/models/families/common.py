"""What the families share: the keys and the tensor names that Llama set and others kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...errors import ConfigError
from ..fields import Fields
from ..rope import read_rope
from ..spec import DecoderSpec, ExpertsSpec, LayerSpec, WeightNames

ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu_mul",
    "swish": "silu_mul",
    "gelu": "gelu_mul",
    "gelu_new": "gelu_tanh_mul",
    "gelu_pytorch_tanh": "gelu_tanh_mul",
}
"""`hidden_act` → the op on a gate beside its up projection."""


def _is_rope_buffer(name: str) -> bool:
    """Checkpoints from before transformers 4.33 saved the rope's inverse frequencies."""
    return name.endswith("rotary_emb.inv_freq")


NAMES = WeightNames(
    top={"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
    layer={
        "input_norm": "model.layers.{layer}.input_layernorm",
        "post_norm": "model.layers.{layer}.post_attention_layernorm",
        "q_proj": "model.layers.{layer}.self_attn.q_proj",
        "k_proj": "model.layers.{layer}.self_attn.k_proj",
        "v_proj": "model.layers.{layer}.self_attn.v_proj",
        "o_proj": "model.layers.{layer}.self_attn.o_proj",
        "q_norm": "model.layers.{layer}.self_attn.q_norm",
        "k_norm": "model.layers.{layer}.self_attn.k_norm",
        "gate_proj": "model.layers.{layer}.mlp.gate_proj",
        "up_proj": "model.layers.{layer}.mlp.up_proj",
        "down_proj": "model.layers.{layer}.mlp.down_proj",
    },
    ignored=_is_rope_buffer,
)


def read_decoder(
    config: Fields,
    *,
    head_dim: int | None = None,
    layers: tuple[LayerSpec, ...] | None = None,
    names: WeightNames = NAMES,
    **differences: Any,
) -> DecoderSpec:
    """A Llama-shaped spec; a family passes what it does otherwise. `head_dim` is the default
    where the configuration has none (None: hidden size over heads)."""
    hidden_size, num_heads = config.size("hidden_size"), config.size("num_attention_heads")
    head_dim = config.optional_size("head_dim") or head_dim or hidden_size // num_heads
    num_kv_heads = config.size("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"{config.where}: num_attention_heads={num_heads} is not a multiple of "
            f"num_key_value_heads={num_kv_heads}.",
            param="num_key_value_heads",
        )
    return DecoderSpec(
        vocab_size=config.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=config.size("intermediate_size"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        layers=layers or (LayerSpec(),) * config.size("num_hidden_layers"),
        rms_eps=config.number("rms_norm_eps"),
        rope=read_rope(config, head_dim),
        max_positions=config.size("max_position_embeddings"),
        activation=config.one_of("hidden_act", ACTIVATIONS, "silu"),
        tie_embeddings=config.flag("tie_word_embeddings", False),
        names=names,
        **differences,
    )


def with_experts(names: WeightNames, block: str, gate: str, up: str, down: str) -> WeightNames:
    """`names` with those of experts: `block` is the layer's part that holds them and their router
    (`gate`, in every family), the others are an expert's projections."""
    at = f"model.layers.{{layer}}.{block}"
    own = {
        "router": f"{at}.gate",
        "expert_gate": f"{at}.experts.{{expert}}.{gate}",
        "expert_up": f"{at}.experts.{{expert}}.{up}",
        "expert_down": f"{at}.experts.{{expert}}.{down}",
    }
    return dataclasses.replace(names, layer={**names.layer, **own})


def read_experts(config: Fields, width: int, renormalize: bool) -> ExpertsSpec:
    """The experts of `width` that a configuration counts, as `transformers` saves them or as those
    before its version 5 did; their activation is SiLU. `renormalize`: see ExpertsSpec. Raises
    ConfigError."""
    config.one_of("hidden_act", {"silu": "", "swish": ""}, "silu")
    key = "num_local_experts" if "num_local_experts" in config else "num_experts"
    count, top_k = config.size(key), config.size("num_experts_per_tok")
    if top_k > count:
        raise ConfigError(
            f"{config.where}: num_experts_per_tok={top_k} is more than the {count} experts that "
            f"{key} gives.",
            param="num_experts_per_tok",
        )
    return ExpertsSpec(count=count, top_k=top_k, width=width, renormalize=renormalize)


def read_window(config: Fields) -> int | None:
    """Keys that sliding layers see, where the Qwen configurations turn them on."""
    window = config.optional_size("sliding_window")
    return window if config.flag("use_sliding_window", False) else None


def read_layer_types(config: Fields) -> tuple[LayerSpec, ...]:
    """Full and sliding layers as the Qwen configurations give them: `layer_types` where present,
    else every layer from `max_window_layers` on slides iff `use_sliding_window`."""
    num_layers, window = config.size("num_hidden_layers"), read_window(config)
    types = config.texts("layer_types")
    if types is None:
        first = num_layers if window is None else config.count("max_window_layers", num_layers)
        first = min(first, num_layers)
        types = ["full_attention"] * first + ["sliding_attention"] * (num_layers - first)
    if len(types) != num_layers or set(types) - {"full_attention", "sliding_attention"}:
        raise ConfigError(
            f"{config.where}: layer_types must give full_attention or sliding_attention for each "
            f"of the {num_layers} layers.",
            param="layer_types",
        )
    if "sliding_attention" in types and window is None:
        raise ConfigError(
            f"{config.where}: layer_types has sliding_attention, but sliding_window is not in use.",
            param="sliding_window",
        )
    slides = {"full_attention": None, "sliding_attention": window}
    return tuple(LayerSpec(sliding_window=slides[kind]) for kind in types)
