"""Qwen3: queries and keys are normed by head; heads of 128 whatever the hidden size."""

from __future__ import annotations

from ..fields import Fields
from ..spec import DecoderSpec
from .common import read_decoder, read_layer_types


def read(config: Fields) -> DecoderSpec:
    attention_bias = config.flag("attention_bias", False)
    return read_decoder(
        config,
        head_dim=128,
        layers=read_layer_types(config),
        qk_norm=True,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
    )
