"""Llama 2, 3 and 3.x, and the many models that are saved as one."""

from __future__ import annotations

from ..fields import Fields
from ..spec import DecoderSpec
from .common import read_decoder


def read(config: Fields) -> DecoderSpec:
    """One `attention_bias` governs q, k, v and o; one `mlp_bias` gate, up and down."""
    attention_bias = config.flag("attention_bias", False)
    return read_decoder(
        config,
        qkv_bias=attention_bias,
        o_bias=attention_bias,
        mlp_bias=config.flag("mlp_bias", False),
    )
