"""Qwen3 with experts: in all layers, or in every `decoder_sparse_step`-th but `mlp_only_layers`."""

from __future__ import annotations

from ..fields import Fields
from ..spec import DecoderSpec, LayerSpec
from .common import NAMES, read_decoder, read_experts, read_window, with_experts


def read(config: Fields) -> DecoderSpec:
    step, dense = config.size("decoder_sparse_step", 1), config.counts("mlp_only_layers")
    window = read_window(config)
    attention_bias = config.flag("attention_bias", False)
    return read_decoder(
        config,
        layers=tuple(
            LayerSpec(
                feed_forward="gated" if layer in dense or (layer + 1) % step else "experts",
                sliding_window=window,
            )
            for layer in range(config.size("num_hidden_layers"))
        ),
        qk_norm=True,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        names=with_experts(NAMES, "mlp", gate="gate_proj", up="up_proj", down="down_proj"),
        experts=read_experts(
            config, config.size("moe_intermediate_size"), config.flag("norm_topk_prob", False)
        ),
    )
