"""The tokenizer of a model directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


class Tokenizer:
    """Text to token ids and back. Safe to use from several threads."""

    vocab_size: int  # one above the largest id
    eos_token_id: int | None
    bos_token_id: int | None
    special_ids: frozenset[int]
    special_tokens: dict[str, str]  # bos_token, eos_token, … as a chat template sees them

    @classmethod
    def from_path(cls, path: str | Path) -> Tokenizer:
        """Raises `ModelLoadError` naming the file that is missing or broken."""
        raise NotImplementedError

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        raise NotImplementedError

    def token_text(self, token_id: int) -> str:
        """One token as text (a part of a code point shows as U+FFFD)."""
        raise NotImplementedError

    def token_bytes(self, token_id: int) -> bytes:
        """One token as the bytes it stands for (OpenAI's `bytes` beside a log-probability)."""
        raise NotImplementedError
