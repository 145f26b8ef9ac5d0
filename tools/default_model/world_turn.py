"""A single question and its one right answer, and the surface noise that real users add."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """One user message and its answer.

    `keys` names what the split was decided by (phrasings and operands); `value` is the bare
    answer, without the sentence around it, where such a thing exists.
    """

    category: str
    user: str
    answer: str
    keys: tuple[str, ...]
    value: str = ""


_FRAMES = (
    *("{q}",) * 12,
    "Please tell me: {q}",
    "Hey, {q}",
    "Hello! {q}",
    "Hi, {q}",
    "Quick question: {q}",
    "One more question: {q}",
    "{q} Thanks!",
    "{q} Please.",
    "I have a question. {q}",
    "Okay. {q}",
)


def frame(rng: random.Random, question: str) -> str:
    """Sometimes puts a polite frame around the question."""
    return rng.choice(_FRAMES).format(q=question)


def roughen(rng: random.Random, text: str) -> str:
    """Sometimes writes the way people type: no capitals, no final mark."""
    if rng.random() < 0.12:
        text = text.lower()
    if rng.random() < 0.12:
        text = text.rstrip("?.!")
    return text
