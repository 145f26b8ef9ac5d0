"""What a front end knows of the model that an engine runs. No torch: the server's process is
quick to start, and small, without it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """`generation` holds the sampling defaults of generation_config.json; `eos_token_ids` end a
    sequence; `quantization`: what weights become at load (None: nothing); `attention_backend`:
    which attention is used, by its name."""

    path: Path
    name: str
    max_model_len: int
    vocab_size: int
    tokenizer_path: Path
    generation: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    quantization: str | None = None
    attention_backend: str = "auto"
    seed: int
    max_logprobs: int
    logprobs_mode: str
