"""Seeded bugs. Each changes one method or attribute while it is on; a state machine has to fail.

`@mutant(machine)` names the machine that must notice; the function applies the bug through the
`Patch` it is given, which undoes it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from helpers.machines import KVMachine, SchedulerMachine

from trimaran.core import admission, fork, scheduler, waiting
from trimaran.core.kv import block_pool, manager, sequence
from trimaran.core.request import Request, Status
from trimaran.core.sequences import Sequences
from trimaran.core.settlement import Settlement
from trimaran.core.types import FinishReason

KVManager = manager.KVManager
BlockPool = block_pool.BlockPool
Group = sequence.Group
Scheduler = scheduler.Scheduler


class Patch:
    """Sets attributes, and puts them back."""

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> Any:
        """Replace `owner.name`; returns what stood there."""
        original = owner.__dict__[name]
        self._undo.append((owner, name, original))
        setattr(owner, name, value)
        return original

    def undo(self) -> None:
        for owner, name, original in reversed(self._undo):
            setattr(owner, name, original)


@dataclass(frozen=True)
class Mutant:
    name: str
    machine: type[KVMachine] | type[SchedulerMachine]
    apply: Callable[[Patch], None]

    @contextmanager
    def on(self) -> Iterator[None]:
        patch = Patch()
        try:
            self.apply(patch)
            yield
        finally:
            patch.undo()


MUTANTS: list[Mutant] = []


def mutant(machine: type) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def register(apply: Callable[[Patch], None]) -> Callable[[Patch], None]:
        MUTANTS.append(Mutant(apply.__name__, machine, apply))
        return apply

    return register


# -------------------------------------------------------------------------------- block pool


@mutant(KVMachine)
def double_free(patch: Patch) -> None:
    """A block that is released while others lease it is put on the free list."""

    def release(self: Any, blocks: Any) -> None:
        for block in list(blocks):
            original(self, (block,))
            if self.refs[block] == 1:
                original(self, (block,))

    original = patch.set(BlockPool, "release", release)


@mutant(SchedulerMachine)
def stale_hash_after_eviction(patch: Patch) -> None:
    """A reused block can still be found under its old content."""

    def take_first(self: Any) -> int:
        block = self._next[block_pool.SCRATCH]
        self._unlink(block)
        self.refs[block] = 1
        return int(block)

    patch.set(BlockPool, "_take_first", take_first)


@mutant(KVMachine)
def hit_not_leased(patch: Patch) -> None:
    """A cached block that is hit stays on the free list."""

    def acquire(self: Any, block: int) -> None:
        self.refs[block] += 1

    patch.set(BlockPool, "acquire", acquire)


@mutant(KVMachine)
def collapse_forgets_the_survivor(patch: Patch) -> None:
    """Freeing a duplicate drops the index entry of all blocks with that content."""

    def collapse(self: Any, block: int) -> None:
        digest = self.digests[block]
        if digest is not None and len(self.index[digest]) > 1:
            self.digests[block] = None
            del self.index[digest]

    patch.set(BlockPool, "_collapse", collapse)


@mutant(SchedulerMachine)
def tainted_blocks_not_scrubbed(patch: Patch) -> None:
    """Blocks of a failed row are given out with the NaN still in them."""
    patch.set(KVManager, "_scrub", lambda self, g, blocks: None)


# -------------------------------------------------------------------------------- manager


@mutant(SchedulerMachine)
def early_free_of_window_blocks(patch: Patch) -> None:
    """A block is freed one block before the window has left it."""

    def first_needed(self: Any, computed: int) -> int:
        found = int(original(self, computed))
        return found + 1 if self.window and found + 1 <= computed // self.block_size else found

    original = patch.set(Group, "first_needed", first_needed)


@mutant(KVMachine)
def window_off_by_one(patch: Patch) -> None:
    """The window is taken to be one token shorter."""

    def first_needed(self: Any, computed: int) -> int:
        return max(0, computed - self.window + 2) // self.block_size if self.window else 0

    patch.set(Group, "first_needed", first_needed)


@mutant(SchedulerMachine)
def window_blocks_not_needed_for_a_hit(patch: Patch) -> None:
    """A sliding-window group takes a hit as long as the longest of its blocks."""

    def longest_hit(self: Any, chain: list[bytes], limit: int) -> int:
        if self.window is None:
            return int(original(self, chain, limit))
        for end in range(limit // self.block_size, 0, -1):
            if self.pool.lookup(chain[end - 1]) is not None:
                return end * int(self.block_size)
        return 0

    original = patch.set(Group, "longest_hit", longest_hit)


@mutant(SchedulerMachine)
def missing_salt(patch: Patch) -> None:
    """All requests hash from one root."""

    def make(self: Any, root: bytes, *, reuse: bool = True) -> Any:
        return original(self, bytes(32), reuse=reuse)

    original = patch.set(KVManager, "sequence", make)


@mutant(KVMachine)
def parent_digest_ignored(patch: Patch) -> None:
    """A block is known by its own tokens only."""

    def extend(
        chain: list[bytes], root: bytes, tokens: Any, block_size: int, num_blocks: int
    ) -> None:
        for start in range(len(chain) * block_size, num_blocks * block_size, block_size):
            chain.append(bytes(tokens[start : start + block_size]) + root)

    patch.set(manager, "extend_chain", extend)


@mutant(SchedulerMachine)
def last_token_not_recomputed(patch: Patch) -> None:
    """A full hit leaves nothing to compute."""

    def find_hit(self: Any, kv: Any, tokens: list[int]) -> Any:
        return original(self, kv, [*tokens, 0])

    original = patch.set(KVManager, "find_hit", find_hit)


@mutant(SchedulerMachine)
def partial_block_shared_on_fork(patch: Patch) -> None:
    """A fork writes into the block that its parent writes into."""

    def share(self: Any, source: Any, target: Any, g: int, computed: int) -> None:
        original(self, source, target, g, computed)
        for group, block in target.copies:
            if group == g:
                target.tables[g].append(block)
        target.copies = [entry for entry in target.copies if entry[0] != g]

    original = patch.set(KVManager, "_share", share)


@mutant(SchedulerMachine)
def partial_block_not_copied(patch: Patch) -> None:
    """A fork gets a block of its own, but nothing is copied into it."""

    def unshare(self: Any, kv: Any, num_tokens: int, step: int) -> Any:
        return None if original(self, kv, num_tokens, step) is None else []

    original = patch.set(KVManager, "unshare", unshare)


@mutant(KVMachine)
def fork_takes_no_lease(patch: Patch) -> None:
    """The copy source of a fork may be freed before it is copied."""

    def share(self: Any, source: Any, target: Any, g: int, computed: int) -> None:
        original(self, source, target, g, computed)
        for group, block in target.copies:
            if group == g:
                self.groups[g].pool.refs[block] -= 1

    original = patch.set(KVManager, "_share", share)


@mutant(KVMachine)
def publishes_what_is_not_computed(patch: Patch) -> None:
    """A block is published as soon as its tokens are known."""

    def publish(self: Any, kv: Any, g: int, tokens: list[int], computed: int) -> None:
        original(self, kv, g, tokens, max(computed, min(len(tokens), kv.capacity)))

    original = patch.set(KVManager, "_publish", publish)


@mutant(KVMachine)
def allocation_not_all_or_nothing(patch: Patch) -> None:
    """The room of the last group is not looked at."""

    def room(self: Any, kv: Any, hit: Any = None) -> int:
        groups = self.groups
        self.groups = groups[:1]
        try:
            return int(original(self, kv, hit))
        finally:
            self.groups = groups

    original = patch.set(KVManager, "room", room)


@mutant(SchedulerMachine)
def reuse_of_a_block_in_flight(patch: Patch) -> None:
    """Blocks of a sequence that goes are free at once, whoever still runs with them."""
    original = KVManager.release
    patch.set(KVManager, "release", lambda self, kv, step: original(self, kv, None))


@mutant(SchedulerMachine)
def step_lease_never_ends(patch: Patch) -> None:
    """What a step holds is not given back."""
    patch.set(KVManager, "end_step", lambda self, step: None)


@mutant(SchedulerMachine)
def failed_row_stays_cached(patch: Patch) -> None:
    """The blocks of a row with NaN logits keep their digests and are not marked."""
    patch.set(KVManager, "taint", lambda self, kv, verified: None)


@mutant(SchedulerMachine)
def reset_keeps_the_running_ones_publishing(patch: Patch) -> None:
    """A reset empties the pools' counts instead of the index."""

    def reset(self: Any) -> bool:
        for group in self.groups:
            group.pool.index.clear()
        return True

    patch.set(KVManager, "reset_prefix_cache", reset)


# -------------------------------------------------------------------------------- sequences


@mutant(SchedulerMachine)
def leak_on_abort(patch: Patch) -> None:
    """An aborted sequence keeps its leases."""

    def end(self: Any, request: Request, reason: FinishReason) -> None:
        if reason is FinishReason.ABORT:
            self.holders.pop(request, None)
            request.kv.clear(len(self.kv.groups))
        original(self, request, reason)

    original = patch.set(Sequences, "end", end)


@mutant(SchedulerMachine)
def row_leak_on_abort(patch: Patch) -> None:
    """The row of an aborted sequence is never free again."""

    def leave_row(self: Any, request: Request) -> None:
        row = request.row
        original(self, request)
        if row is not None and request.status is Status.RUNNING and not request.num_generated:
            self._free_rows.remove(row)

    original = patch.set(Sequences, "_leave_row", leave_row)


@mutant(SchedulerMachine)
def removed_rows_not_told(patch: Patch) -> None:
    """The executor is not told that a row is free."""
    patch.set(Sequences, "take_removed_rows", lambda self: [])


@mutant(SchedulerMachine)
def preempted_output_lost(patch: Patch) -> None:
    """A token that arrives for a preempted sequence is dropped."""

    def take_tokens(self: Any, step: Any, request: Request, *rest: Any) -> None:
        if request in step.stale:
            request.num_pending -= request.yields
            return
        original(self, step, request, *rest)

    original = patch.set(Settlement, "_take_tokens", take_tokens)


@mutant(SchedulerMachine)
def pending_tokens_dropped_on_preemption(patch: Patch) -> None:
    """A preempted sequence forgets that a token is on the way, and is resumed without it."""

    def preempt(self: Any, request: Request) -> None:
        original(self, request)
        request.num_pending = 0
        request.last_step = -1

    original = patch.set(Sequences, "preempt", preempt)


@mutant(SchedulerMachine)
def preempted_keeps_computed(patch: Patch) -> None:
    """A sequence that lost its blocks believes that its tokens are still computed."""

    def drop_blocks(self: Any, request: Request) -> None:
        computed = request.num_computed
        original(self, request)
        if request.status is Status.WAITING:
            request.num_computed = min(computed, 1)
            request.tokens[:] = request.tokens if computed < 3 else request.tokens[:-1]

    original = patch.set(Sequences, "drop_blocks", drop_blocks)


@mutant(SchedulerMachine)
def fork_leader_end_forgets_siblings(patch: Patch) -> None:
    """When the child that computes the prompt ends, the others wait for ever."""
    patch.set(fork.ForkGroup, "ended", lambda self, request: None)


# -------------------------------------------------------------------------------- scheduler


@mutant(SchedulerMachine)
def one_token_over_the_budget(patch: Patch) -> None:
    def chunk(self: Any, request: Request, wanted: int, budget: int) -> int:
        count = int(original(self, request, wanted, budget))
        return count + 1 if wanted > count == budget else count

    original = patch.set(Scheduler, "_chunk", chunk)


@mutant(SchedulerMachine)
def one_sequence_too_many(patch: Patch) -> None:
    def init(self: Any, kv: Any, key: Any, max_num_seqs: int, clock: Any) -> None:
        original(self, kv, key, max_num_seqs + 1, clock)

    original = patch.set(Sequences, "__init__", init)


@mutant(SchedulerMachine)
def one_queued_request_too_many(patch: Patch) -> None:
    def check(self: Any, origin: Any) -> None:
        self._queue.num_new -= 1
        try:
            original(self, origin)
        finally:
            self._queue.num_new += 1

    original = patch.set(admission.Admission, "_check_queue", check)


@mutant(SchedulerMachine)
def queued_tokens_not_given_back(patch: Patch) -> None:
    """A request that leaves the queue still counts with its tokens."""

    def discard(self: Any, request: Request) -> None:
        tokens = self.num_new_tokens
        original(self, request)
        self.num_new_tokens = tokens

    original = patch.set(waiting.WaitingQueue, "discard", discard)


@mutant(SchedulerMachine)
def finish_does_not_truncate(patch: Patch) -> None:
    patch.set(Request, "truncate", lambda self, num_generated: 0)


@mutant(SchedulerMachine)
def tokens_behind_the_limit(patch: Patch) -> None:
    """One token more than max_tokens."""

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.max_total += 1

    original = patch.set(Request, "__init__", init)


@mutant(SchedulerMachine)
def min_tokens_ignored(patch: Patch) -> None:
    """A stop token ends the sequence before min_tokens."""

    def append(self: Request, token: int) -> Any:
        self.min_total = self.num_prompt
        return original(self, token)

    original = patch.set(Request, "append", append)


@mutant(SchedulerMachine)
def ended_request_gets_tokens(patch: Patch) -> None:
    """The output of a step that was in flight when the sequence ended is passed on."""

    def take_rows(self: Any, step: Any, output: Any) -> None:
        original(self, step, output)
        for request, tokens in zip(step.requests, output.tokens, strict=True):
            if request.finished and tokens and request.tokens[-1] != tokens[-1]:
                self._emit(request, tokens, None, None)

    original = patch.set(Settlement, "_take_rows", take_rows)


@mutant(SchedulerMachine)
def prompt_logprobs_use_the_cache(patch: Patch) -> None:
    """A request that wants log-probabilities of its prompt skips computing a part of it."""

    def make(self: Any, root: bytes, *, reuse: bool = True) -> Any:
        return original(self, root, reuse=True)

    original = patch.set(KVManager, "sequence", make)
