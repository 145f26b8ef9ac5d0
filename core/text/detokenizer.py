"""Tokens to text as they come: linear time, and a code point is never split.

Byte-level tokenizers (nearly all of today's) turn every token into bytes, so one incremental
UTF-8 decoder does it. For any other, the token is decoded together with the few tokens before
it, and what ends in a replacement character waits for more.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Sequence

from .tokenizer import Tokenizer

CONTEXT_TOKENS = 5  # enough that leading spaces come out as they stand in the whole text
MAX_CODE_POINT_TOKENS = 4  # it has at most four bytes
MAX_HELD_TOKENS = 8  # what is still no text after so many tokens never becomes any
REPLACEMENT = "\ufffd"


class IncrementalDetokenizer(ABC):
    """The text of one sequence."""

    @abstractmethod
    def push(self, token_id: int) -> str:
        """The text that this token completes; empty while a code point is unfinished."""

    @abstractmethod
    def flush(self) -> str:
        """What is left when no token follows (U+FFFD for an unfinished code point)."""

    def extend(self, token_ids: Sequence[int]) -> str:
        return "".join(map(self.push, token_ids))


def open_detokenizer(
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int] = (),
    *,
    skip_special_tokens: bool = True,
    spaces_between_special_tokens: bool = True,
) -> IncrementalDetokenizer:
    """A detokenizer for what follows `prompt_ids`."""
    if tokenizer.byte_level:  # puts no spaces between tokens, so there are none to leave out
        return ByteDetokenizer(tokenizer, skip_special_tokens)
    return WindowDetokenizer(
        tokenizer, prompt_ids, skip_special_tokens, spaces_between_special_tokens
    )


class ByteDetokenizer(IncrementalDetokenizer):
    """For byte-level tokenizers: equals the decode of the whole for every sequence of tokens."""

    __slots__ = ("_decoder", "_skipped", "_tokenizer")

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        if token_id in self._skipped:
            return ""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer(IncrementalDetokenizer):
    """For any tokenizer: decodes a window of `[context | held]` tokens, never the history."""

    __slots__ = ("_context", "_held", "_joined", "_last_special", "_skip", "_tokenizer")

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._joined = not (skip_special_tokens or spaces_between_special_tokens)
        self._last_special = False
        self._context = self._find_context(prompt_ids)
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        special = token_id in self._tokenizer.special_ids
        if special and self._skip:
            return ""
        joins, self._last_special = self._joined and special and self._last_special, special
        if joins:
            text = self.flush() + self._tokenizer.token_text(token_id)
            self._context = [token_id]
            return text
        self._held.append(token_id)
        text = self._held_text()
        incomplete = not text or text.endswith(REPLACEMENT)
        if incomplete and len(self._held) < MAX_HELD_TOKENS:
            return ""
        self._advance()
        return text

    def flush(self) -> str:
        text = self._held_text()
        self._advance()
        return text

    def _find_context(self, prompt_ids: Sequence[int]) -> list[int]:
        """The prompt's last tokens, from where a code point begins: a window that opens inside
        one would spoil what follows it."""
        for size in range(CONTEXT_TOKENS, CONTEXT_TOKENS + MAX_CODE_POINT_TOKENS):
            context = list(prompt_ids[-size:])
            if REPLACEMENT not in self._decode(context):
                return context
        return list(prompt_ids[-CONTEXT_TOKENS:])

    def _held_text(self) -> str:
        before = self._decode(self._context)
        return self._decode(self._context + self._held)[len(before) :]

    def _advance(self) -> None:
        self._context, self._held = (self._held or self._context), []

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
