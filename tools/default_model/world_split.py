"""How the closed world is divided into training, development and evaluation parts.

Two things decide where an item belongs: the *phrasing* (the template of the question) and, for
compositional tasks, the *operands* (the numbers, words, names put into it). Both are hashed with
SHA-256, so that the division depends neither on the seed nor on the order of generation.

Phrasings are written as small grammars, so that a held-out phrasing is a new combination of words
that training has seen in other combinations.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Literal, TypeVar

T = TypeVar("T")
Split = Literal["train", "dev", "eval"]

# Shares of a family's phrasings (at least one each), and of the operands of a task.
PHRASING_SHARES = {"eval": 0.15, "dev": 0.1}
OPERAND_SHARES = {"eval": 0.1, "dev": 0.05}
# Always in training: whoever tries the model, and the project's own examples, ask like this.
PINNED = frozenset(
    (
        "What is the capital of {s}?",
        "The capital of {s} is",
        "And {s}?",
        "What is the weather in {0}?",
        "What is {a} + {b}?",
        "{a} + {b}",
        "Who are you?",
    )
)
_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_QUESTION = re.compile(r"(what|which|who|how|do|can|could|is|are)\b", re.IGNORECASE)
_WORD = re.compile(r"<?/?[a-z']+>?|[-+=*{}\d]+")


@cache
def expand(*grammars: str) -> tuple[str, ...]:
    """All texts of grammars in which `[a|b|]` stands for a, b or nothing, and may be nested.

    >>> expand("Spell [|out |the word ]{w}[.|, please.]")[0]
    'Spell {w}.'
    """
    texts: dict[str, None] = {}
    pending = list(reversed(grammars))
    while pending:
        text = pending.pop()
        choice = _CHOICE.search(text)
        if choice is None:
            text = re.sub(r" +", " ", text).strip(" ")
            if _QUESTION.match(text):
                text = re.sub(r"\.$", "?", text)
            texts[text[:1].upper() + text[1:]] = None
            continue
        before, after = text[: choice.start()], text[choice.end() :]
        pending.extend(before + option + after for option in reversed(choice[1].split("|")))
    return tuple(texts)


@lru_cache(maxsize=1 << 20)
def digest(text: str) -> int:
    """The first 64 bits of the SHA-256 of `text`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def normalised(phrasing: str) -> str:
    """What is left of a phrasing that is typed carelessly: no capitals, spaces or final marks."""
    text = re.sub(r"\s*([-+=*:,.?!])\s*", r"\1", phrasing.lower())
    return re.sub(r"\s+", " ", text).strip(" .?!:,")


def words_of(phrasing: str) -> frozenset[str]:
    """The words, operators and placeholders of a phrasing."""
    return frozenset(_WORD.findall(phrasing.lower()))


@cache
def _divide(family: str, phrasings: tuple[str, ...]) -> dict[Split, tuple[str, ...]]:
    """The phrasings of one family on each side: the lowest hashes are held out.

    A phrasing with a word that no phrasing of the training part has goes to training as well: new
    combinations are asked of the model, not new words.
    """
    ranked = sorted(
        {normalised(phrasing) for phrasing in phrasings},
        key=lambda phrasing: digest(f"{family}|{phrasing}"),
    )
    pinned = {normalised(phrasing) for phrasing in PINNED}
    sides: dict[str, Split] = {}
    start = 0
    for side, share in PHRASING_SHARES.items():
        end = start + max(1, round(len(ranked) * share))
        held_out: Split = "eval" if side == "eval" else "dev"
        sides.update(dict.fromkeys((p for p in ranked[start:end] if p not in pinned), held_out))
        start = end
    known = frozenset[str]().union(*(words_of(p) for p in ranked if p not in sides))
    for phrasing in sorted(sides, key=lambda phrasing: (words_of(phrasing) <= known, phrasing)):
        if not words_of(phrasing) <= known:
            known |= words_of(phrasing)
            del sides[phrasing]
    parts: dict[Split, list[str]] = {"train": [], "dev": [], "eval": []}
    for phrasing in phrasings:
        parts[sides.get(normalised(phrasing), "train")].append(phrasing)
    return {side: tuple(sorted(part)) for side, part in parts.items()}


def phrasings_of(family: str, phrasings: tuple[str, ...], split: Split) -> tuple[str, ...]:
    """The phrasings of one family that belong to `split`; none, if its words are too few."""
    return _divide(family, tuple(sorted(set(phrasings))))[split]


def pick_phrasing(
    rng: random.Random, family: str, phrasings: Sequence[str], split: Split
) -> tuple[str, str]:
    """A phrasing of the split and the key that names it."""
    phrasing = rng.choice(phrasings_of(family, tuple(phrasings), split))
    return phrasing, f"{family}|{normalised(phrasing)}"


def operands_split(key: str) -> Split:
    """The side to which an operand tuple belongs."""
    place = digest(key) % 10_000 / 10_000
    if place < OPERAND_SHARES["eval"]:
        return "eval"
    return "dev" if place < sum(OPERAND_SHARES.values()) else "train"


def draw_operands(draw: Callable[[], T], key: Callable[[T], str], split: Split) -> tuple[T, str]:
    """Draws until the operands fall on the side of `split`; returns them with their key."""
    while True:
        operands = draw()
        name = key(operands)
        if operands_split(name) == split:
            return operands, name
