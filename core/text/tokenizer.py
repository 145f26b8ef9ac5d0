"""The tokenizer of a model directory.

Bare `tokenizers` on tokenizer.json: importing `transformers` costs seconds, and it is needed only
for directories that have no such file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ..errors import InvalidRequestError, ModelLoadError
from ..model_files import code_of, read_json

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_MAP_FILE = "special_tokens_map.json"
NAMED_SPECIALS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Below this many characters the batch call, which releases the GIL, costs more than it gives.
LONG_TEXT = 4_096
MAX_TOKEN_ID = 2**32 - 1


class Tokenizer:
    """Text to token ids and back. Safe to use from several threads.

    `vocab_size` is one above the largest id; `special_tokens` are the named ones (`bos_token`,
    `eos_token`, …) as a chat template sees them; `byte_level`: every token is a run of bytes.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], path: Path):
        self._backend = backend
        self._bytes: dict[int, bytes] = {}  # filled as tokens are met
        self._texts: dict[int, str] = {}
        self.path = path
        self.config = config
        backend.no_truncation()
        backend.no_padding()
        self.special_tokens = _named_specials(config)
        _add_missing_specials(backend, self.special_tokens, config)
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        self.pad_token_id = self._special_id("pad_token")
        self.byte_level = _is_byte_level(backend)

    @classmethod
    def from_path(cls, path: str | Path) -> Tokenizer:
        """Load from a directory (or its tokenizer.json).

        Raises `ModelLoadError` naming the file that is missing or broken.
        """
        path = Path(path)
        directory = path.parent if path.is_file() else path
        config = {
            **_read_json(directory / SPECIAL_MAP_FILE),
            **_read_json(directory / CONFIG_FILE),
        }
        if code := code_of(config):
            raise ModelLoadError(
                f"{directory / CONFIG_FILE} wants code of its own to be run ({code}), and code "
                f"that comes with a model is never run here. If its {TOKENIZER_FILE} does without, "
                "take `auto_map` out; or set --tokenizer to another directory."
            )
        file = directory / TOKENIZER_FILE
        backend = _from_file(file) if file.is_file() else _from_transformers(directory)
        return cls(backend, config, directory)

    def check_vocabulary(self, model_vocab_size: int) -> None:
        """Raises `ModelLoadError` if a token id has no row in the model's embedding."""
        if self.vocab_size > model_vocab_size:
            raise ModelLoadError(
                f"{self.path / TOKENIZER_FILE} has token ids up to {self.vocab_size - 1}, but the "
                f"model's vocabulary has {model_vocab_size} entries: the tokenizer belongs to "
                "another model. Set --tokenizer to the right directory."
            )

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Raises `InvalidRequestError` for a lone surrogate."""
        try:
            if len(text) < LONG_TEXT:
                ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
            else:
                (encoding,) = self._backend.encode_batch_fast(
                    [text], add_special_tokens=add_special_tokens
                )
                ids = encoding.ids
        except TypeError as error:  # what the library says of a string that UTF-8 cannot hold
            raise InvalidRequestError(
                "the text is not valid Unicode (it holds a lone surrogate).", param="prompt"
            ) from error
        return self._with_configured_ends(text, ids) if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of `ids`; ids that no token has are left out.

        Raises `InvalidRequestError` for an id that is not an unsigned 32-bit number.
        """
        try:
            return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except (OverflowError, TypeError) as error:
            raise InvalidRequestError(
                f"token ids must be whole numbers in [0, {MAX_TOKEN_ID}].", param="tokens"
            ) from error

    def token_text(self, token_id: int) -> str:
        """One token as text (a part of a code point shows as U+FFFD)."""
        text = self._texts.get(token_id)
        if text is None:
            text = self._texts[token_id] = self._backend.decode(
                [token_id], skip_special_tokens=False
            )
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """One token as the bytes it stands for (OpenAI's `bytes` beside a log-probability)."""
        value = self._bytes.get(token_id)
        if value is None:
            value = self._bytes[token_id] = self._find_bytes(token_id)
        return value

    def id_of(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def _find_bytes(self, token_id: int) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if not self.byte_level:
            return self.token_text(token_id).encode()
        # As the byte-level decoder does: a token with any foreign character stands for itself.
        values = [BYTE_OF_CHAR.get(char, -1) for char in token]
        return token.encode() if -1 in values else bytes(values)

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    def _with_configured_ends(self, text: str, ids: list[int]) -> list[int]:
        """tokenizer_config's `add_bos_token` / `add_eos_token` overrule the post-processor."""
        bos, eos = self.special_tokens.get("bos_token"), self.special_tokens.get("eos_token")
        if bos and (wanted := self.config.get("add_bos_token")) is not None:
            there = ids[:1] == [self.bos_token_id]
            if wanted and not there:
                ids.insert(0, self.bos_token_id or 0)
            elif there and not wanted and not text.startswith(bos):
                del ids[0]
        if eos and (wanted := self.config.get("add_eos_token")) is not None:
            there = ids[-1:] == [self.eos_token_id]
            if wanted and not there:
                ids.append(self.eos_token_id or 0)
            elif there and not wanted and not text.endswith(eos):
                del ids[-1]
        return ids


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte (GPT-2's byte-level BPE)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHAR = _byte_alphabet()


def _is_byte_level(backend: tokenizers.Tokenizer) -> bool:
    if backend.decoder is None:
        return False
    decoder = json.loads(backend.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    return kinds[:1] == ["ByteLevel"] and set(kinds[1:]) <= {"Fuse"}


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _from_file(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever is wrong
        raise ModelLoadError(f"{path} is not a valid tokenizer: {error}") from error


def _from_transformers(directory: Path) -> tokenizers.Tokenizer:
    if not directory.is_dir() or not any(directory.glob("*token*")):
        raise ModelLoadError(f"{directory / TOKENIZER_FILE} is missing: no tokenizer to load.")
    from transformers import AutoTokenizer  # lazy: costs seconds, and few directories need it

    try:
        wrapper: Any = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ModelLoadError(
            f"{directory} has no {TOKENIZER_FILE}, and transformers cannot load it: {error}"
        ) from error
    backend = getattr(wrapper, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ModelLoadError(
            f"{directory} holds a tokenizer without a fast form; save a {TOKENIZER_FILE} there."
        )
    return backend


def _named_specials(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in NAMED_SPECIALS:
        value = config.get(name)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _add_missing_specials(
    backend: tokenizers.Tokenizer, named: Mapping[str, str], config: Mapping[str, Any]
) -> None:
    """Tokens that only tokenizer_config.json knows, in the order of their ids."""
    listed = config.get("added_tokens_decoder") or {}
    for _, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        if backend.token_to_id(entry["content"]) is None:
            flags = {k: v for k, v in entry.items() if k in ("lstrip", "rstrip", "single_word")}
            token = tokenizers.AddedToken(
                entry["content"],
                normalized=entry.get("normalized", False),
                special=entry.get("special", True),
                **flags,
            )
            backend.add_tokens([token])
    missing = [text for text in named.values() if backend.token_to_id(text) is None]
    if missing:
        backend.add_special_tokens(missing)
