"""A step's batch from tensors that stay on the device, for steps planned before the last one ended.

The host knows which rows take part and how many tokens it makes room for; how far each row has come
may be known on the device alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import Table


class Group(NamedTuple):
    """A cache group: `blocks` int32 `[rows, columns]`, each row's block table."""

    blocks: Tensor
    block_size: int


class GroupBatch(NamedTuple):
    """`slots` int64 `[tokens]`, block * block_size + offset, -1 for tokens of no sequence and those
    past a row's block table; `block_tables` int32 `[seqs, columns]`, whose entries past a
    sequence's last block are undefined."""

    slots: Tensor
    block_tables: Tensor


class Batch(NamedTuple):
    """`query_starts` int32 `[seqs + 1]`; `seq_lens` int32 `[seqs]`, with this step's tokens;
    `token_ids` int32 and `positions` int64 `[tokens]`, 0 past the last sequence's end."""

    query_starts: Tensor
    seq_lens: Tensor
    token_ids: Tensor
    positions: Tensor
    groups: tuple[GroupBatch, ...]


@triton.jit(do_not_specialize=["seqs"])
def _starts(rows_ptr, counts_ptr, computed_ptr, starts_ptr, lengths_ptr, seqs, TILE: tl.constexpr):
    """One program: the sum goes from tile to tile."""
    total = tl.zeros([], tl.int32)
    tl.store(starts_ptr, 0)
    for start in range(0, seqs, TILE):
        seq = start + tl.arange(0, TILE)
        inside = seq < seqs
        count = tl.load(counts_ptr + seq, mask=inside, other=0)
        row = tl.load(rows_ptr + seq, mask=inside, other=0)
        computed = tl.load(computed_ptr + row, mask=inside, other=0)
        tl.store(starts_ptr + 1 + seq, total + tl.cumsum(count, axis=0), mask=inside)
        tl.store(lengths_ptr + seq, computed + count, mask=inside)
        total += tl.sum(count, axis=0)


@triton.jit
def _gather_tokens(
    tile,
    rows_ptr,
    computed_ptr,
    starts_ptr,
    tokens_ptr,
    blocks_ptr,
    token_ids_ptr,
    positions_ptr,
    slots_ptr,
    seqs,
    steps,
    num_tokens,
    width,
    columns,
    tokens_stride,
    blocks_stride,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    token = tile * TILE + tl.arange(0, TILE)
    inside = token < num_tokens
    # The last sequence that starts at or before the token: those without tokens are passed over.
    low = tl.zeros([TILE], tl.int32)
    high = low + seqs
    for _ in range(steps):
        middle = (low + high + 1) // 2
        begun = tl.load(starts_ptr + middle, mask=inside, other=0) <= token
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle - 1)
    used = inside & (low < seqs)
    row = tl.load(rows_ptr + low, mask=used, other=0).to(tl.int64)
    position = tl.load(computed_ptr + row, mask=used, other=0) + token
    position = tl.where(used, position - tl.load(starts_ptr + low, mask=used, other=0), 0)
    if token_ids_ptr is not None:
        known = used & (position < width)
        found = tl.load(tokens_ptr + row * tokens_stride + position, mask=known, other=0)
        tl.store(token_ids_ptr + token, found, mask=inside)
        tl.store(positions_ptr + token, position.to(tl.int64), mask=inside)
    column = position // BLOCK_SIZE
    held = used & (column < columns)
    block = tl.load(blocks_ptr + row * blocks_stride + column, mask=held, other=0).to(tl.int64)
    slot = tl.where(held, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)
    tl.store(slots_ptr + token, slot, mask=inside)


@triton.jit
def _gather_blocks(
    part,
    rows_ptr,
    lengths_ptr,
    blocks_ptr,
    tables_ptr,
    columns,
    blocks_stride,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    parts = (columns + TILE - 1) // TILE
    seq = part // parts
    column = part % parts * TILE + tl.arange(0, TILE)
    blocks = (tl.load(lengths_ptr + seq) + BLOCK_SIZE - 1) // BLOCK_SIZE
    inside = (column < blocks) & (column < columns)
    row = tl.load(rows_ptr + seq).to(tl.int64)
    found = tl.load(blocks_ptr + row * blocks_stride + column, mask=inside, other=0)
    tl.store(tables_ptr + seq.to(tl.int64) * columns + column, found, mask=inside)


@triton.jit(do_not_specialize=["seqs", "steps", "num_tokens", "width", "columns", "token_tiles"])
def _gather(
    rows_ptr,
    computed_ptr,
    starts_ptr,
    lengths_ptr,
    tokens_ptr,
    blocks_ptr,
    token_ids_ptr,
    positions_ptr,
    slots_ptr,
    tables_ptr,
    seqs,
    steps,
    num_tokens,
    width,
    columns,
    token_tiles,
    tokens_stride,
    blocks_stride,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The first programs take a tile of tokens each, the others a part of a block table."""
    pid = tl.program_id(0)
    if pid < token_tiles:
        _gather_tokens(
            pid, rows_ptr, computed_ptr, starts_ptr, tokens_ptr, blocks_ptr, token_ids_ptr,
            positions_ptr, slots_ptr, seqs, steps, num_tokens, width, columns, tokens_stride,
            blocks_stride, BLOCK_SIZE, TILE,
        )  # fmt: skip
    else:
        _gather_blocks(
            pid - token_tiles, rows_ptr, lengths_ptr, blocks_ptr, tables_ptr, columns,
            blocks_stride, BLOCK_SIZE, TILE,
        )  # fmt: skip


def prepare(
    rows: Tensor,
    counts: Tensor,
    computed: Tensor,
    tokens: Tensor,
    groups: Sequence[Group],
    num_tokens: int,
    table: Table,
) -> Batch:
    """rows int32 `[seqs]`; counts int32 `[seqs]`, how many tokens each has in this step (0: none);
    computed int32 `[rows of the tables]`, how many it has in the cache; tokens int32 `[rows of the
    tables, width]`. `num_tokens`: room for the tokens, at least as many as `counts` sums to. One
    launch, and one more for each group."""
    seqs, device = len(rows), rows.device
    starts = torch.empty(seqs + 1, dtype=torch.int32, device=device)
    lengths = torch.empty(seqs, dtype=torch.int32, device=device)
    token_ids = torch.empty(num_tokens, dtype=torch.int32, device=device)
    positions = torch.empty(num_tokens, dtype=torch.int64, device=device)
    values = table.pick("batch", seqs=seqs, tokens=num_tokens)
    _starts[(1,)](rows, counts, computed, starts, lengths, seqs, **values)
    token_tiles = triton.cdiv(num_tokens, values["TILE"])
    found = []
    for number, (blocks, block_size) in enumerate(groups):
        columns = blocks.shape[1]
        slots = torch.empty(num_tokens, dtype=torch.int64, device=device)
        tables = torch.empty(seqs, columns, dtype=torch.int32, device=device)
        programs = token_tiles + seqs * triton.cdiv(columns, values["TILE"])
        first = number == 0  # token ids and positions are the same for all groups
        if programs:
            _gather[(programs,)](
                rows, computed, starts, lengths, tokens, blocks,
                token_ids if first else None, positions if first else None, slots, tables,
                seqs, seqs.bit_length(), num_tokens, tokens.shape[1], columns, token_tiles,
                tokens.stride(0), blocks.stride(0), BLOCK_SIZE=block_size, **values,
            )  # fmt: skip
        found.append(GroupBatch(slots, tables))
    return Batch(starts, lengths, token_ids, positions, tuple(found))
