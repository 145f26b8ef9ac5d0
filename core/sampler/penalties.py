"""Repetition, presence and frequency penalties, counted on the device.

A row that asks owns a slot: how often it generated each token. The counts are filled once when
the row is added (a request that returns after a preemption brings its generated tokens along) and
then follow the drawn tokens inside the launch, so nothing is recounted and nothing waits for the
host. Only tokens that the row holds are touched: they stand in the token table, and are few beside
a vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...platforms.interface import Device
from ..plan import NewRow, RowSampling
from .features import Feature, SampleRows, Staged, Work, rows_in

_FIRST_SLOTS = 4


class Penalties(Feature):
    """All three penalties; slots grow by doubling up to the number of rows that ask."""

    def __init__(self, device: Device, vocab: int, tokens: Tensor) -> None:
        """`tokens`: the token table on the device, int32 `[rows, length]`."""
        self._device = device
        self._vocab = vocab
        self._tokens = tokens
        self._slots: dict[int, int] = {}
        self._settings: dict[int, tuple[float, float, float]] = {}
        self._free: list[int] = []
        self._counts: Tensor | None = None  # int32 [slots, vocab], times generated

    def add(self, new: NewRow) -> Work | None:
        if not _asks(new.sampling):
            return None
        grow = self._grow() if not self._free else None
        slot = self._free.pop()
        self._slots[new.row] = slot
        sampling = new.sampling
        self._settings[new.row] = (
            sampling.repetition_penalty,
            sampling.frequency_penalty,
            sampling.presence_penalty,
        )
        generated = torch.tensor(new.token_ids[new.num_prompt :], dtype=torch.int64)
        output, counts = self._device.to_device(generated), self._counts
        assert counts is not None

        def fill() -> None:
            if grow is not None:
                grow()
            ones = torch.ones_like(output, dtype=torch.int32)
            counts[slot].zero_().index_add_(0, output, ones)

        return fill

    def remove(self, row: int) -> None:
        slot = self._slots.pop(row, None)
        if slot is not None:
            self._free.append(slot)
            del self._settings[row]

    def _grow(self) -> Work | None:
        """Take twice the slots. Queued steps hold the old tensor and finish with it first."""
        old = self._counts
        before = 0 if old is None else len(old)
        slots = max(_FIRST_SLOTS, 2 * before)
        shape = (slots, self._vocab)
        self._counts = new = self._device.alloc(shape, torch.int32, tag="sampler")
        self._free.extend(range(slots - 1, before - 1, -1))
        if old is None:
            return None
        counts = old

        def copy() -> None:
            new[:before] = counts

        return copy

    def asking(self, batch: SampleRows) -> list[tuple[int, int]]:
        return rows_in(batch, self._slots)

    def stage(self, batch: SampleRows) -> Staged | None:
        found = self.asking(batch)
        if not found:
            return None
        assert self._counts is not None
        asking = [i for i, _ in found]
        slots = [self._slots[row] for _, row in found]
        places = np.stack([asking, slots, batch.rows[asking], batch.positions[asking]])
        settings = np.array([self._settings[row] for _, row in found], dtype=np.float32)
        return _StagedPenalties(
            self._counts,
            self._tokens[:, : int(batch.positions[asking].max())],
            self._device.to_device(torch.from_numpy(places)),
            self._device.to_device(torch.from_numpy(settings)),
        )


class _StagedPenalties:
    """`tokens`: the token table as far as any asking row reaches; `places`: int64 `[4, asking]`,
    index in the batch, slot, row and number of tokens; `settings`: fp32 `[asking, 3]`,
    repetition, frequency and presence penalty."""

    __slots__ = ("_counts", "_places", "_settings", "_tokens")

    def __init__(self, counts: Tensor, tokens: Tensor, places: Tensor, settings: Tensor) -> None:
        self._counts = counts
        self._tokens = tokens
        self._places = places
        self._settings = settings

    def apply(self, logits: Tensor) -> None:
        index, slots, rows, lengths = self._places[:, :, None]
        repetition, frequency, presence = self._settings.T[:, :, None]
        held = self._tokens[rows[:, 0]].long()  # [asking, longest]
        columns = torch.arange(held.shape[1], device=held.device)
        # Whatever stands twice, padding included, is written twice with the same value.
        held = torch.where(columns < lengths, held, held[:, :1])
        counts = self._counts[slots, held]
        chosen = logits[index, held]
        chosen = torch.where(chosen > 0, chosen / repetition, chosen * repetition)
        chosen -= frequency * counts + presence * (counts > 0)
        logits[index, held] = chosen

    def accept(self, token_ids: Tensor) -> None:
        index, slots = self._places[:2]
        ones = torch.ones_like(slots, dtype=torch.int32)
        self._counts.index_put_((slots, token_ids[index]), ones, accumulate=True)


def _asks(sampling: RowSampling) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
    )
