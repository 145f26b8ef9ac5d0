"""Drawing one token a row: filters as thresholds, then Gumbel-max. The op `draw`'s reference.

Every filter (min_p, top_k, top_p) is a lower bound on a row's logits, so the survivors do not
depend on the order in which equal logits are sorted, on the other rows, or on how many candidates
were looked at. Where the survivors fit a short list of the largest logits, noise is computed for
these alone; noise belongs to a token id, hence the token is the one a full pass would draw.

Gumbel-max: argmax(logit / T + g) with g standard Gumbel is a draw from softmax(logit / T).
The decisions "is the short list enough" read tensors on the host: a device where that costs a
synchronisation brings its own `draw` op.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .philox import NoiseKey, gumbel_at, gumbel_rows

SHORT = 256
"""How many candidates are looked at first, where top_k does not say."""

_GROWTH = 16
_NEVER = float("-inf")


class DrawParams(NamedTuple):
    """Settings of the rows to draw for: `[rows]` each; fp32, `top_k` int64 (0: all)."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    key: NoiseKey

    def select(self, rows: Tensor) -> DrawParams:
        temperature, top_k, top_p, min_p, key = self
        return DrawParams(temperature[rows], top_k[rows], top_p[rows], min_p[rows], key.rows(rows))

    @property
    def filtered(self) -> Tensor:
        return (self.top_k > 0) | (self.top_p < 1.0) | (self.min_p > 0.0)


def scale(logits: Tensor, temperature: Tensor) -> Tensor:
    """(logits - row maximum) / temperature: at most 0, so that nothing overflows."""
    return (logits - logits.amax(-1, keepdim=True)).div_(temperature[:, None])


def draw(logits: Tensor, floats: Tensor, ints: Tensor, short: int = SHORT) -> tuple[Tensor, Tensor]:
    """logits fp32 `[rows, vocab]`; floats fp32 `[3, rows]`: temperature (not 0), top_p, min_p;
    ints int64 `[5, rows]`: top_k (0: all), the low and high half of the seed, child index, position
    of the token -> token ids int64 `[rows]`, and fp32 `[rows]` what a row's `scale`d logits had to
    reach to survive the filters. A row whose largest logit is not finite yields token 0.

    `short`: how many candidates of a filtered row to look at first; it changes the cost, never the
    token.
    """
    temperature, top_p, min_p = floats.unbind()
    top_k, *key = ints.unbind()
    params = DrawParams(temperature, top_k, top_p, min_p, NoiseKey(*key))
    scaled = scale(logits, temperature)
    token_ids = torch.zeros(len(scaled), dtype=torch.int64, device=scaled.device)
    floor = torch.full_like(temperature, _NEVER)
    rest = params.filtered.nonzero()[:, 0]
    size = short
    while len(rest):
        found = _draw_short(_take(scaled, rest), params.select(rest), size)
        token_ids[rest] = found.token_ids
        floor[rest] = found.floor
        rest = rest[~found.complete]
        size *= _GROWTH
    whole = (~params.filtered).nonzero()[:, 0]
    if len(whole):
        noise = gumbel_rows(params.key.rows(whole), scaled.shape[-1])
        token_ids[whole] = noise.add_(_take(scaled, whole)).argmax(-1)
    failed = ~logits.amax(-1).isfinite()
    return token_ids.masked_fill_(failed, 0), floor.masked_fill_(failed, _NEVER)


def _take(scaled: Tensor, rows: Tensor) -> Tensor:
    """The given ascending rows; without a copy when they are all of them."""
    return scaled if len(rows) == len(scaled) else scaled[rows]


class _Found(NamedTuple):
    """What a short list yields; true only where `complete`: no survivor is outside the list."""

    token_ids: Tensor
    floor: Tensor
    complete: Tensor


def _draw_short(scaled: Tensor, params: DrawParams, size: int) -> _Found:
    """Look at the `size` largest logits of each row; all of them once that is most of the row."""
    vocab = scaled.shape[-1]
    size = size if 2 * size < vocab else vocab
    values, ids = scaled.topk(size, dim=-1)
    floor = torch.maximum(params.min_p.log(), _kth(values, params.top_k))
    last = values[:, -1] if size < vocab else torch.full_like(floor, _NEVER)
    # Is every candidate of the nucleus listed? (Equals of the last one may not be.)
    bounded = (last < floor) | (last == _NEVER)
    top_k_known = bounded | (params.top_k <= size)
    floor, reached = _nucleus(scaled, values, floor, bounded, params.top_p)
    complete = (last == _NEVER) | (top_k_known & reached & (last < floor))
    scores = gumbel_at(params.key, ids).add_(values)
    scores.masked_fill_(values < floor[:, None], _NEVER)
    best = scores.amax(-1, keepdim=True)
    token_ids = ids.masked_fill(scores < best, vocab).amin(-1)  # of equals, the smallest id
    return _Found(token_ids.clamp_(max=vocab - 1), floor, complete)


def _kth(values: Tensor, top_k: Tensor) -> Tensor:
    """The k-th of each row's descending `values`; no bound where k is 0 or beyond the list."""
    size = values.shape[-1]
    kth = values.gather(-1, (top_k.clamp(1, size) - 1)[:, None])[:, 0]
    return kth.masked_fill((top_k == 0) | (top_k > size), _NEVER)


def _nucleus(
    scaled: Tensor, values: Tensor, floor: Tensor, bounded: Tensor, top_p: Tensor
) -> tuple[Tensor, Tensor]:
    """Raise `floor` to the last logit of the nucleus: the fewest largest survivors whose share of
    the survivors' probability reaches top_p. Also says where that logit was within the list.

    Sums are fp64, so that their order, which depends on the batch's shape, decides nothing.
    """
    if bool((top_p >= 1.0).all()):
        return floor, torch.ones_like(bounded)
    kept = values.double().exp().masked_fill_(values < floor[:, None], 0.0)
    cumulative = kept.cumsum(-1)
    total = cumulative[:, -1]
    if not bool(bounded.all()):
        everything = scaled.exp().masked_fill_(scaled < floor[:, None], 0.0)
        total = torch.where(bounded, total, everything.sum(-1, dtype=torch.float64))
    inside = cumulative >= (top_p.double() * total)[:, None]
    reached = inside.any(-1)
    border = values.gather(-1, inside.int().argmax(-1, keepdim=True))[:, 0]
    raised = torch.where(reached & (top_p < 1.0), torch.maximum(floor, border), floor)
    return raised, reached | (top_p >= 1.0)
