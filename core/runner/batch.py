"""One step's batch: staged from the plan on the host, gathered from the rows on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...platforms.interface import AttentionBatch, Device
from ..models.step import StepBuffers
from ..plan import StepPlan
from .rows import RowTable, flat_places


@dataclass(frozen=True, slots=True)
class StepRows:
    """The scheduled rows of a step as arrays, int64 `[seqs]` each, in the plan's order; `ends` is
    where a row's tokens end on the packed axis, `positions` where the next token will stand."""

    rows: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    emits: np.ndarray
    ends: np.ndarray
    positions: np.ndarray

    @classmethod
    def of(cls, plan: StepPlan) -> StepRows:
        rows, starts, counts = np.array([plan.rows, plan.starts, plan.counts], dtype=np.int64)
        emits = np.array(plan.emits, dtype=bool)
        return cls(rows, starts, counts, emits, counts.cumsum(), starts + counts)

    def padded(self, num_tokens: int, scratch: int) -> StepRows:
        """Followed by sequences of one token each, the first one of the row `scratch`, up to
        `num_tokens` tokens. Nothing reads what they yield."""
        missing = num_tokens - int(self.counts.sum())
        if missing == 0:
            return self
        counts = np.append(self.counts, np.ones(missing, dtype=np.int64))
        starts = np.append(self.starts, np.zeros(missing, dtype=np.int64))
        return StepRows(
            rows=np.append(self.rows, np.full(missing, scratch)),
            starts=starts,
            counts=counts,
            emits=np.append(self.emits, np.zeros(missing, dtype=bool)),
            ends=counts.cumsum(),
            positions=starts + counts,
        )


@dataclass(frozen=True, slots=True)
class StagedBatch:
    """What the gather needs. `places`: int64 `[2 + 2 * groups, tokens]` on the device, each packed
    token's position and then `RowTable.places`; `rows`: int64 `[seqs]` there. Lists as
    `AttentionBatch` has them."""

    places: Tensor
    rows: Tensor
    query_starts: list[int]
    seq_lens: list[int]

    @classmethod
    def stage(cls, device: Device, step: StepRows, table: RowTable) -> StagedBatch:
        shift = step.starts - (step.ends - step.counts)
        positions = np.repeat(shift, step.counts) + np.arange(step.ends[-1])
        found = table.places(np.repeat(step.rows, step.counts), positions)
        return cls(
            places=device.to_device(torch.from_numpy(np.vstack([positions, found]))),
            rows=device.to_device(torch.from_numpy(step.rows)),
            query_starts=[0, *step.ends.tolist()],
            seq_lens=step.positions.tolist(),
        )

    def load(self, table: RowTable, buffers: StepBuffers) -> None:
        """Fill the step buffers; inside the launch, after the rows' changes."""
        longest, width = max(self.seq_lens), table.tokens.shape[1]
        if longest >= width:  # flat places would be those of the next row
            raise IndexError(f"a sequence of {longest} tokens and the next; a row holds {width}")
        positions, tokens, *found = self.places.unbind()
        buffers.begin(self.query_starts[-1])
        buffers.token_ids.copy_(table.tokens.view(-1).index_select(0, tokens))
        buffers.positions.copy_(positions)  # the same on all axes
        for group, blocks in zip(buffers.groups, table.blocks, strict=True):
            place, offset = found.pop(0), found.pop(0)
            size = group.spec.block_size
            block = blocks.view(-1).index_select(0, place)
            torch.add(offset, block, alpha=size, out=group.slots)
            used = blocks[:, : -(-longest // size)].index_select(0, self.rows)
            batch = AttentionBatch(self.query_starts, self.seq_lens, used, group.slots)
            group.metadata = group.impl.plan(group.spec, batch)


def load_decoding(
    table: RowTable, buffers: StepBuffers, rows: Tensor, positions: Tensor, reach: int
) -> None:
    """Fill the step buffers with one token of each of `rows`, which stands at `positions`, int64
    `[seqs]` both, on the device. No sequence has more than `reach` tokens with it. What is launched
    depends on shapes alone, so that it may be recorded."""
    buffers.begin(len(rows))
    places = flat_places(table.tokens, rows, positions)
    buffers.token_ids.copy_(table.tokens.view(-1).index_select(0, places))
    buffers.positions.copy_(positions)
    seq_lens = (positions + 1).int()
    for group, blocks in zip(buffers.groups, table.blocks, strict=True):
        size = group.spec.block_size
        column, offset = positions // size, positions % size
        block = blocks.view(-1).index_select(0, flat_places(blocks, rows, column))
        torch.add(offset, block, alpha=size, out=group.slots)
        used = blocks[:, : -(-reach // size)].index_select(0, rows)
        group.metadata = group.impl.plan_recorded(group.spec, used, seq_lens)
