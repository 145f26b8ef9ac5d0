"""How the closed world is divided into training and held-out parts.

Two things decide where an item belongs: the *phrasing* (the template of the question) and, for
compositional tasks, the *operands* (the numbers, words, names put into it). Both are hashed with
SHA-256, so that the division depends neither on the seed nor on the order of generation.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Literal, TypeVar

T = TypeVar("T")
Split = Literal["train", "eval"]

EVAL_PHRASING_SHARE = 0.2  # of a family's phrasings, at least one
EVAL_OPERAND_SHARE = 0.12  # of the operand tuples of a compositional task


@lru_cache(maxsize=1 << 20)
def digest(text: str) -> int:
    """The first 64 bits of the SHA-256 of `text`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@cache
def phrasings_of(family: str, phrasings: tuple[str, ...], split: Split) -> tuple[str, ...]:
    """The phrasings of one family that belong to `split`: lowest hashes are held out."""
    ranked = sorted(phrasings, key=lambda phrasing: digest(f"{family}|{phrasing}"))
    held_out = max(1, round(len(ranked) * EVAL_PHRASING_SHARE))
    return tuple(ranked[:held_out] if split == "eval" else ranked[held_out:])


def pick_phrasing(
    rng: random.Random, family: str, phrasings: Sequence[str], split: Split
) -> tuple[str, str]:
    """A phrasing of the split and the key that names it."""
    phrasing = rng.choice(phrasings_of(family, tuple(phrasings), split))
    return phrasing, f"{family}|{phrasing}"


def operands_split(key: str) -> Split:
    """The side to which an operand tuple belongs."""
    return "eval" if digest(key) % 10_000 < EVAL_OPERAND_SHARE * 10_000 else "train"


def draw_operands(draw: Callable[[], T], key: Callable[[T], str], split: Split) -> tuple[T, str]:
    """Draws until the operands fall on the side of `split`; returns them with their key."""
    while True:
        operands = draw()
        name = key(operands)
        if operands_split(name) == split:
            return operands, name
