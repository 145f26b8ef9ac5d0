"""Importing much at once."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection inside: modules make many objects, nearly all of which stay, and each
    collection would walk through them again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():  # whoever has frozen objects keeps them so
            # Into the oldest generation: the next collections of the younger ones stay short.
            gc.freeze()
            gc.unfreeze()
        if was_on:
            gc.enable()
