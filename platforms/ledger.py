"""Accounts of persistent device memory by tag."""

from __future__ import annotations

import weakref
from collections import Counter

from torch import Tensor


class MemoryLedger:
    """Bytes allocated and not yet freed, by tag. A tensor's entry ends with the tensor."""

    def __init__(self) -> None:
        self._bytes: Counter[str] = Counter()

    def add(self, tag: str, tensor: Tensor) -> Tensor:
        self.enter(tensor, tensor.numel() * tensor.element_size(), tag)
        return tensor

    def enter(self, owner: object, size: int, tag: str) -> None:
        """`size` bytes that end with `owner`."""
        self._bytes[tag] += size
        weakref.finalize(owner, self._release, tag, size).atexit = False

    def by_tag(self) -> dict[str, int]:
        return {tag: size for tag, size in self._bytes.items() if size}

    def _release(self, tag: str, size: int) -> None:
        self._bytes[tag] -= size
