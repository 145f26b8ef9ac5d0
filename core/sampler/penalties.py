"""Repetition, presence and frequency penalties, counted on the device.

A row that asks owns a slot: how often each token was generated, and which tokens its prompt
holds. Both are filled once when the row is added (a request that returns after a preemption
brings its generated tokens along) and then follow the drawn tokens inside the launch, so no step
reads the history again and none waits for the host.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...platforms.interface import Device
from ..plan import NewRow, RowSampling
from .features import Feature, SampleRows, Staged, Work

_FIRST_SLOTS = 4


class _Counts:
    """`output`: int32 `[slots, vocab]`, times generated. `prompt`: bool, in the prompt at all."""

    __slots__ = ("output", "prompt")

    def __init__(self, device: Device, slots: int, vocab: int) -> None:
        self.output = device.alloc((slots, vocab), torch.int32, tag="sampler")
        self.prompt = device.alloc((slots, vocab), torch.bool, tag="sampler")


class Penalties(Feature):
    """All three penalties; slots grow by doubling up to the number of rows that ask."""

    def __init__(self, device: Device, vocab: int) -> None:
        self._device = device
        self._vocab = vocab
        self._slots: dict[int, int] = {}
        self._settings: dict[int, tuple[float, float, float]] = {}
        self._free: list[int] = []
        self._counts: _Counts | None = None

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
        known = self._device.to_device(torch.tensor(new.token_ids, dtype=torch.int64))
        counts, num_prompt = self._counts, new.num_prompt
        assert counts is not None

        def fill() -> None:
            if grow is not None:
                grow()
            prompt, output = known[:num_prompt], known[num_prompt:]
            counts.prompt[slot].zero_()[prompt] = True
            ones = torch.ones_like(output, dtype=torch.int32)
            counts.output[slot].zero_().index_add_(0, output, ones)

        return fill

    def remove(self, row: int) -> None:
        slot = self._slots.pop(row, None)
        if slot is not None:
            self._free.append(slot)
            del self._settings[row]

    def _grow(self) -> Work | None:
        """Take twice the slots. Queued steps hold the old tensors and finish with them first."""
        old = self._counts
        before = 0 if old is None else len(old.output)
        slots = max(_FIRST_SLOTS, 2 * before)
        self._counts = new = _Counts(self._device, slots, self._vocab)
        self._free.extend(range(slots - 1, before - 1, -1))
        if old is None:
            return None
        old_counts = old

        def copy() -> None:
            new.output[:before] = old_counts.output
            new.prompt[:before] = old_counts.prompt

        return copy

    def stage(self, batch: SampleRows) -> Staged | None:
        if not self._slots:
            return None
        asking = [(i, row) for i, row in enumerate(batch.rows.tolist()) if row in self._slots]
        if not asking:
            return None
        assert self._counts is not None
        places = np.array([(i, self._slots[row]) for i, row in asking], dtype=np.int64).T
        settings = np.array([self._settings[row] for _, row in asking], dtype=np.float32).T
        to_device = self._device.to_device
        return _StagedPenalties(
            self._counts,
            to_device(torch.from_numpy(places.copy())),
            to_device(torch.from_numpy(settings.copy())),
        )


class _StagedPenalties:
    """`places`: int64 `[2, asking]`, index in the batch and slot; `settings`: fp32
    `[3, asking]`, repetition, frequency and presence penalty."""

    __slots__ = ("_counts", "_places", "_settings")

    def __init__(self, counts: _Counts, places: Tensor, settings: Tensor) -> None:
        self._counts = counts
        self._places = places
        self._settings = settings

    def apply(self, logits: Tensor) -> None:
        index, slots = self._places
        repetition, frequency, presence = self._settings[:, :, None]
        output = self._counts.output[slots]
        generated = output > 0
        seen = generated | self._counts.prompt[slots]
        chosen = logits[index]
        scaled = torch.where(chosen > 0, chosen / repetition, chosen * repetition)
        chosen = torch.where(seen, scaled, chosen)
        chosen -= frequency * output + presence * generated
        logits[index] = chosen

    def accept(self, token_ids: Tensor) -> None:
        index, slots = self._places
        ones = torch.ones_like(slots, dtype=torch.int32)
        self._counts.output.index_put_((slots, token_ids[index]), ones, accumulate=True)


def _asks(sampling: RowSampling) -> bool:
    return (
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
    )
