"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from ..fields import Fields
from ..spec import DecoderSpec, LayerSpec
from .common import NAMES, read_decoder, read_experts, with_experts


def read(config: Fields) -> DecoderSpec:
    layer = LayerSpec(feed_forward="experts", sliding_window=config.optional_size("sliding_window"))
    return read_decoder(
        config,
        layers=(layer,) * config.size("num_hidden_layers"),
        names=with_experts(NAMES, "block_sparse_moe", gate="w1", up="w3", down="w2"),
        experts=read_experts(config, config.size("intermediate_size"), renormalize=True),
    )
