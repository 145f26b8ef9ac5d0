"""Batch preparation against `core.runner`'s row table, one token at a time."""

from __future__ import annotations

import pytest
import torch

from trimaran.kernels_cuda.portable import batch
from trimaran.kernels_cuda.portable.batch import Group
from trimaran.kernels_cuda.portable.tuning import Table

ROWS, WIDTH = 9, 700
CASES = {
    "decode": [1, 1, 1, 1, 1],
    "mixed": [1, 600, 0, 7, 0, 1, 64],
    "one": [1],
    "only the last": [0, 0, 3],
    "nothing": [0, 0],
    "nobody": [],
}


@pytest.mark.parametrize("room", [0, 5])
@pytest.mark.parametrize("case", CASES)
def test_batches(case: str, room: int, device: torch.device, table: Table) -> None:
    counts = torch.tensor(CASES[case], dtype=torch.int32, device=device)
    rows = torch.randperm(ROWS, device=device)[: len(counts)].int()
    computed = torch.randint(0, 90, (ROWS,), dtype=torch.int32, device=device)
    tokens = torch.randint(1, 1000, (ROWS, WIDTH), dtype=torch.int32, device=device)
    groups = [
        Group(torch.randint(0, 99, (ROWS, -(-WIDTH // size)), dtype=torch.int32).to(device), size)
        for size in (16, 48)
    ]
    total = int(counts.sum())
    found = batch.prepare(rows, counts, computed, tokens, groups, total + room, table)
    assert found.query_starts.tolist() == [0, *counts.cumsum(0).tolist()]
    assert found.seq_lens.equal(computed[rows] + counts)
    row = rows.repeat_interleave(counts).long()
    start = found.query_starts[:-1].repeat_interleave(counts)
    position = computed[row] + torch.arange(total, device=device) - start
    assert found.positions[:total].equal(position)
    assert found.token_ids[:total].equal(tokens[row, position])
    assert found.positions[total:].eq(0).all() and found.token_ids[total:].eq(0).all()
    for ours, (blocks, size) in zip(found.groups, groups, strict=True):
        slots = blocks[row, position // size].long() * size + position % size
        assert ours.slots[:total].equal(slots)
        assert ours.slots[total:].eq(-1).all()
        for seq, length in enumerate(found.seq_lens.tolist()):
            used = -(-length // size)
            assert ours.block_tables[seq, :used].equal(blocks[rows[seq], :used])


def test_more_sequences_than_a_tile(device: torch.device, table: Table) -> None:
    counts = torch.randint(0, 3, (1100,), dtype=torch.int32, device=device)
    rows = torch.arange(1100, dtype=torch.int32, device=device)
    computed, tokens = torch.zeros_like(rows), torch.zeros(1100, 2, dtype=torch.int32)
    group = Group(rows[:, None].contiguous(), 4)
    total = int(counts.sum())
    found = batch.prepare(rows, counts, computed, tokens.to(device), [group], total, table)
    assert found.query_starts[1:].equal(counts.cumsum(0).int())
    assert (found.groups[0].slots // 4).equal(rows.long().repeat_interleave(counts))


def test_tokens_past_their_row_are_not_written(device: torch.device, table: Table) -> None:
    one = torch.ones(1, dtype=torch.int32, device=device)
    blocks = torch.full((2, 1), 3, dtype=torch.int32, device=device)
    tokens = torch.full((2, 6), 8, dtype=torch.int32, device=device)
    found = batch.prepare(
        0 * one, 3 * one, one.new_tensor([3, 9]), tokens, [Group(blocks, 4)], 3, table
    )
    assert found.groups[0].slots.tolist() == [15, -1, -1]
    assert found.token_ids.tolist() == [8, 8, 8]
    assert found.positions.tolist() == [3, 4, 5]
