"""The state table: what every running request's row holds on the device.

A request keeps its row as long as it runs. Each step stages only what changed (a row taken, blocks
appended) as flat scatters; sampled tokens are written where they were sampled, inside the launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

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

    def stage(self, plan: StepPlan) -> list[Work]:
        """The device's half of `added` and `blocks`; they belong at the head of the launch."""
        works = []
        if plan.added:
            parts = [(new.row, 0, new.token_ids) for new in plan.added]
            works.append(self._scatter(self.tokens, parts))
        for group, table in enumerate(self.blocks):
            parts = self._block_parts(plan, group)
            if parts:
                works.append(self._scatter(table, parts))
        return works

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

    def _scatter(self, table: Tensor, parts: Sequence[tuple[int, int, list[int]]]) -> Work:
        """Write each part's values along its row. The places of one call are distinct."""
        width = table.shape[1]
        lengths = np.array([len(values) for _, _, values in parts])
        firsts = np.array([row * width + column for row, column, _ in parts])
        before = np.cumsum(lengths) - lengths
        places = np.repeat(firsts - before, lengths) + np.arange(lengths.sum())
        values = np.concatenate([np.array(values, dtype=np.int32) for _, _, values in parts])
        index = self._device.to_device(torch.from_numpy(places))
        source = self._device.to_device(torch.from_numpy(values))
        flat = table.view(-1)

        def work() -> None:
            flat.index_copy_(0, index, source)

        return work
