"""Mistral: Llama with a sliding window on every layer."""

from __future__ import annotations

from ..fields import Fields
from ..spec import DecoderSpec, LayerSpec
from .common import read_decoder

DEFAULT_WINDOW = 4096
"""Of a configuration without the key; null turns the window off, as later releases do."""


def read(config: Fields) -> DecoderSpec:
    window = config.optional_size("sliding_window", DEFAULT_WINDOW)
    layers = (LayerSpec(sliding_window=window),) * config.size("num_hidden_layers")
    return read_decoder(config, layers=layers)
