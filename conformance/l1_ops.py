"""Being written."""

from __future__ import annotations

from .base import Check, Subject


def checks(subject: Subject) -> list[Check]:
    return []
