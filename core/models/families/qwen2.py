"""Qwen2 and Qwen2.5: biases on q, k and v; some releases slide on their upper layers."""

from __future__ import annotations

from ..fields import Fields
from ..spec import DecoderSpec
from .common import read_decoder, read_layer_types


def read(config: Fields) -> DecoderSpec:
    return read_decoder(config, layers=read_layer_types(config), qkv_bias=True)
