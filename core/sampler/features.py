"""Processing of logits that only some requests ask for, as small state objects.

Each feature keeps what its rows asked (`add`, `remove`), stages what one step needs on the host,
and applies it to the step's logits inside the launch. A feature that no row asks for stages None
and costs nothing. Everything staged is immutable or was copied to the device: the host may change
its own state while the step is still queued.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...platforms.interface import Device
from ..plan import NewRow

Work = Callable[[], None]
"""Device work, to be run inside a launch, in order."""

_BANNED = float("-inf")


@dataclass(frozen=True, slots=True)
class SampleRows:
    """The rows whose logits a step samples from, in the order of the logits, int64 `[n]` each.
    `positions`: where the drawn token will stand (0 is the prompt's first token)."""

    rows: np.ndarray
    positions: np.ndarray
    num_prompts: np.ndarray


class Staged(Protocol):
    """One step's share of a feature; both are called inside the launch."""

    def apply(self, logits: Tensor) -> None:
        """Change `logits`, fp32 `[n, vocab]`, in place."""

    def accept(self, token_ids: Tensor) -> None:
        """`token_ids`, int64 `[n]`, were drawn."""


class Feature(ABC):
    """State of the rows that ask for one kind of processing."""

    @abstractmethod
    def add(self, new: NewRow) -> Work | None:
        """Take a row in, if it asks; the returned work prepares its state on the device."""

    @abstractmethod
    def remove(self, row: int) -> None:
        """Forget a row, if it is known."""

    @abstractmethod
    def asking(self, batch: SampleRows) -> list[tuple[int, int]]:
        """(index in the batch, row) of the rows that ask in this step: on the host alone."""

    @abstractmethod
    def stage(self, batch: SampleRows) -> Staged | None:
        """What this step has to do, copied to the device; None if no row asks."""


def rows_in(batch: SampleRows, known: Collection[int]) -> list[tuple[int, int]]:
    """(index in the batch, row) of the rows that are `known`."""
    if not known:
        return []
    return [(i, row) for i, row in enumerate(batch.rows.tolist()) if row in known]


@dataclass(frozen=True, slots=True)
class Applied:
    """A staged change of logits that does not care what is drawn."""

    change: Callable[[Tensor], None]

    def apply(self, logits: Tensor) -> None:
        self.change(logits)

    def accept(self, token_ids: Tensor) -> None:
        pass


class _Ragged(Feature):
    """Base of features that hold a list of token ids a row, kept on the device."""

    def __init__(self, device: Device, vocab: int) -> None:
        self._device = device
        self._vocab = vocab
        self._ids: dict[int, Tensor] = {}

    def remove(self, row: int) -> None:
        self._ids.pop(row, None)

    def _keep(self, row: int, ids: Sequence[int]) -> None:
        # Ids were checked at admission; one outside the vocabulary must not reach an index.
        inside = [token for token in ids if 0 <= token < self._vocab]
        self._ids[row] = self._device.to_device(torch.tensor(inside, dtype=torch.int64))

    def asking(self, batch: SampleRows) -> list[tuple[int, int]]:
        return rows_in(batch, self._ids)

    def _flat(self, asking: list[tuple[int, int]]) -> tuple[Tensor, list[Tensor]]:
        """The batch index of every listed id, on the device, and the lists themselves."""
        lists = [self._ids[row] for _, row in asking]
        index = np.repeat([i for i, _ in asking], [len(ids) for ids in lists])
        return self._device.to_device(torch.from_numpy(index.astype(np.int64))), lists


class AllowedTokens(_Ragged):
    """`allowed_token_ids`: everything else is banned."""

    def add(self, new: NewRow) -> None:
        if new.sampling.allowed_token_ids is not None:
            self._keep(new.row, new.sampling.allowed_token_ids)

    def stage(self, batch: SampleRows) -> Staged | None:
        asking = self.asking(batch)
        if not asking:
            return None
        index, lists = self._flat(asking)
        rows = self._device.to_device(torch.tensor([i for i, _ in asking]))

        def change(logits: Tensor) -> None:
            ids = torch.cat(lists)
            kept = logits[index, ids]
            logits[rows] = _BANNED
            logits[index, ids] = kept

        return Applied(change)


class MinTokens(_Ragged):
    """`min_tokens`: the ids that would end the sequence are banned until it is long enough."""

    def __init__(self, device: Device, vocab: int) -> None:
        super().__init__(device, vocab)
        self._until: dict[int, int] = {}

    def add(self, new: NewRow) -> None:
        if new.sampling.min_tokens > 0 and new.sampling.suppress_ids:
            self._keep(new.row, new.sampling.suppress_ids)
            self._until[new.row] = new.num_prompt + new.sampling.min_tokens

    def remove(self, row: int) -> None:
        super().remove(row)
        self._until.pop(row, None)

    def asking(self, batch: SampleRows) -> list[tuple[int, int]]:
        positions = batch.positions
        return [(i, row) for i, row in super().asking(batch) if positions[i] < self._until[row]]

    def stage(self, batch: SampleRows) -> Staged | None:
        asking = self.asking(batch)
        if not asking:
            return None
        index, lists = self._flat(asking)

        def change(logits: Tensor) -> None:
            logits[index, torch.cat(lists)] = _BANNED

        return Applied(change)


class LogitBias(_Ragged):
    """`logit_bias`: added to the logits."""

    def __init__(self, device: Device, vocab: int) -> None:
        super().__init__(device, vocab)
        self._values: dict[int, Tensor] = {}

    def add(self, new: NewRow) -> None:
        bias = {t: b for t, b in new.sampling.logit_bias.items() if 0 <= t < self._vocab}
        if bias:
            self._keep(new.row, list(bias))
            values = torch.tensor(list(bias.values()), dtype=torch.float32)
            self._values[new.row] = self._device.to_device(values)

    def remove(self, row: int) -> None:
        super().remove(row)
        self._values.pop(row, None)

    def stage(self, batch: SampleRows) -> Staged | None:
        asking = self.asking(batch)
        if not asking:
            return None
        index, lists = self._flat(asking)
        values = [self._values[row] for _, row in asking]

        def change(logits: Tensor) -> None:
            logits[index, torch.cat(lists)] += torch.cat(values)

        return Applied(change)


class _Words:
    """A row's bad words: `prefixes` int64 `[words, width]`, right-aligned and padded with -1,
    what has to precede; `lasts` the token that is banned then; `lengths` of the prefixes."""

    __slots__ = ("lasts", "lengths", "prefixes")

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        width = max(len(word) for word in words) - 1
        self.lasts = np.array([word[-1] for word in words], dtype=np.int64)
        self.lengths = np.array([len(word) - 1 for word in words], dtype=np.int64)
        self.prefixes = np.full((len(words), width), -1, dtype=np.int64)
        for prefix, word in zip(self.prefixes, words, strict=True):
            prefix[width - len(word) + 1 :] = word[:-1]


class BadWords(Feature):
    """`bad_words`: a token is banned where it would complete one of the row's sequences, whose
    beginning must lie in the generated tokens (not in the prompt)."""

    def __init__(self, device: Device, vocab: int, tokens: Tensor) -> None:
        """`tokens`: the token table on the device, int32 `[rows, length]`."""
        self._device = device
        self._vocab = vocab
        self._tokens = tokens
        self._words: dict[int, _Words] = {}

    def add(self, new: NewRow) -> None:
        known = range(self._vocab)
        words = [w for w in new.sampling.bad_words_ids if w and w[-1] in known]
        if words:
            self._words[new.row] = _Words(words)

    def remove(self, row: int) -> None:
        self._words.pop(row, None)

    def asking(self, batch: SampleRows) -> list[tuple[int, int]]:
        return rows_in(batch, self._words)

    def stage(self, batch: SampleRows) -> Staged | None:
        asking = self.asking(batch)
        if not asking:
            return None
        per_row = [self._words[row] for _, row in asking]
        width = max(words.prefixes.shape[1] for words in per_row)
        index = np.repeat([i for i, _ in asking], [len(words.lasts) for words in per_row])
        lengths = np.concatenate([words.lengths for words in per_row])
        positions = batch.positions[index]
        # Where a prefix would begin inside the prompt (or before it) it cannot match.
        possible = positions - lengths >= batch.num_prompts[index]
        columns = np.maximum(positions[:, None] + np.arange(-width, 0), 0)
        packed = np.column_stack(
            [
                index,
                np.concatenate([words.lasts for words in per_row]),
                possible,
                batch.rows[index],
                np.concatenate([_widen(words.prefixes, width) for words in per_row]),
                columns,
            ]
        )
        staged = self._device.to_device(torch.from_numpy(packed))
        tokens = self._tokens

        def change(logits: Tensor) -> None:
            index, lasts, possible, rows = staged[:, :4].unbind(1)
            prefixes, columns = staged[:, 4:].split(width, dim=1) if width else (None, None)
            banned = possible.bool()
            if prefixes is not None:
                seen = tokens[rows[:, None], columns]
                banned = banned & ((prefixes == seen) | (prefixes < 0)).all(1)
            # Added, not set: another word of the row may end in the same token and not match.
            penalty = torch.zeros_like(lasts, dtype=logits.dtype).masked_fill_(banned, _BANNED)
            logits.index_put_((index, lasts), penalty, accumulate=True)

        return Applied(change)


def _widen(prefixes: np.ndarray, width: int) -> np.ndarray:
    return np.pad(prefixes, ((0, 0), (width - prefixes.shape[1], 0)), constant_values=-1)
