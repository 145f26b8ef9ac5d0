"""What a step yields: one output head a kind of request.

A head knows the rows that want its kind of output, selects the hidden states they need (so that
no other logits are computed), and turns them into entries of the `StepOutput`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...platforms.interface import Device
from ..plan import NewRow, StepOutput
from ..sampler.logprobs import HostLogprobs, gather_logprobs, resolve_count
from ..sampler.sampler import Sampled, Sampler, StagedSampling
from ..types import PositionLogprobs
from .batch import StepRows
from .rows import Work, flat_places

LogitsOf = Callable[[Tensor], Tensor]
"""Indices on the packed token axis, int64 `[n]`, strictly rising → fp32 logits `[n, vocab]`, the
caller's own."""

SLICE_ELEMENTS = 1 << 24
"""Logits of prompt positions computed at once, at most (64 MiB)."""

COLDEST = 1e-30
"""Lowest temperature of a beam search: fp32 logits divided by it are still finite."""


class Yield(Protocol):
    """What a step yields."""

    def collect(self, output: StepOutput) -> None:
        """On the host, after the launch's event."""


class StagedHead(Yield, Protocol):
    """One step's share of a head."""

    def run(self, logits_of: LogitsOf) -> None:
        """Inside the launch, after the forward."""


class OutputHead(ABC):
    """State of the rows that want one kind of output."""

    @abstractmethod
    def add(self, new: NewRow) -> list[Work]:
        """Take a row in, if it wants this; the returned works open the launch."""

    @abstractmethod
    def remove(self, row: int) -> None:
        """Forget a row, if it is known."""

    @abstractmethod
    def stage(self, step: StepRows) -> StagedHead | None:
        """What this step yields; None if nothing."""


class TokenHead(OutputHead):
    """Sampled tokens and their log-probabilities. Tokens are written into the token table where
    they are sampled, so that the next step can run before the host knows them."""

    def __init__(self, device: Device, tokens: Tensor, sampler: Sampler) -> None:
        self._device = device
        self._tokens = tokens
        self.sampler = sampler
        self._draws = np.zeros(len(tokens), dtype=bool)

    def add(self, new: NewRow) -> list[Work]:
        self._draws[new.row] = new.sampling.beam_width == 0
        return self.sampler.add(new) if self._draws[new.row] else []

    def remove(self, row: int) -> None:
        self.sampler.remove(row)

    def only_tokens(self, step: StepRows) -> bool:
        """Does every row have one token and yield one, and is nothing asked but to choose it?"""
        decoding = (step.counts == 1) & step.emits & self._draws[step.rows]
        return bool(decoding.all()) and self.sampler.only_chooses(step.rows, step.positions)

    def stage(self, step: StepRows) -> StagedHead | None:
        indices = (step.emits & self._draws[step.rows]).nonzero()[0]
        if not len(indices):
            return None
        rows, positions = step.rows[indices], step.positions[indices]
        places = np.stack([step.ends[indices] - 1, flat_places(self._tokens, rows, positions)])
        return _StagedTokens(
            self._device,
            self._tokens.view(-1),
            indices.tolist(),
            self._device.to_device(torch.from_numpy(places)),
            self.sampler.stage(rows, positions),
        )


class _StagedTokens:
    """`places`: int64 `[2, n]`: index on the packed axis, and of each token in the token table,
    `tokens`, seen flat."""

    def __init__(
        self,
        device: Device,
        tokens: Tensor,
        indices: list[int],
        places: Tensor,
        sampling: StagedSampling,
    ) -> None:
        self._device = device
        self._tokens = tokens
        self._indices = indices
        self._places = places
        self._sampling = sampling
        self._sampled: Sampled | None = None
        self._found: Tensor | None = None

    def run(self, logits_of: LogitsOf) -> None:
        index, places = self._places.unbind()
        sampled = self._sampled = self._sampling.run(logits_of(index))
        self._tokens.index_copy_(0, places, sampled.token_ids.int())
        # Failed rows as -1: one copy to the host instead of two.
        self._found = self._device.to_host(sampled.token_ids.masked_fill(sampled.failed, -1))

    def collect(self, output: StepOutput) -> None:
        assert self._found is not None and self._sampled is not None
        for index, token in zip(self._indices, self._found.tolist(), strict=True):
            if token < 0:
                output.failed.append(index)
            else:
                output.tokens[index] = [token]
        if self._sampled.logprobs is None:
            return
        asked = [self._indices[i] for i in self._sampling.logprob_rows]
        positions = self._sampled.logprobs.positions(self._sampling.logprob_counts)
        for index, position in zip(asked, positions, strict=True):
            if output.tokens[index]:
                output.logprobs[index] = [position]


class BeamHead(OutputHead):
    """The most probable next tokens of beam search rows; the host chooses among them."""

    def __init__(self, device: Device, num_rows: int, vocab: int) -> None:
        self._device = device
        self._vocab = vocab
        self._counts = np.zeros(num_rows, dtype=np.int64)
        self._temperatures = np.ones(num_rows, dtype=np.float32)

    def add(self, new: NewRow) -> list[Work]:
        sampling = new.sampling
        if sampling.beam_width:
            asked = sampling.logprobs or 2 * sampling.beam_width
            self._counts[new.row] = resolve_count(asked, self._vocab)
            # Nothing is drawn: 0 leaves the distribution as the model gives it.
            self._temperatures[new.row] = max(sampling.temperature or 1.0, COLDEST)
        return []

    def remove(self, row: int) -> None:
        self._counts[row] = 0

    def stage(self, step: StepRows) -> StagedHead | None:
        indices = (step.emits & (self._counts[step.rows] > 0)).nonzero()[0]
        if not len(indices):
            return None
        rows = step.rows[indices]
        places = self._device.to_device(torch.from_numpy(step.ends[indices] - 1))
        temperatures = self._device.to_device(torch.from_numpy(self._temperatures[rows]))
        counts = self._counts[rows].tolist()
        return _StagedBeams(self._device, indices.tolist(), counts, places, temperatures)


class _StagedBeams:
    """`places` int64 and `temperatures` fp32, both `[beams]`."""

    def __init__(
        self,
        device: Device,
        indices: list[int],
        counts: list[int],
        places: Tensor,
        temperatures: Tensor,
    ) -> None:
        self._device = device
        self._indices = indices
        self._counts = counts
        self._places = places
        self._temperatures = temperatures
        self._found: tuple[Tensor, Tensor] | None = None

    def run(self, logits_of: LogitsOf) -> None:
        logits = logits_of(self._places) / self._temperatures.unsqueeze(1)
        values, ids = logits.log_softmax(-1).topk(max(self._counts), dim=-1)
        self._found = self._device.to_host(values), self._device.to_host(ids)

    def collect(self, output: StepOutput) -> None:
        assert self._found is not None
        values, ids = (found.tolist() for found in self._found)
        for i, (index, count) in enumerate(zip(self._indices, self._counts, strict=True)):
            if not all(value > float("-inf") for value in values[i][:1]):  # NaN: nothing to choose
                output.failed.append(index)
                continue
            ranks = list(range(1, count + 1))
            top = PositionLogprobs(ids[i][:count], values[i][:count], ranks)
            output.logprobs[index] = [top]


class PromptLogprobsHead(OutputHead):
    """Log-probabilities of the prompt's own tokens: position p tells of token p + 1."""

    def __init__(self, device: Device, tokens: Tensor, vocab: int) -> None:
        self._device = device
        self._tokens = tokens
        self._vocab = vocab
        self._asked: dict[int, tuple[int, int]] = {}  # row → (top tokens, last prompt position)

    def add(self, new: NewRow) -> list[Work]:
        if new.sampling.prompt_logprobs is not None:
            top = resolve_count(new.sampling.prompt_logprobs, self._vocab)
            self._asked[new.row] = top, new.num_prompt - 1
        return []

    def remove(self, row: int) -> None:
        self._asked.pop(row, None)

    def stage(self, step: StepRows) -> StagedHead | None:
        if not self._asked:
            return None
        spans = []
        for index, row in enumerate(step.rows.tolist()):
            if row in self._asked:
                top, last = self._asked[row]
                count = min(int(step.positions[index]), last) - int(step.starts[index])
                if count > 0:
                    spans.append((index, count, top))
        if not spans:
            return None
        rows_at_once = max(1, SLICE_ELEMENTS // self._vocab)
        return _StagedPrompts(
            self._device, self._tokens, spans, self._places(step, spans), rows_at_once
        )

    def _places(self, step: StepRows, spans: list[tuple[int, int, int]]) -> Tensor:
        """int64 `[3, positions]`: index on the packed axis, row, and the next token's position."""
        parts = []
        for index, count, _ in spans:
            run = np.arange(count)
            first = step.ends[index] - step.counts[index]
            rows = np.full(count, step.rows[index])
            parts.append(np.stack([first + run, rows, step.starts[index] + run + 1]))
        return self._device.to_device(torch.from_numpy(np.concatenate(parts, axis=1)))


class _StagedPrompts:
    """`spans`: (index in the plan, positions, top tokens) of each row that asks."""

    def __init__(
        self,
        device: Device,
        tokens: Tensor,
        spans: list[tuple[int, int, int]],
        places: Tensor,
        rows_at_once: int,
    ) -> None:
        self._device = device
        self._tokens = tokens
        self._spans = spans
        self._places = places
        self._rows_at_once = rows_at_once
        self._found: list[HostLogprobs] = []

    def run(self, logits_of: LogitsOf) -> None:
        top = max(top for _, _, top in self._spans)
        for place in self._places.split(self._rows_at_once, dim=1):
            index, rows, positions = place
            chosen = self._tokens[rows, positions].long()
            self._found.append(gather_logprobs(self._device, logits_of(index), chosen, top))

    def collect(self, output: StepOutput) -> None:
        counts = [top for _, count, top in self._spans for _ in range(count)]
        found: list[PositionLogprobs] = []
        for part in self._found:
            found += part.positions(counts[len(found) : len(found) + len(part.chosen)])
        start = 0
        for index, count, _ in self._spans:
            output.prompt_logprobs[index] = found[start : start + count]
            start += count
