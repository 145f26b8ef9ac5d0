"""Exact cases of hashing, the block pool and the KV manager (the state machine does the rest)."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys

import pytest
from helpers.machines import Group

from trimaran.core.kv.block_pool import BlockPool
from trimaran.core.kv.hashing import block_digest, extend_chain, prefix_root
from trimaran.core.kv.manager import KVManager
from trimaran.core.kv.sequence import SequenceKV
from trimaran.core.plan import BlockRef

ROOT = bytes(32)
BASE = {"model": "m", "kv_dtype": "bfloat16"}


def computed(manager: KVManager, tokens: list[int], root: bytes = ROOT) -> SequenceKV:
    """A sequence whose tokens are all computed and committed."""
    kv = manager.sequence(root)
    hit = manager.find_hit(kv, tokens)
    assert manager.begin(kv, hit, len(tokens))
    manager.commit(kv, tokens, len(tokens))
    return kv


# ---------------------------------------------------------------------------------- hashing


@pytest.mark.parametrize(
    "change",
    [
        {"model": "n"},
        {"kv_dtype": "float32"},
        {"adapter": b"a"},
        {"numerics": "deterministic"},
        {"key_id": b"key"},
        {"server_secret": b"secret"},
        {"cache_salt": "salt"},
    ],
)
def test_every_field_changes_the_root(change: dict[str, object]) -> None:
    root = prefix_root(**BASE)  # type: ignore[arg-type]
    assert len(root) == 32
    assert prefix_root(**(BASE | change)) != root  # type: ignore[arg-type]
    assert prefix_root(**BASE) == root  # type: ignore[arg-type]


def test_root_is_unambiguous() -> None:
    assert prefix_root(model="ab", kv_dtype="c") != prefix_root(model="a", kv_dtype="bc")
    assert prefix_root(**BASE, numerics="x", cache_salt="y") != prefix_root(
        **BASE, numerics="xy", cache_salt=""
    )
    # The salt narrows: with it, tenants stay apart.
    roots = {prefix_root(**BASE, key_id=key, cache_salt="s") for key in (b"a", b"b")}
    assert len(roots) == 2


def test_block_digest_is_what_the_contract_says() -> None:
    expected = hashlib.sha256(ROOT + struct.pack("<3i", 1, 2, 70_000)).digest()
    assert block_digest(ROOT, [1, 2, 70_000]) == expected
    chain: list[bytes] = []
    extend_chain(chain, ROOT, [1, 2, 3, 4, 5], 2, 2)
    assert chain == [block_digest(ROOT, [1, 2]), block_digest(block_digest(ROOT, [1, 2]), [3, 4])]


# ---------------------------------------------------------------------------------- pool


def test_pool_evicts_the_longest_unused_first() -> None:
    pool = BlockPool(5)
    blocks = pool.allocate(4)
    assert blocks == [1, 2, 3, 4] and pool.num_free == 0
    for block in blocks:
        pool.publish(block, bytes([block]))
    pool.release([3, 1])
    pool.release([4, 2])
    pool.acquire(1)  # used again: it is no longer the oldest
    pool.release([1])
    assert pool.free_list() == [3, 4, 2, 1]
    assert pool.allocate(1) == [3] and pool.lookup(b"\3") is None
    assert pool.lookup(b"\4") == 4


def test_pool_reuses_blocks_without_content_first() -> None:
    pool = BlockPool(4)
    pool.publish(pool.allocate(3)[0], b"x")
    pool.release([1, 2, 3])
    assert pool.free_list() == [3, 2, 1]


def test_duplicates_collapse_when_freed() -> None:
    pool = BlockPool(4)
    first, second, _ = pool.allocate(3)
    pool.publish(first, b"x")
    pool.publish(second, b"x")
    pool.release([first])
    assert pool.lookup(b"x") == second and pool.digests[first] is None
    pool.release([second])
    assert pool.lookup(b"x") == second, "the last copy stays cached"


def test_pool_refuses_what_is_a_defect() -> None:
    pool = BlockPool(3)
    with pytest.raises(RuntimeError, match="more often"):
        pool.release([1])
    with pytest.raises(RuntimeError, match="2 free"):
        pool.allocate(3)
    with pytest.raises(ValueError, match="at least 2"):
        BlockPool(1)


# ---------------------------------------------------------------------------------- reuse


def test_full_hit_leaves_the_last_token() -> None:
    manager = KVManager([Group(4, 20, None)])
    tokens = list(range(8))
    manager.release(computed(manager, tokens), None)
    hit = manager.find_hit(manager.sequence(ROOT), tokens)
    assert hit.num_tokens == 4
    assert manager.find_hit(manager.sequence(ROOT), [*tokens, 9]).num_tokens == 8
    assert manager.find_hit(manager.sequence(b"\1" * 32), [*tokens, 9]).num_tokens == 0
    assert manager.find_hit(manager.sequence(ROOT, reuse=False), [*tokens, 9]).num_tokens == 0


def test_window_group_needs_only_the_last_window() -> None:
    manager = KVManager([Group(4, 20, 5)])
    tokens = list(range(16))
    kv = computed(manager, tokens)
    assert kv.tables[0][:3] == [0, 0, 0] and kv.tables[0][3] != 0
    hit = manager.find_hit(manager.sequence(ROOT), [*tokens, 99])
    # The query at 16 reads 12 … 16: one block is enough.
    assert hit.num_tokens == 16 and hit.tables[0] == [0, 0, 0, kv.tables[0][3]]


def test_groups_agree_on_a_common_length() -> None:
    manager = KVManager([Group(4, 20, None), Group(2, 40, 3)])
    tokens = list(range(13))
    kv = computed(manager, tokens)
    manager.release(kv, None)
    pool = manager.groups[1].pool
    chain = kv.chains[2]
    assert manager.find_hit(manager.sequence(ROOT), tokens).num_tokens == 12
    pool.forget(chain[5])
    # Now 10 is the window group's longest, which ends in no whole block of the first group.
    assert manager.find_hit(manager.sequence(ROOT), tokens).num_tokens == 8


def test_reset_makes_holders_publish_nothing_more() -> None:
    manager = KVManager([Group(2, 20, None)])
    tokens = list(range(9))
    kv = manager.sequence(ROOT)
    manager.begin(kv, manager.find_hit(kv, tokens), 4)
    manager.commit(kv, tokens, 4)
    assert manager.reset_prefix_cache()
    assert manager.grow(kv, 9) is not None
    manager.commit(kv, tokens, 9)
    assert manager.find_hit(manager.sequence(ROOT), tokens).num_tokens == 0
    manager.release(kv, None)
    assert manager.usage().used == 0


# ---------------------------------------------------------------------------------- room


@pytest.mark.parametrize("num_blocks", [2, 3, 5])
@pytest.mark.parametrize(("window", "block_size"), [(None, 4), (3, 2), (5, 4), (1, 2)])
def test_can_ever_hold_is_exact(num_blocks: int, window: int | None, block_size: int) -> None:
    """Computed token by token in an otherwise empty pool, just what was promised fits."""
    manager = KVManager([Group(block_size, num_blocks, window)])
    tokens = list(range(40))
    kv = manager.sequence(ROOT)
    assert manager.begin(kv, manager.find_hit(kv, tokens[:1]), 1)
    reached = 1
    while reached < len(tokens) and manager.grow(kv, reached + 1) is not None:
        reached += 1
        manager.commit(kv, tokens, reached)
    assert manager.can_ever_hold(reached, 1)
    assert reached == len(tokens) or not manager.can_ever_hold(reached + 1, 1)


def test_allocation_is_all_or_nothing_over_groups() -> None:
    manager = KVManager([Group(2, 20, None), Group(2, 3, None)])
    kv = manager.sequence(ROOT)
    hit = manager.find_hit(kv, list(range(6)))
    assert not manager.begin(kv, hit, 5)
    assert manager.usage().used == 0
    assert manager.begin(kv, hit, 4) and manager.grow(kv, 5) is None
    assert manager.usage().used == 4


# ---------------------------------------------------------------------------------- leases


def test_fork_shares_full_blocks_and_copies_the_partial_one() -> None:
    manager = KVManager([Group(4, 20, None)])
    source = computed(manager, list(range(10)))
    target = manager.sequence(ROOT)
    assert manager.fork(source, target, 9)
    assert target.tables[0] == source.tables[0][:2] and target.capacity == 8
    partial = source.tables[0][2]
    manager.release(source, None)
    assert manager.groups[0].pool.refs[partial] == 1, "the copy has a lease of its own"
    copies = manager.unshare(target, 10, step=7)
    assert copies is not None and copies[0].source == partial
    assert copies[0].target == target.tables[0][2] != partial
    assert manager.groups[0].pool.refs[partial] == 1, "the step that copies holds it"
    manager.end_step(7)
    assert manager.groups[0].pool.refs[partial] == 0


def test_fork_at_a_block_border_copies_nothing() -> None:
    manager = KVManager([Group(4, 20, None)])
    source = computed(manager, list(range(8)))
    target = manager.sequence(ROOT)
    assert manager.fork(source, target, 8) and target.copies == []
    assert manager.unshare(target, 9, step=1) == []


def test_fork_is_refused_where_the_window_has_passed() -> None:
    manager = KVManager([Group(2, 20, 2)])
    source = computed(manager, list(range(9)))
    assert not manager.fork(source, manager.sequence(ROOT), 4)
    assert manager.fork(source, manager.sequence(ROOT), 9)


def test_a_block_is_freed_with_its_last_lease() -> None:
    manager = KVManager([Group(4, 20, None)])
    kv = computed(manager, list(range(4)))
    block = kv.tables[0][0]
    pool = manager.groups[0].pool
    pool.acquire(block)
    manager.release(kv, step=3)
    pool.release([block])
    assert manager.usage().used == 1, "the step still has it"
    pool.acquire(block)
    manager.end_step(3)
    assert manager.usage().used == 1, "the transfer still has it"
    pool.release([block])
    assert manager.usage().used == 0
    with pytest.raises(RuntimeError, match="more often"):
        pool.release([block])


def test_tainted_blocks_are_scrubbed_once_before_reuse() -> None:
    manager = KVManager([Group(2, 4, None)])
    tokens = list(range(6))
    kv = computed(manager, tokens)
    manager.taint(kv, 2)
    manager.release(kv, None)
    assert manager.find_hit(manager.sequence(ROOT), tokens).num_tokens == 2
    assert manager.take_scrubs() == []
    other = computed(manager, [9] * 6, b"\1" * 32)
    assert sorted(manager.take_scrubs()) == [BlockRef(0, 2), BlockRef(0, 3)]
    manager.release(other, None)
    computed(manager, [8] * 6, b"\1" * 32)
    assert manager.take_scrubs() == []


def test_no_torch() -> None:
    code = (
        "import sys, trimaran.core.scheduler, trimaran.core.kv.manager, trimaran.core.request\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
