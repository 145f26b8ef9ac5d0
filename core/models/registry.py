"""Architecture name → family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .spec import DecoderSpec


def decoder_spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """The spec of a model from its config.json; ConfigError names what is missing or unknown."""
    raise NotImplementedError
