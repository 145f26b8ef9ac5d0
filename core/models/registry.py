"""Architecture name → family: a table, and the one place a new family is entered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ..errors import ConfigError
from .families import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from .fields import Fields
from .spec import DecoderSpec

FAMILIES: Mapping[str, Callable[[Fields], DecoderSpec]] = {
    "LlamaForCausalLM": llama.read,
    "MistralForCausalLM": mistral.read,
    "MixtralForCausalLM": mixtral.read,
    "Qwen2ForCausalLM": qwen2.read,
    "Qwen3ForCausalLM": qwen3.read,
    "Qwen3MoeForCausalLM": qwen3_moe.read,
}


def decoder_spec(hf_config: Mapping[str, Any]) -> DecoderSpec:
    """The spec of a model from its config.json; ConfigError names what is missing or unknown."""
    names = Fields(hf_config).texts("architectures") or []
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name](Fields(hf_config))
    raise ConfigError(
        f"config.json: architectures={names} is not supported. Known: {', '.join(FAMILIES)}.",
        param="architectures",
    )
