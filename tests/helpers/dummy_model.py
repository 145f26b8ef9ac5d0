"""A model directory with random weights and a real tokenizer: no download, loaded in a moment."""

import json
from pathlib import Path
from typing import Any

from trimaran.core.args import EngineArgs

from .tiny_tokenizers import byte_level, save

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 384,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "hidden_act": "silu",
    "torch_dtype": "float32",
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_dummy_model(directory: Path, **changes: Any) -> Path:
    save(byte_level(), directory, eos_token="<|im_end|>", chat_template=TEMPLATE)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return directory


def dummy_args(directory: Path, **changes: Any) -> EngineArgs:
    fields: dict[str, Any] = {
        "model": str(directory),
        "load_format": "dummy",
        "dtype": "float32",
        "max_model_len": "1024",
        "num_gpu_blocks_override": 128,
        "max_num_seqs": 8,
    }
    return EngineArgs(**{**fields, **changes})
