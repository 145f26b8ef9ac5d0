"""From logits to tokens, for all rows of a step at once.

Order of processing: raw log-probabilities, allowed ids, bad words, min_tokens, logit bias,
penalties, temperature, min_p, top_k, top_p, Gumbel-max. What no row of the step asks for is
skipped; a step of greedy rows is one argmax.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ...platforms.interface import Device
from ...platforms.ops import SHORT, draw, scale
from ..plan import NewRow
from .features import (
    AllowedTokens,
    BadWords,
    Feature,
    LogitBias,
    MinTokens,
    SampleRows,
    Staged,
    Work,
)
from .logprobs import HostLogprobs, gather_logprobs, resolve_count
from .penalties import Penalties

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy: dividing by them would overflow."""

_BANNED = float("-inf")
_LOW_WORD = 0xFFFFFFFF
_EQUALS = 12


Draw = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Sampled:
    """What a step drew: on the device `token_ids` int64 `[n]` (0 where failed) and `failed` bool
    `[n]`; on the host, after the event, the log-probabilities of the rows that asked."""

    token_ids: Tensor
    failed: Tensor
    logprobs: HostLogprobs | None


class Sampler:
    """Sampling state of the rows of one state table. `add`, `remove` and `stage` are the host's;
    the staged step and the works that `add` returns run inside launches."""

    def __init__(
        self,
        device: Device,
        tokens: Tensor,
        vocab: int,
        *,
        logprobs_mode: str = "raw",
        argmax: Callable[[Tensor], Tensor] = lambda scores: scores.argmax(-1),
        draw: Draw = draw,
    ) -> None:
        """`tokens`: the token table on the device, int32 `[rows, length]`. `argmax`, `draw`: the
        bound ops `sample` and `draw`."""
        rows = len(tokens)
        self._device = device
        self._vocab = vocab
        self._processed_logprobs = logprobs_mode == "processed"
        self._argmax = argmax
        self._draw = draw
        self._features: tuple[Feature, ...] = (
            AllowedTokens(device, vocab),
            BadWords(device, vocab, tokens),
            MinTokens(device, vocab),
            LogitBias(device, vocab),
            Penalties(device, vocab, tokens),
        )
        # By row: temperature, top_p, min_p, and top_k, seed halves, child index.
        self._floats = np.zeros((3, rows), dtype=np.float32)
        self._ints = np.zeros((4, rows), dtype=np.int64)
        self._num_prompts = np.zeros(rows, dtype=np.int64)
        self._logprobs: dict[int, int] = {}

    def add(self, new: NewRow) -> list[Work]:
        """Take a row in; the returned works belong at the head of the next launch."""
        asked, row = new.sampling, new.row
        self._floats[:, row] = asked.temperature, asked.top_p, asked.min_p
        top_k = asked.top_k if 0 < asked.top_k < self._vocab else 0
        seed_low, seed_high = asked.seed & _LOW_WORD, (asked.seed >> 32) & _LOW_WORD
        self._ints[:, row] = top_k, seed_low, seed_high, asked.child_index
        self._num_prompts[row] = new.num_prompt
        if asked.logprobs is not None:
            self._logprobs[row] = resolve_count(asked.logprobs, self._vocab)
        works = [feature.add(new) for feature in self._features]
        return [work for work in works if work is not None]

    def remove(self, row: int) -> None:
        self._logprobs.pop(row, None)
        for feature in self._features:
            feature.remove(row)

    def draws(self, rows: np.ndarray) -> bool:
        """Does any of `rows` draw at random?"""
        return bool((self._floats[0, rows] >= GREEDY_BELOW).any())

    def only_chooses(self, rows: np.ndarray, positions: np.ndarray) -> bool:
        """Do `rows` want nothing but a token for `positions`: no feature, no log-probabilities?"""
        if self._logprobs and any(row in self._logprobs for row in rows.tolist()):
            return False
        batch = SampleRows(rows, positions, self._num_prompts[rows])
        return not any(feature.asking(batch) for feature in self._features)

    def settings(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """fp32 `[3, n]`: temperature, top_p, min_p; int64 `[4, n]`: top_k, the low and high half of
        the seed, child index."""
        return self._floats[:, rows], self._ints[:, rows]

    def choose(self, logits: Tensor, drawn: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """`logits` fp32 `[n, vocab]` -> token ids int64 `[n]`, 0 where failed, and failed bool
        `[n]`. `drawn`: the op `draw`'s floats and ints of all rows, greedy ones among them (None:
        all are greedy). What is launched depends on shapes alone."""
        best = self._argmax(logits)
        failed = _best_is_not_finite(logits, best)
        if drawn is not None:
            floats, ints = drawn
            greedy = floats[0] < GREEDY_BELOW
            warm = torch.cat((floats[:1].masked_fill(greedy, 1.0), floats[1:]))
            best = torch.where(greedy, best, self._draw(logits, warm, ints, SHORT)[0])
        return best.masked_fill_(failed, 0), failed

    def stage(self, rows: np.ndarray, positions: np.ndarray) -> StagedSampling:
        """Prepare a step that draws one token for each of `rows`, to stand at `positions` (int64
        `[n]` both)."""
        batch = SampleRows(rows, positions, self._num_prompts[rows])
        features = [f.stage(batch) for f in self._features]
        wanted = self._logprobs
        asking = [i for i, row in enumerate(rows.tolist()) if row in wanted] if wanted else []
        return StagedSampling(
            device=self._device,
            argmax=self._argmax,
            draw=self._draw,
            processed_logprobs=self._processed_logprobs,
            features=[staged for staged in features if staged is not None],
            drawing=self._stage_draw(rows, positions),
            logprob_rows=asking,
            logprob_counts=[wanted[int(rows[i])] for i in asking],
            logprob_index=self._device.to_device(torch.tensor(asking)) if asking else None,
        )

    def _stage_draw(self, rows: np.ndarray, positions: np.ndarray) -> _Drawing | None:
        drawn = (self._floats[0, rows] >= GREEDY_BELOW).nonzero()[0]
        if not len(drawn):
            return None
        to_device = self._device.to_device
        selected = rows[drawn]
        floats = to_device(torch.from_numpy(self._floats[:, selected]))
        ints = to_device(torch.from_numpy(np.vstack([self._ints[:, selected], positions[drawn]])))
        index = None if len(drawn) == len(rows) else to_device(torch.from_numpy(drawn))
        asked = self._ints[0, selected]  # room for top_k and some equals of its last one
        short = int(np.where(asked > 0, asked + _EQUALS, SHORT).max())
        return _Drawing(index, floats, ints, min(short, SHORT))


@dataclass(frozen=True, slots=True)
class _Drawing:
    """The rows that are not greedy: their indices in the batch (None: all), and what the op `draw`
    takes beside their logits."""

    index: Tensor | None
    floats: Tensor
    ints: Tensor
    short: int


@dataclass(slots=True)
class StagedSampling:
    """One step's sampling, run inside the launch. `logprob_rows`, `logprob_counts`: batch indices
    that want log-probabilities, and how many; `logprob_index`: the former on the device."""

    device: Device
    argmax: Callable[[Tensor], Tensor]
    draw: Draw
    processed_logprobs: bool
    features: list[Staged]
    drawing: _Drawing | None
    logprob_rows: list[int] = field(default_factory=list)
    logprob_counts: list[int] = field(default_factory=list)
    logprob_index: Tensor | None = None

    def run(self, logits: Tensor) -> Sampled:
        """`logits` fp32 `[n, vocab]`, one row a row of the step; they may be overwritten.

        A row whose logits hold NaN or +inf, or in which every token is banned, has failed.
        """
        best = self.argmax(logits)
        failed = _best_is_not_finite(logits, best)
        raw = self._keep_raw(logits)
        for feature in self.features:
            feature.apply(logits)
        if self.features:
            best = self.argmax(logits)
            failed |= _best_is_not_finite(logits, best)
        token_ids = self._draw(logits, best).masked_fill_(failed, 0)
        for feature in self.features:
            feature.accept(token_ids)
        return Sampled(token_ids, failed, self._logprobs(raw, logits, token_ids))

    def _keep_raw(self, logits: Tensor) -> Tensor | None:
        """The rows that want raw log-probabilities, before processing overwrites them."""
        if self.logprob_index is None or self.processed_logprobs:
            return None
        whole = len(self.logprob_rows) == len(logits)
        return logits if whole and not self.features else logits[self.logprob_index]

    def _draw(self, logits: Tensor, best: Tensor) -> Tensor:
        """Greedy rows take the best token, the others draw by noise. Processed log-probabilities
        want the filtered logits: then they replace `logits`."""
        if self.drawing is None:
            return best
        index, floats, ints = self.drawing.index, self.drawing.floats, self.drawing.ints
        chosen = logits if index is None else logits[index]
        token_ids, floor = self.draw(chosen, floats, ints, self.drawing.short)
        if self.processed_logprobs and self.logprob_index is not None:
            scaled = scale(chosen, floats[0])
            scaled.masked_fill_(scaled < floor[:, None], _BANNED)
            logits[slice(None) if index is None else index] = scaled
        if index is None:
            return token_ids
        return best.index_copy_(0, index, token_ids)

    def _logprobs(
        self, raw: Tensor | None, logits: Tensor, token_ids: Tensor
    ) -> HostLogprobs | None:
        if self.logprob_index is None:
            return None
        source = logits[self.logprob_index] if raw is None else raw
        chosen = token_ids[self.logprob_index]
        return gather_logprobs(self.device, source, chosen, max(self.logprob_counts))


def _best_is_not_finite(logits: Tensor, best: Tensor) -> Tensor:
    """bool `[n]`: of each row the logit at `best`, int64 `[n]`; a NaN counts as the highest."""
    # isfinite is four launches, and this runs in every step.
    return ~(logits.gather(1, best.unsqueeze(1)).squeeze(1).abs_() < float("inf"))
