"""One cache group's blocks: reference counts, the free list, and the index of known content."""

from __future__ import annotations

from collections.abc import Iterable

SCRATCH = 0
"""Block 0 takes the writes of padding and stands for freed entries of a table; never allocated."""


class BlockPool:
    """Fixed blocks 1 … num_blocks - 1; block 0 is scratch.

    Invariants: a block is on the free list iff its count is 0; `index[d]` lists exactly the
    blocks whose `digests` entry is d; a free block may keep its digest (it is then a cached
    block, and the oldest of them is evicted last-used-first-out by allocation).
    """

    __slots__ = (
        "_next",
        "_previous",
        "digests",
        "index",
        "num_blocks",
        "num_free",
        "refs",
        "tainted",
    )

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks is {num_blocks}; at least 2 (scratch and one) are needed")
        self.num_blocks = num_blocks
        self.num_free = num_blocks - 1
        self.refs = [0] * num_blocks
        self.digests: list[bytes | None] = [None] * num_blocks
        self.index: dict[bytes, list[int]] = {}
        # Content that may hold NaN: scrubbed when the block is allocated next, never indexed.
        self.tainted: set[int] = set()
        # Circular, intrusive; entry 0 (never a free block) is the sentinel: its next is the
        # block to allocate first, its previous the one to allocate last.
        self._next: list[int] = [*range(1, num_blocks), 0]
        self._previous: list[int] = [num_blocks - 1, *range(num_blocks - 1)]

    @property
    def num_used(self) -> int:
        return self.num_blocks - 1 - self.num_free

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, each with one lease and no digest. The caller checked `num_free`."""
        if count > self.num_free:
            raise RuntimeError(f"{count} blocks asked of a pool with {self.num_free} free")
        return [self._take_first() for _ in range(count)]

    def acquire(self, block: int) -> None:
        """Add a lease to a block that is in use or cached."""
        if self.refs[block] == 0:
            self._unlink(block)
        self.refs[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Drop one lease of each block, in this order: what comes first is evicted first."""
        for block in blocks:
            refs = self.refs[block] - 1
            if refs < 0 or block == SCRATCH:
                raise RuntimeError(f"block {block} is released more often than it was leased")
            self.refs[block] = refs
            if refs == 0:
                self._collapse(block)
                self._link(block, first=self.digests[block] is None)

    def publish(self, block: int, digest: bytes) -> None:
        """Index a full block that will not change any more. Another block may hold the same."""
        if self.digests[block] is not None or block in self.tainted:
            return
        self.digests[block] = digest
        self.index.setdefault(digest, []).append(block)

    def lookup(self, digest: bytes) -> int | None:
        blocks = self.index.get(digest)
        return blocks[0] if blocks else None

    def forget(self, digest: bytes) -> list[int]:
        """Take a digest out of the index; returns the blocks that had it."""
        blocks = self.index.pop(digest, [])
        for block in blocks:
            self.digests[block] = None
        return blocks

    def clear_index(self) -> None:
        self.index.clear()
        self.digests = [None] * self.num_blocks

    def free_list(self) -> list[int]:
        """The free blocks, first to be allocated first (for tests and inspection)."""
        blocks, block = [], self._next[SCRATCH]
        while block != SCRATCH:
            blocks.append(block)
            block = self._next[block]
        return blocks

    def _take_first(self) -> int:
        block = self._next[SCRATCH]
        self._unlink(block)
        self._unindex(block)  # eviction: the content is about to change
        self.refs[block] = 1
        return block

    def _collapse(self, block: int) -> None:
        """Of several blocks with one content, only the last to be freed stays cached."""
        digest = self.digests[block]
        if digest is not None and len(self.index[digest]) > 1:
            self._unindex(block)

    def _unindex(self, block: int) -> None:
        digest = self.digests[block]
        if digest is None:
            return
        self.digests[block] = None
        blocks = self.index[digest]
        blocks.remove(block)
        if not blocks:
            del self.index[digest]

    def _link(self, block: int, *, first: bool) -> None:
        before = SCRATCH if first else self._previous[SCRATCH]
        after = self._next[before]
        self._next[before] = self._previous[after] = block
        self._previous[block], self._next[block] = before, after
        self.num_free += 1

    def _unlink(self, block: int) -> None:
        before, after = self._previous[block], self._next[block]
        self._next[before], self._previous[after] = after, before
        self.num_free -= 1
