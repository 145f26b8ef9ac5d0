"""The state table: what every running request's row holds on the device.

A request keeps its row as long as it runs. Each step stages only what changed (a row taken, blocks
appended) as flat scatters; sampled tokens are written where they were sampled, inside the launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ...platforms.interface import Device
from ..plan import StepPlan

Work = Callable[[], None]

SLACK = 2
"""Columns beyond the longest sequence: a step planned before the end was known may write there."""


Places = TypeVar("Places", np.ndarray, Tensor)


def flat_places(table: Tensor, rows: Places, columns: Places) -> Places:
    """int64 `[n]`: where entries of `table`, `[rows, columns]`, are in `table.view(-1)`."""
    return rows * table.shape[1] + columns


class Scatter(NamedTuple):
    """Entries of a table to be written: `places` in `table.view(-1)`, int64 `[n]`, distinct, and
    `values` int32 `[n]`."""

    table: Tensor
    places: np.ndarray
    values: np.ndarray

    @classmethod
    def of(cls, table: Tensor, parts: Sequence[tuple[int, int, list[int]]]) -> Scatter:
        """Values along rows; each part is (row, first column, values)."""
        lengths = np.array([len(values) for _, _, values in parts])
        rows, columns = np.array([part[:2] for part in parts], dtype=np.int64).T
        firsts = flat_places(table, rows, columns)
        before = np.cumsum(lengths) - lengths
        places = np.repeat(firsts - before, lengths) + np.arange(lengths.sum())
        values = np.concatenate([np.array(values, dtype=np.int32) for _, _, values in parts])
        return cls(table, places, values)

    def stage(self, device: Device) -> Work:
        index = device.to_device(torch.from_numpy(self.places))
        source = device.to_device(torch.from_numpy(self.values))
        flat = self.table.view(-1)

        def work() -> None:
            flat.index_copy_(0, index, source)

        return work


class RowChanges(NamedTuple):
    """What a plan changes in the token table and in each group's block table."""

    tokens: Scatter | None
    blocks: list[Scatter | None]

    def stage(self, device: Device) -> list[Work]:
        return [change.stage(device) for change in (self.tokens, *self.blocks) if change]


class RowTable:
    """`tokens`: int32 `[rows, max_len + SLACK]`. `blocks[g]`: int32 `[rows, blocks of the longest
    sequence]`, the block tables of cache group g; entries past a row's end are stale.

    One row more than `num_rows`, `scratch`, is nobody's: it stays zero, so that its first token is
    token 0 in the scratch block. Steps are padded with it."""

    def __init__(
        self, device: Device, num_rows: int, max_len: int, block_sizes: Sequence[int]
    ) -> None:
        self._device = device
        self.scratch = num_rows
        num_rows += 1
        self.tokens = device.alloc((num_rows, max_len + SLACK), torch.int32, tag="rows").zero_()
        self.blocks = [
            device.alloc((num_rows, -(-(max_len + SLACK) // size)), torch.int32, tag="rows").zero_()
            for size in block_sizes
        ]
        self._sizes = tuple(block_sizes)
        # The host knows how far each block table reaches: [groups, rows].
        self._ends = np.zeros((len(block_sizes), num_rows), dtype=np.int64)

    def places(self, rows: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Where tokens are, int64 `[1 + 2 * groups, tokens]`: in the token table seen flat; for
        each group, in its block table seen flat, and in that block."""
        found = [flat_places(self.tokens, rows, positions)]
        for table, size in zip(self.blocks, self._sizes, strict=True):
            block, offset = np.divmod(positions, size)
            found += [flat_places(table, rows, block), offset]
        return np.stack(found)

    def stage(self, plan: StepPlan) -> RowChanges:
        """The device's half of `added` and `blocks`; it belongs at the head of the launch."""
        tokens = None
        if plan.added:
            parts = [(new.row, 0, new.token_ids) for new in plan.added]
            tokens = Scatter.of(self.tokens, parts)
        blocks = []
        for group, table in enumerate(self.blocks):
            parts = self._block_parts(plan, group)
            blocks.append(Scatter.of(table, parts) if parts else None)
        return RowChanges(tokens, blocks)

    def _block_parts(self, plan: StepPlan, group: int) -> list[tuple[int, int, list[int]]]:
        """(row, first column, values) of one group's new table entries, in the plan's order."""
        ends = self._ends[group]
        parts = []
        for new in plan.added:
            parts.append((new.row, 0, new.block_ids[group]))
            ends[new.row] = len(new.block_ids[group])
        for append in plan.blocks:
            if append.group == group:
                parts.append((append.row, int(ends[append.row]), append.block_ids))
                ends[append.row] += len(append.block_ids)
        return parts
