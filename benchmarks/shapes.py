"""Checkpoints with random weights in real shapes, for honest speed comparisons.

Every engine reads the same safetensors file, or what was converted from it, so that their outputs
can be compared.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES: dict[str, dict[str, int]] = {
    # Qwen3-0.6B as published: 440 M in the body, 156 M in the tied head.
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
    },
    # A small sibling, to try the harness itself.
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 4096,
    },
}

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make_checkpoint(shape: str, cache: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write (once) a Qwen3 checkpoint of `shape` under `cache` and return its directory."""
    target = cache / f"{shape}-{str(dtype).removeprefix('torch.')}"
    if (target / "model.safetensors").exists():
        return target
    sizes = SHAPES[shape]
    partial = target.with_suffix(".partial")
    partial.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": 1,
        "eos_token_id": 0,
        **sizes,
    }
    (partial / "config.json").write_text(json.dumps(config, indent=1))
    save_file(_random_weights(sizes, dtype), partial / "model.safetensors", {"format": "pt"})
    tokenizer = Path(__file__).parent.parent / "default_model"
    for name in TOKENIZER_FILES:
        if (tokenizer / name).exists():
            shutil.copy(tokenizer / name, partial / name)
    partial.rename(target)
    return target


def layer_matrices(sizes: dict[str, int]) -> list[tuple[int, int]]:
    """(rows, columns) of the matrices of one layer: q, k, v, o, gate, up, down."""
    hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
    query = sizes["num_attention_heads"] * sizes["head_dim"]
    kv = sizes["num_key_value_heads"] * sizes["head_dim"]
    attention = [(query, hidden), (kv, hidden), (kv, hidden), (hidden, query)]
    return [*attention, (inner, hidden), (inner, hidden), (hidden, inner)]


def num_body_parameters(sizes: dict[str, int]) -> int:
    """Parameters every token passes through, the embedding table left out."""
    layer = sum(rows * columns for rows, columns in layer_matrices(sizes))
    return sizes["num_hidden_layers"] * layer


def _random_weights(sizes: dict[str, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, inner, dim = sizes["hidden_size"], sizes["intermediate_size"], sizes["head_dim"]
    query, kv = sizes["num_attention_heads"] * dim, sizes["num_key_value_heads"] * dim

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).to(dtype)

    weights = {"model.embed_tokens.weight": normal(sizes["vocab_size"], hidden)}
    weights["model.norm.weight"] = torch.ones(hidden, dtype=dtype)
    for i in range(sizes["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        weights |= {
            layer + "input_layernorm.weight": torch.ones(hidden, dtype=dtype),
            layer + "post_attention_layernorm.weight": torch.ones(hidden, dtype=dtype),
            layer + "self_attn.q_proj.weight": normal(query, hidden),
            layer + "self_attn.k_proj.weight": normal(kv, hidden),
            layer + "self_attn.v_proj.weight": normal(kv, hidden),
            layer + "self_attn.o_proj.weight": normal(hidden, query),
            layer + "self_attn.q_norm.weight": torch.ones(dim, dtype=dtype),
            layer + "self_attn.k_norm.weight": torch.ones(dim, dtype=dtype),
            layer + "mlp.gate_proj.weight": normal(inner, hidden),
            layer + "mlp.up_proj.weight": normal(inner, hidden),
            layer + "mlp.down_proj.weight": normal(hidden, inner),
        }
    return weights
