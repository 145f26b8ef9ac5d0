"""A failing program made smaller while it still fails (delta debugging, Zeller & Hildebrandt 2002,
section 3: drop ever smaller pieces)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")

SHRINK_FOR = 20.0
"""Seconds after which what has been reached is told."""


def smallest(
    items: Sequence[T],
    fails: Callable[[Sequence[T]], str],
    simpler: Callable[[T], Iterable[T]] = lambda item: (),
) -> tuple[list[T], str]:
    """A program from which nothing can be left out, and how it fails. `fails` says what is wrong
    with a program (empty: nothing); `simpler` lists what may stand in an item's place."""
    deadline = time.monotonic() + SHRINK_FOR
    best, said = list(items), fails(items)

    def try_instead(candidate: list[T]) -> bool:
        nonlocal best, said
        if time.monotonic() > deadline or not (found := fails(candidate)):
            return False
        best, said = candidate, found
        return True

    size = max(1, len(best) // 2)
    while size and best:
        at, dropped = 0, False
        while at < len(best):
            if try_instead(best[:at] + best[at + size :]):
                dropped = True
            else:
                at += size
        if not dropped or size > 1:
            size //= 2
    for at in range(len(best)):
        while any(
            try_instead([*best[:at], item, *best[at + 1 :]]) for item in list(simpler(best[at]))
        ):
            continue
    return best, said
