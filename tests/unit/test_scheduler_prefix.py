"""Requests that come together and begin alike: the common part is computed once."""

from __future__ import annotations

import pytest
from helpers.null_model import NullEngine

COMMON = list(range(1, 17))


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_shared_prefix_is_computed_by_the_first_alone(run_ahead: int) -> None:
    engine = NullEngine(run_ahead=run_ahead, max_num_batched_tokens=64)
    for last in (30, 31, 32):
        engine.add([*COMMON, last], max_tokens=3, eos=False)
    assert engine.step().counts == [17]
    counts = []
    while len(counts) < 3:
        counts += engine.step().counts
    assert sorted(counts)[:3] == [1, 1, 1] and 17 not in counts
    engine.run()
    engine.check_results()
    engine.check_drained()
    assert [engine.results[f"r{i}", 0].num_cached for i in range(3)] == [0, 16, 16]


def test_the_others_follow_a_prefix_of_many_chunks() -> None:
    engine = NullEngine(max_num_batched_tokens=12, long_prefill_token_threshold=8)
    engine.add([*COMMON, 30], max_tokens=1, eos=False)
    engine.add([*COMMON, 31], max_tokens=1, eos=False)
    computed = 0
    while engine.scheduler.has_work:
        computed += engine.step().num_tokens
    engine.check_results()
    assert computed == 18


def test_little_in_common_holds_nobody_up() -> None:
    engine = NullEngine(max_num_batched_tokens=64)
    for i in range(3):
        engine.add([*COMMON[:4], *range(20 + i, 30 + i)], max_tokens=1, eos=False)
    assert engine.step().counts == [14, 14, 14]


def test_who_comes_behind_is_not_held_up_and_order_is_kept() -> None:
    engine = NullEngine(max_num_seqs=3, max_num_batched_tokens=64)
    for prompt in ([*COMMON, 30], [*COMMON, 31], [40, 41], [42, 43]):
        engine.add(prompt, max_tokens=1, eos=False)
    # One row is kept for who waits.
    assert engine.step().counts == [17, 2]
    assert engine.step().counts == [1, 2]
    engine.run()
    engine.check_results()


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_the_first_ends_before_its_prefix_is_computed(run_ahead: int) -> None:
    engine = NullEngine(run_ahead=run_ahead, max_num_batched_tokens=8)
    engine.add([*COMMON, 30], max_tokens=1, eos=False)
    engine.add([*COMMON, 31], max_tokens=1, eos=False)
    engine.step()
    engine.scheduler.abort("r0")
    engine.run()
    engine.check_results()
    engine.check_drained()
    assert len(engine.results["r1", 0].tokens) == 1


def test_prefixes_of_other_roots_are_no_reason_to_wait() -> None:
    engine = NullEngine(max_num_batched_tokens=64)
    for salt in (1, 2):
        engine.add([*COMMON, 30], max_tokens=1, eos=False, salt=salt)
    assert engine.step().counts == [17, 17]


def test_what_a_window_has_lost_is_not_waited_for() -> None:
    engine = NullEngine(
        windows=(None, 8), max_num_batched_tokens=64, long_prefill_token_threshold=8
    )
    engine.add([*COMMON, *range(17, 41)], max_tokens=1, eos=False)
    for _ in range(3):
        assert engine.step().counts == [8]
    engine.scheduler.kv.groups[1].pool.clear_index()  # as if others had taken the blocks
    engine.add([*COMMON, 49], max_tokens=1, eos=False)
    assert engine.step().counts == [8, 8], "the common blocks are published: nothing more comes"
    engine.run()
    engine.check_results()


def test_without_chunks_order_is_kept() -> None:
    engine = NullEngine(max_num_batched_tokens=20, enable_chunked_prefill=False)
    for prompt in ([*COMMON, 30], [*COMMON, 31], [40, 41]):
        engine.add(prompt, max_tokens=1, eos=False)
    assert engine.step().counts == [17]
    engine.run()
    engine.check_results()
