"""The KV block manager: tables of sequences over cache groups, prefix reuse, forks, leases.

A block lives as long as it has a lease, which is a count in its pool: of a sequence's table, or of
the step in flight that the table was left to. Whoever else wants to hold blocks (a transfer) leases
them in the same way, by `BlockPool.acquire` and `release`. Nothing here knows bytes or devices:
what must happen to block contents (copies, scrubs) is handed to the plan.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from dataclasses import dataclass

from ..plan import BlockCopy, BlockRef
from .block_pool import SCRATCH
from .hashing import extend_chain
from .sequence import NEVER, Group, GroupShape, Hit, SequenceKV


@dataclass(frozen=True, slots=True)
class Usage:
    """Blocks of all groups, without the scratch blocks."""

    used: int
    free: int
    total: int


@dataclass(slots=True)
class _Held:
    """A step's lease: what a released sequence leaves to the last step that uses it."""

    sequence: SequenceKV
    tables: list[list[int]]
    copies: list[tuple[int, int]]
    freeing: list[int]  # per group: blocks that become free with this


class KVManager:
    """Allocates, shares and frees the blocks of sequences, all-or-nothing over the groups."""

    def __init__(self, groups: Sequence[GroupShape], enable_prefix_caching: bool = True) -> None:
        if not groups:
            raise ValueError("a KV manager needs at least one cache group")
        self.groups = [Group(shape) for shape in groups]
        self.enable_prefix_caching = enable_prefix_caching
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._epoch = 0
        self._scrubs: list[BlockRef] = []
        self._held: dict[int, list[_Held]] = {}
        self._freeing = [0] * len(self.groups)

    def sequence(self, root: bytes, *, reuse: bool = True) -> SequenceKV:
        """The record of a new sequence. `reuse` False: it skips the lookup (it still publishes)."""
        return SequenceKV(len(self.groups), root, reuse=reuse)

    # ---------------------------------------------------------------- prefix reuse

    def find_hit(self, sequence: SequenceKV, tokens: list[int]) -> Hit:
        """The longest cached prefix that all groups have; leases nothing.

        At least the last token is left: its logits are wanted, and its block must be private.
        """
        if not (self.enable_prefix_caching and sequence.reuse):
            return Hit(0, [[] for _ in self.groups])
        chains = [self._chain(sequence, group, tokens, len(tokens) - 1) for group in self.groups]
        # Each pass can only shorten the hit; it is found when no group shortens it any more.
        length, previous = len(tokens) - 1, -1
        while length != previous:
            previous = length
            for group, chain in zip(self.groups, chains, strict=True):
                length = group.longest_hit(chain, length)
        pairs = zip(self.groups, chains, strict=True)
        return Hit(length, [group.hit_table(chain, length) for group, chain in pairs])

    def unpublished(self, sequence: SequenceKV, computed: int) -> list[bytes]:
        """Digests of the blocks that the sequence will publish once its first `computed` tokens are
        in the cache for good; only of tokens whose digests are known: what is generated has none
        yet."""
        if sequence.epoch != self._epoch:
            return []
        size = self.groups[0].block_size  # tokens that are equal are so in blocks of any size
        return sequence.chains.get(size, [])[sequence.published[0] : computed // size]

    def cached_soon(self, sequence: SequenceKV, hit: Hit, pending: Container[bytes]) -> int:
        """How many tokens past its hit the sequence will find cached once the blocks `pending`
        (digests) are published."""
        if not (self.enable_prefix_caching and sequence.reuse):
            return 0
        size = self.groups[0].block_size
        rest = sequence.chains[size][hit.num_tokens // size :]
        return size * sum(1 for _ in itertools.takewhile(pending.__contains__, rest))

    def _chain(
        self, sequence: SequenceKV, group: Group, tokens: list[int], num_tokens: int
    ) -> list[bytes]:
        chain = sequence.chains.setdefault(group.block_size, [])
        num_blocks = num_tokens // group.block_size
        if len(chain) < num_blocks:
            extend_chain(chain, sequence.root, tokens, group.block_size, num_blocks)
        return chain

    def reset_prefix_cache(self) -> bool:
        """Forget all cached content. Sequences that hold blocks now publish nothing more."""
        self._epoch += 1
        for group in self.groups:
            group.pool.clear_index()
        return True

    # ---------------------------------------------------------------- room

    def can_ever_hold(self, num_tokens: int, chunk: int) -> bool:
        """Whether a sequence of `num_tokens` computed tokens fits when it is alone."""
        return all(
            group.peak_blocks(num_tokens, chunk) < group.pool.num_blocks for group in self.groups
        )

    def room(self, sequence: SequenceKV, hit: Hit | None = None) -> int:
        """How many tokens the sequence could hold with the blocks that are free now."""
        limit = NEVER
        for g, group in enumerate(self.groups):
            table = hit.tables[g] if hit else sequence.tables[g]
            free = self._free_beside(g, hit)
            limit = min(limit, (len(table) + free) * group.block_size)
        return limit

    def fits(self, sequence: SequenceKV, hit: Hit | None, num_tokens: int, chunk: int) -> bool:
        """Whether all of `num_tokens` tokens, computed in steps of `chunk`, fit beside others."""
        for g, group in enumerate(self.groups):
            table = hit.tables[g] if hit else sequence.tables[g]
            held = len(table) - table.count(SCRATCH)
            if group.peak_blocks(num_tokens, chunk) - held > self._free_beside(g, hit):
                return False
        return True

    def _free_beside(self, g: int, hit: Hit | None) -> int:
        """Free blocks of group g once the blocks of `hit` are leased."""
        pool = self.groups[g].pool
        if hit is None:
            return pool.num_free
        return pool.num_free - sum(
            block != SCRATCH and pool.refs[block] == 0 for block in hit.tables[g]
        )

    def relief_in_flight(self, sequence: SequenceKV, num_tokens: int) -> bool:
        """Whether the blocks that steps in flight will free are enough for `num_tokens`."""
        return all(
            group.num_blocks(num_tokens) - len(table) <= group.pool.num_free + freeing
            for group, table, freeing in zip(
                self.groups, sequence.tables, self._freeing, strict=True
            )
        )

    # ---------------------------------------------------------------- allocation

    def begin(self, sequence: SequenceKV, hit: Hit, num_tokens: int) -> bool:
        """Give blocks to a sequence that holds none: the hit's, then fresh ones up to
        `num_tokens`. All or nothing."""
        if self.room(sequence, hit) < num_tokens:
            return False
        sequence.epoch = self._epoch
        for g, group in enumerate(self.groups):
            for block in hit.tables[g]:
                if block != SCRATCH:
                    group.pool.acquire(block)
            sequence.tables[g] = hit.tables[g]
            sequence.published[g] = hit.num_tokens // group.block_size
            sequence.freed[g] = group.first_needed(hit.num_tokens)
        self._append(sequence, num_tokens)
        self._plan_commit(sequence, hit.num_tokens)
        return True

    def grow(self, sequence: SequenceKV, num_tokens: int) -> list[list[int]] | None:
        """Append blocks up to `num_tokens`; the new ids a group, or None and nothing is changed."""
        if self.room(sequence) < num_tokens:
            return None
        return self._append(sequence, num_tokens)

    def _append(self, sequence: SequenceKV, num_tokens: int) -> list[list[int]]:
        added, capacity = [], NEVER
        for g, group in enumerate(self.groups):
            table = sequence.tables[g]
            count = max(0, group.num_blocks(num_tokens) - len(table))
            blocks = group.pool.allocate(count) if count else []
            if group.pool.tainted:
                self._scrub(g, blocks)
            table.extend(blocks)
            added.append(blocks)
            capacity = min(capacity, len(table) * group.block_size)
        sequence.capacity = capacity
        return added

    def _scrub(self, g: int, blocks: list[int]) -> None:
        tainted = self.groups[g].pool.tainted
        for block in tainted.intersection(blocks):
            tainted.discard(block)
            self._scrubs.append(BlockRef(g, block))

    def take_scrubs(self) -> list[BlockRef]:
        """Blocks that must be zeroed before the step that is being planned."""
        scrubs, self._scrubs = self._scrubs, []
        return scrubs

    # ---------------------------------------------------------------- commit

    def commit(self, sequence: SequenceKV, tokens: list[int], computed: int) -> None:
        """`computed` tokens are in the cache for good: publish blocks that got full, free blocks
        that no later query reads. Called when `computed` reaches `sequence.next_commit`.

        Steps in flight start at `computed` or later, so what is freed here none of them reads.
        """
        publish = self.enable_prefix_caching and sequence.epoch == self._epoch
        for g, group in enumerate(self.groups):
            if publish:
                self._publish(sequence, g, tokens, computed)
            first = group.first_needed(computed)
            if first > sequence.freed[g]:
                self._free_front(sequence, g, first)
        self._plan_commit(sequence, computed)

    def _publish(self, sequence: SequenceKV, g: int, tokens: list[int], computed: int) -> None:
        group = self.groups[g]
        num_full = computed // group.block_size
        if num_full <= sequence.published[g]:
            return
        chain = self._chain(sequence, group, tokens, computed)
        table = sequence.tables[g]
        for index in range(sequence.published[g], num_full):
            group.pool.publish(table[index], chain[index])
        sequence.published[g] = num_full

    def _free_front(self, sequence: SequenceKV, g: int, first: int) -> None:
        table = sequence.tables[g]
        start = sequence.freed[g]
        first = min(first, len(table))
        gone = [block for block in table[start:first] if block != SCRATCH]
        table[start:first] = [SCRATCH] * (first - start)
        sequence.freed[g] = first
        self.groups[g].pool.release(reversed(gone))

    def _plan_commit(self, sequence: SequenceKV, computed: int) -> None:
        if self.enable_prefix_caching or any(group.window for group in self.groups):
            sequence.next_commit = min(group.next_event(computed) for group in self.groups)
        else:
            sequence.next_commit = NEVER

    # ---------------------------------------------------------------- fork

    def fork(self, source: SequenceKV, target: SequenceKV, computed: int) -> bool:
        """Let `target` (which holds nothing) start with the first `computed` tokens of `source`.

        Full blocks are shared; the partial one gets a lease and is copied when `target` is given
        a block of its own (`unshare`). False, with nothing done, if `source` has lost a block
        that a query at `computed` reads.
        """
        for g, group in enumerate(self.groups):
            needed = source.tables[g][group.first_needed(computed) : group.num_blocks(computed)]
            short = len(source.tables[g]) < group.num_blocks(computed)
            if short or SCRATCH in needed:
                return False
        target.epoch = source.epoch
        target.capacity = NEVER
        for g, group in enumerate(self.groups):
            self._share(source, target, g, computed)
            target.capacity = min(target.capacity, len(target.tables[g]) * group.block_size)
        for size, chain in source.chains.items():
            target.chains[size] = chain[: computed // size]
        self._plan_commit(target, computed)
        return True

    def _share(self, source: SequenceKV, target: SequenceKV, g: int, computed: int) -> None:
        group = self.groups[g]
        num_full, rest = divmod(computed, group.block_size)
        first = group.first_needed(computed)
        shared = [SCRATCH] * min(first, num_full) + source.tables[g][first:num_full]
        for block in shared[first:]:
            group.pool.acquire(block)
        target.tables[g] = shared
        target.freed[g] = min(first, num_full)
        # What lies before the window is not the target's to publish, published or not.
        target.published[g] = max(target.freed[g], min(source.published[g], num_full))
        if rest:
            partial = source.tables[g][num_full]
            group.pool.acquire(partial)
            target.copies.append((g, partial))

    def unshare(self, sequence: SequenceKV, num_tokens: int, step: int) -> list[BlockCopy] | None:
        """Grow a forked sequence to `num_tokens` and say which blocks to copy before the forward.

        The sources stay leased by `step`, which does the copying. None if there is no room.
        """
        starts = [len(table) for table in sequence.tables]
        if self.grow(sequence, num_tokens) is None:
            return None
        copies = [
            BlockCopy(g, source, sequence.tables[g][starts[g]]) for g, source in sequence.copies
        ]
        if copies:
            self._hold(step, sequence, [[] for _ in self.groups], sequence.copies)
            sequence.copies = []
        return copies

    # ---------------------------------------------------------------- release

    def release(self, sequence: SequenceKV, step: int | None) -> None:
        """The sequence gives up its blocks; those go with `step` if that step still uses them."""
        tables, copies = sequence.tables, sequence.copies
        sequence.clear(len(self.groups))
        if step is None:
            self._free(tables, copies)
        else:
            self._hold(step, sequence, tables, copies)

    def _hold(
        self,
        step: int,
        sequence: SequenceKV,
        tables: list[list[int]],
        copies: list[tuple[int, int]],
    ) -> None:
        freeing = []
        for g, (group, table) in enumerate(zip(self.groups, tables, strict=True)):
            freeing.append(sum(block != SCRATCH and group.pool.refs[block] == 1 for block in table))
            self._freeing[g] += freeing[-1]
        self._held.setdefault(step, []).append(_Held(sequence, tables, copies, freeing))

    def end_step(self, step: int) -> None:
        """The step is over: what was left to it is freed."""
        for held in self._held.pop(step, ()):
            for g, count in enumerate(held.freeing):
                self._freeing[g] -= count
            self._free(held.tables, held.copies)

    def _free(self, tables: list[list[int]], copies: list[tuple[int, int]]) -> None:
        for group, table in zip(self.groups, tables, strict=True):
            # The end of a prefix goes first: a longer chain is of use to fewer requests.
            group.pool.release(block for block in reversed(table) if block != SCRATCH)
        for g, block in copies:
            self.groups[g].pool.release((block,))

    def taint(self, sequence: SequenceKV, verified: int) -> None:
        """What the sequence wrote from token `verified` on may hold NaN: take it out of the index,
        and scrub it before anyone else gets it. Called before `release`, or while a step holds it.
        """
        tables = [sequence.tables]
        for entries in self._held.values():
            tables += [held.tables for held in entries if held.sequence is sequence]
        for g, group in enumerate(self.groups):
            first = verified // group.block_size
            written = {block for table in tables for block in table[g][first:]}
            chain = sequence.chains.get(group.block_size, [])
            for digest in chain[first : sequence.published[g]]:  # also those out of the window
                written.update(group.pool.forget(digest))
            for block in written - {SCRATCH}:
                self._taint_block(g, block)

    def _taint_block(self, g: int, block: int) -> None:
        pool = self.groups[g].pool
        digest = pool.digests[block]
        if digest is not None:
            pool.forget(digest)
        pool.tainted.add(block)

    # ---------------------------------------------------------------- accounting

    def usage(self) -> Usage:
        """Exact at any moment: a cached block without a lease counts as free."""
        free = sum(group.pool.num_free for group in self.groups)
        total = sum(group.pool.num_blocks - 1 for group in self.groups)
        return Usage(total - free, free, total)
