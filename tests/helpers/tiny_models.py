"""Random tiny models of every family, made by `transformers` and kept for the test session.

With the usual initializer_range of 0.02 a random model repeats one token and equality proves
little; with 0.15 most tokens differ and the top two logits stay apart.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from trimaran.conformance.models import unsettle

VOCAB = 1031
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE}),
    "llama_biased": (
        "Llama",
        {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True},
    ),
    "llama_linear": ("Llama", {"num_key_value_heads": 2, "rope_parameters": LINEAR_ROPE}),
    "llama_yarn": ("Llama", {"num_key_value_heads": 2, "rope_parameters": YARN_ROPE}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": 21}),
    "mistral_full": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2_sliding": (
        "Qwen2",
        {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 19,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2}),
    "mixtral": (
        "Mixtral",
        {"num_key_value_heads": 2, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "num_key_value_heads": 2,
            "num_experts": 12,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 96,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_moe_mixed": (
        "Qwen3Moe",
        {
            "num_key_value_heads": 1,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 80,
            "mlp_only_layers": [1],
            "tie_word_embeddings": True,
        },
    ),
    "qwen3_tied": ("Qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
}
"""Name → (class prefix in `transformers`, what differs from COMMON)."""

FAMILIES = ("llama2", "llama3", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
"""One variant a family (two of Llama): for tests that cannot afford all."""


def build(name: str, **changes: Any) -> transformers.PreTrainedModel:
    """A random fp32 model of a variant, the same each time, in evaluation mode."""
    family, differences = VARIANTS[name]
    values = COMMON | differences | changes
    if family == "Qwen2":  # has no head_dim of its own: hidden size over heads
        values = {k: v for k, v in values.items() if k != "head_dim"} | {"num_attention_heads": 2}
    config = getattr(transformers, f"{family}Config")(**values)
    config._attn_implementation = "sdpa"
    torch.manual_seed(len(name) + sum(map(ord, name)))
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    unsettle(model)
    return model


@functools.cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="trimaran-tiny-")


@functools.cache
def model_path(name: str) -> Path:
    """The saved variant: config.json and model.safetensors, in a directory that lasts as long as
    this process."""
    path = Path(_root().name) / name
    reference(name).save_pretrained(path)
    return path


@functools.cache
def reference(name: str) -> transformers.PreTrainedModel:
    """The variant in `transformers`, fp32."""
    return build(name)


def reference_logits(model: transformers.PreTrainedModel, token_ids: list[int]) -> Tensor:
    """fp32 `[tokens, vocab]` of one whole forward."""
    with torch.inference_mode():
        return model(torch.tensor([token_ids]), use_cache=False).logits[0].float()


def reference_greedy(
    model: transformers.PreTrainedModel, token_ids: list[int], count: int
) -> tuple[list[int], float]:
    """(`count` greedy tokens, the smallest margin between the top two logits on the way). A
    margin under 1e-4 makes a comparison of tokens meaningless: choose another prompt."""
    known, margin = list(token_ids), float("inf")
    for _ in range(count):
        top = reference_logits(model, known)[-1].topk(2)
        margin = min(margin, float(top.values[0] - top.values[1]))
        known.append(int(top.indices[0]))
    return known[len(token_ids) :], margin


def prompt(length: int, seed: int = 0, vocab: int = VOCAB) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(3, vocab, (length,), generator=generator).tolist()
