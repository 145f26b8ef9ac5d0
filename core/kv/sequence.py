"""What one sequence holds in the KV cache, and what the manager knows of a cache group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .block_pool import SCRATCH, BlockPool

NEVER = 1 << 62
"""A token count that no sequence reaches."""


class GroupShape(Protocol):
    """The part of a cache group's configuration that block management needs."""

    @property
    def block_size(self) -> int: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def sliding_window(self) -> int | None: ...


@dataclass(frozen=True, slots=True)
class Hit:
    """A cached prefix: its length, and its block table in each group (0: outside the window)."""

    num_tokens: int
    tables: list[list[int]]


class SequenceKV:
    """Block tables of one sequence, and how far they are published. Filled by `KVManager`.

    `tables[g]` is append-only; an entry becomes 0 once its block has left the window of group g.
    `published[g]` blocks at the front are in the index or came from it; `freed[g]` entries at
    the front are 0. `copies` are source blocks, each with a lease of its own, whose content goes
    into the next block that group gets. `capacity` is how many tokens the tables hold, and
    `next_commit` the token count at which `commit` next has something to do.
    """

    __slots__ = (
        "capacity",
        "chains",
        "copies",
        "epoch",
        "freed",
        "next_commit",
        "published",
        "reuse",
        "root",
        "tables",
    )

    def __init__(self, num_groups: int, root: bytes, *, reuse: bool) -> None:
        self.root = root
        self.reuse = reuse
        # Digest of block 0, 1, … for each block size in use.
        self.chains: dict[int, list[bytes]] = {}
        self.clear(num_groups)

    def clear(self, num_groups: int) -> None:
        """Hold nothing. The chains stay: they belong to the tokens, not to the blocks."""
        self.tables: list[list[int]] = [[] for _ in range(num_groups)]
        self.published = [0] * num_groups
        self.freed = [0] * num_groups
        self.copies: list[tuple[int, int]] = []
        self.capacity = 0
        self.next_commit = 0
        self.epoch = -1

    @property
    def holds_blocks(self) -> bool:
        return self.capacity > 0 or bool(self.copies)


class Group:
    """One cache group: its pool and its arithmetic."""

    __slots__ = ("block_size", "pool", "window")

    def __init__(self, shape: GroupShape) -> None:
        self.block_size = shape.block_size
        self.window = shape.sliding_window
        self.pool = BlockPool(shape.num_blocks)

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def first_needed(self, computed: int) -> int:
        """Index of the first block that a query at position `computed` or later may read.

        A query at p reads the keys of (p - window, p].
        """
        if self.window is None:
            return 0
        return max(0, computed - self.window + 1) // self.block_size

    def next_event(self, computed: int) -> int:
        """The next token count at which a block gets full or leaves the window."""
        full = (computed // self.block_size + 1) * self.block_size
        if self.window is None:
            return full
        left = (self.first_needed(computed) + 1) * self.block_size + self.window - 1
        return min(full, left)

    def peak_blocks(self, num_tokens: int, chunk: int) -> int:
        """The most blocks a sequence of `num_tokens` holds at once when it is computed in steps
        of at most `chunk` tokens."""
        whole = self.num_blocks(num_tokens)
        if self.window is None:
            return whole
        # window + chunk - 1 positions in a row touch at most this many blocks.
        span = self.window + chunk - 1
        return min(whole, self.num_blocks(span - 1) + 1)

    def longest_hit(self, chain: list[bytes], limit: int) -> int:
        """Tokens (a multiple of the block size, at most `limit`) whose needed blocks are cached."""
        num_blocks = limit // self.block_size
        if self.window is None:
            return self._longest_prefix(chain, num_blocks) * self.block_size
        end = num_blocks  # blocks [start, end) are cached
        start = num_blocks
        while start > self.first_needed(end * self.block_size):
            if self.pool.lookup(chain[start - 1]) is None:
                end = start - 1
            start -= 1
        return end * self.block_size

    def _longest_prefix(self, chain: list[bytes], num_blocks: int) -> int:
        for index in range(num_blocks):
            if self.pool.lookup(chain[index]) is None:
                return index
        return num_blocks

    def hit_table(self, chain: list[bytes], num_tokens: int) -> list[int]:
        num_blocks = num_tokens // self.block_size
        first = self.first_needed(num_tokens)
        cached = [self.pool.lookup(chain[index]) or SCRATCH for index in range(first, num_blocks)]
        return [SCRATCH] * first + cached
