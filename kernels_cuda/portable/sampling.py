"""From scores to a token: the highest of each row, and draws by Gumbel-max.

`draw` keeps no row waiting for the host, sorts nothing and writes nothing as large as its input:

1. `_largest`: the largest logit of each part of a row.
2. `_survey`: rows without filters add noise and remember each part's best token. For the others,
   how many logits lie in each bin of distance from the largest, and what they weigh.
3. `_collect`: the bins say how far down a survivor can be; what is no further is listed.
4. `_choose`: a search for the thresholds among what is listed (or the row, where that is too
   much): each pass counts or weighs what lies above eight pivots and keeps the bracket that holds
   the threshold. Then noise for the survivors.

A logit is known by its distance, (largest - logit) / temperature, rounded as in `platforms.draw`:
not negative, so that its bits are in the order of its values, and a threshold is an integer.
Weights are e^-distance in fixed point: their sum does not depend on the order of summands, hence
not on how many programs share a row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .noise import exp_negative, gumbel_at, gumbel_from, log
from .tuning import Table

BINS = 128
"""Bins of distance, a quarter wide; the last one holds the rest."""

_INFINITE = tl.constexpr(0x7F800000)
"""The bits of infinity, the largest distance."""


@triton.jit
def ranked(score, index):
    """int64 of the order of fp32 scores; of equals the lowest index is the highest. NaN is higher
    than all numbers."""
    score = tl.where(score == 0.0, 0.0, score)  # -0 is 0
    bits = score.to(tl.int32, bitcast=True)
    order = tl.where(score != score, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (order.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def index_of(rank):
    return 0x7FFFFFFF - (rank & 0x7FFFFFFF)


@triton.jit
def _argmax(
    scores_ptr,
    best_ptr,
    stride,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    end = min(VOCAB, (split + 1) * CHUNK)
    best = tl.full([TILE], -0x8000000000000000, tl.int64)
    for start in range(split * CHUNK, end, TILE):
        column = start + tl.arange(0, TILE)
        score = tl.load(scores_ptr + row * stride + column, mask=column < end, other=0.0)
        rank = ranked(score.to(tl.float32), column)
        best = tl.where(column < end, tl.maximum(best, rank), best)
    tl.store(best_ptr + row * SPLITS + split, tl.max(best, axis=0))


@triton.jit
def _best_of_splits(best_ptr, out_ptr, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    best = tl.max(tl.load(best_ptr + row * SPLITS + tl.arange(0, SPLITS)), axis=0)
    tl.store(out_ptr + row, index_of(best))


def argmax(scores: Tensor, table: Table) -> Tensor:
    """scores `[rows, vocab]` -> int64 `[rows]`: the highest score's index, the lowest such. A NaN
    counts as the highest."""
    rows, vocab = scores.shape
    out = torch.empty(rows, dtype=torch.int64, device=scores.device)
    if not rows:
        return out
    values, chunk = split(table, "argmax", rows, vocab)
    best = torch.empty(rows, values["SPLITS"], dtype=torch.int64, device=scores.device)
    _argmax[(rows, values["SPLITS"])](
        dense_rows(scores), best, scores.stride(0), VOCAB=vocab, CHUNK=chunk, **values
    )
    _best_of_splits[(rows,)](best, out, SPLITS=values["SPLITS"], num_warps=1)
    return out


@triton.jit
def _largest(
    logits_ptr,
    largest_ptr,
    stride,
    VOCAB: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Infinite for a part that holds NaN, too: its row fails all the same."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    end = min(VOCAB, (split + 1) * CHUNK)
    most = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(split * CHUNK, end, TILE):
        column = start + tl.arange(0, TILE)
        x = tl.load(logits_ptr + row * stride + column, mask=column < end, other=float("-inf"))
        most = tl.maximum(most, tl.where(x == x, x, float("inf")))
    tl.store(largest_ptr + row * SPLITS + split, tl.max(most, axis=0))


@triton.jit
def _distance(logits_ptr, column, inside, largest, temperature):
    """Of some of a row's logits; infinite outside."""
    x = tl.load(logits_ptr + column, mask=inside, other=float("-inf"))
    return tl.div_rn(largest - x, temperature + tl.zeros_like(x))


@triton.jit
def _weight(distance, UNIT: tl.constexpr):
    """e^-distance in units of 1 / UNIT, int64."""
    return (exp_negative(-distance) * UNIT).to(tl.int64)


@triton.jit
def _bin(distance, BINS: tl.constexpr):
    return tl.minimum(distance * 4.0, BINS - 1.0).to(tl.int32)


@triton.jit
def _settings(floats_ptr, ints_ptr, row, rows):
    """A row's temperature, top_p, top_k, and the distance that min_p allows."""
    temperature = tl.load(floats_ptr + row)
    top_p = tl.load(floats_ptr + rows + row)
    min_p = tl.load(floats_ptr + 2 * rows + row)
    top_k = tl.load(ints_ptr + row)
    allowed = tl.where(min_p > 0.0, -log(tl.maximum(min_p, 1.2e-38)), float("inf"))
    return temperature, top_p, top_k, tl.where(allowed > 0.0, allowed, 0.0)  # not -0


@triton.jit(do_not_specialize=["rows"])
def _survey(
    logits_ptr,
    floats_ptr,
    ints_ptr,
    largest_ptr,
    counts_ptr,
    weights_ptr,
    best_ptr,
    stride,
    rows,
    VOCAB: tl.constexpr,
    BINS: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    largest = tl.max(tl.load(largest_ptr + row * SPLITS + tl.arange(0, SPLITS)), axis=0)
    if tl.abs(largest) == float("inf"):
        return
    logits_ptr += row * stride
    temperature, top_p, top_k, allowed = _settings(floats_ptr, ints_ptr, row, rows)
    end = min(VOCAB, (split + 1) * CHUNK)
    total = tl.zeros([TILE], tl.int64)
    if (top_k > 0) | (top_p < 1.0) | (allowed < float("inf")):
        counts = tl.zeros([BINS], tl.int32)
        for start in range(split * CHUNK, end, TILE):
            column = start + tl.arange(0, TILE)
            inside = column < end
            distance = _distance(logits_ptr, column, inside, largest, temperature)
            total += tl.where(distance <= allowed, _weight(distance, UNIT), 0)
            counts += tl.histogram(_bin(distance, BINS), BINS, mask=inside)
        at = row * SPLITS + split
        tl.store(counts_ptr + at * BINS + tl.arange(0, BINS), counts)
        tl.store(weights_ptr + at, tl.sum(total, axis=0))
    else:
        best = tl.full([TILE], -0x8000000000000000, tl.int64)
        for start in range(split * CHUNK, end, TILE):
            column = start + tl.arange(0, TILE)
            inside = column < end
            distance = _distance(logits_ptr, column, inside, largest, temperature)
            score = gumbel_from(start, TILE, ints_ptr + rows + row, rows) - distance
            best = tl.where(inside, tl.maximum(best, ranked(score, column)), best)
        tl.store(best_ptr + row * SPLITS + split, tl.max(best, axis=0))


@triton.jit
def _last_bin(counts, top_p, top_k, allowed, total, BINS: tl.constexpr):
    """The first bin beyond which there is no survivor. `total`: what all weigh, 1 for the largest
    logit alone; not asked where there is a top_k (which changes what top_p is a share of)."""
    number = tl.arange(0, BINS)
    if top_k > 0:
        enough = tl.cumsum(counts, axis=0) >= top_k
    else:
        # What lies in this bin and beyond weighs at most `rest`: if that is no more than the
        # nucleus may lack, then it ended in the bin before.
        rest = tl.cumsum(counts * tl.exp(number * -0.25), axis=0, reverse=True)
        beyond = rest <= (1.0 - top_p) * total * 0.999
        enough = tl.cumsum(beyond.to(tl.int32), axis=0) > 0
        number = tl.maximum(number - 1, 0)
    last = tl.min(tl.where(enough, number, BINS - 1), axis=0)
    return tl.minimum(last, _bin(allowed, BINS))


@triton.jit(do_not_specialize=["rows"])
def _collect(
    logits_ptr,
    floats_ptr,
    ints_ptr,
    largest_ptr,
    counts_ptr,
    weights_ptr,
    listed_ptr,
    ids_ptr,
    lengths_ptr,
    stride,
    rows,
    VOCAB: tl.constexpr,
    BINS: tl.constexpr,
    UNIT: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    LIST: tl.constexpr,
):
    """List the logits that may survive, by ascending token ids. Length -1: there are too many."""
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    largest = tl.max(tl.load(largest_ptr + row * SPLITS + tl.arange(0, SPLITS)), axis=0)
    if tl.abs(largest) == float("inf"):
        return
    temperature, top_p, top_k, allowed = _settings(floats_ptr, ints_ptr, row, rows)
    if not ((top_k > 0) | (top_p < 1.0) | (allowed < float("inf"))):
        return
    other = tl.arange(0, SPLITS)
    number = tl.arange(0, BINS)[None, :]
    counts = tl.load(counts_ptr + (row * SPLITS + other)[:, None] * BINS + number)
    total = tl.sum(tl.load(weights_ptr + row * SPLITS + other), axis=0).to(tl.float32) / UNIT
    last = _last_bin(tl.sum(counts, axis=0), top_p, top_k, allowed, total, BINS)
    lengths = tl.sum(tl.where(number <= last, counts, 0), axis=1)  # [splits]
    length = tl.sum(lengths, axis=0)
    if split == 0:
        tl.store(lengths_ptr + row, tl.where(length <= LIST, length, -1))
    if length > LIST:
        return
    place = tl.sum(tl.where(other < split, lengths, 0), axis=0)
    end = min(VOCAB, (split + 1) * CHUNK)
    for start in range(split * CHUNK, end, TILE):
        column = start + tl.arange(0, TILE)
        inside = column < end
        x = tl.load(logits_ptr + row * stride + column, mask=inside, other=float("-inf"))
        distance = tl.div_rn(largest - x, temperature + tl.zeros_like(x))
        keep = (inside & (_bin(distance, BINS) <= last)).to(tl.int32)
        at = row * LIST + place + tl.cumsum(keep, axis=0) - 1
        tl.store(listed_ptr + at, x, mask=keep > 0)
        tl.store(ids_ptr + at, column, mask=keep > 0)
        place += tl.sum(keep, axis=0)


@triton.jit
def _above(
    logits_ptr,
    length,
    largest,
    temperature,
    pivots,
    WEIGH: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """How many of a list's logits are at most each of the pivots away, or what they weigh: int64
    `[PIVOTS]`."""
    found = tl.zeros([TILE, PIVOTS], tl.int64 if WEIGH else tl.int32)
    for start in range(0, length, TILE):
        column = start + tl.arange(0, TILE)
        inside = column < length
        distance = _distance(logits_ptr, column, inside, largest, temperature)
        bits = tl.where(inside, distance.to(tl.int32, bitcast=True), 0x7FFFFFFF)
        within = bits[:, None] <= pivots[None, :]
        if WEIGH:
            found += tl.where(within, _weight(distance, UNIT)[:, None], 0)
        else:
            found += within.to(tl.int32)
    return tl.sum(found, axis=0).to(tl.int64)


@triton.jit
def _search(
    logits_ptr,
    length,
    largest,
    temperature,
    most,
    enough,
    WEIGH: tl.constexpr,
    UNIT: tl.constexpr,
    TILE: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """The smallest distance, as bits, within which there is `enough` (fp64); `most` at the most."""
    low, high = most * 0, most
    while low < high:
        step = (high - low + PIVOTS - 1) // PIVOTS
        number = tl.arange(0, PIVOTS)
        # Not beyond `high`; written so that nothing overflows.
        pivots = low + tl.minimum(number * step, high - low)
        found = _above(
            logits_ptr, length, largest, temperature, pivots, WEIGH, UNIT, TILE, PIVOTS
        )  # fmt: skip
        reached = found.to(tl.float64) >= enough
        first = tl.min(tl.where(reached, number, PIVOTS), axis=0)
        start = low
        low = tl.where(first > 0, start + tl.minimum((first - 1) * step, high - start) + 1, start)
        high = tl.where(first < PIVOTS, start + tl.minimum(first * step, high - start), high)
        low = tl.minimum(low, high)
    return high


@triton.jit(do_not_specialize=["rows"])
def _choose(
    logits_ptr,
    floats_ptr,
    ints_ptr,
    largest_ptr,
    weights_ptr,
    best_ptr,
    listed_ptr,
    ids_ptr,
    lengths_ptr,
    tokens_ptr,
    floor_ptr,
    stride,
    rows,
    VOCAB: tl.constexpr,
    UNIT: tl.constexpr,
    LIST: tl.constexpr,
    SPLITS: tl.constexpr,
    TILE: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    parts = row * SPLITS + tl.arange(0, SPLITS)
    largest = tl.max(tl.load(largest_ptr + parts), axis=0)
    if tl.abs(largest) == float("inf"):
        tl.store(tokens_ptr + row, 0)
        tl.store(floor_ptr + row, float("-inf"))
        return
    temperature, top_p, top_k, allowed = _settings(floats_ptr, ints_ptr, row, rows)
    if not ((top_k > 0) | (top_p < 1.0) | (allowed < float("inf"))):
        tl.store(tokens_ptr + row, index_of(tl.max(tl.load(best_ptr + parts), axis=0)))
        tl.store(floor_ptr + row, float("-inf"))
        return
    length = tl.load(lengths_ptr + row)
    known = length  # how many ids are listed; a row's own are its columns
    # By numbers: the AMD backend of Triton 3.6 does not compile a pointer that is one or another.
    whole, listed = logits_ptr + row * stride, listed_ptr + row * LIST
    source = tl.where(length < 0, whole.to(tl.int64), listed.to(tl.int64))
    source = source.to(tl.pointer_type(tl.float32))
    length = tl.where(length < 0, VOCAB, length)
    total = tl.sum(tl.load(weights_ptr + parts), axis=0).to(tl.float64)
    most = allowed.to(tl.int32, bitcast=True)
    if top_k > 0:
        kth = _search(
            source, length, largest, temperature, tl.full([], _INFINITE, tl.int32),
            top_k.to(tl.float64), False, UNIT, TILE, PIVOTS,
        )  # fmt: skip
        most = tl.minimum(most, kth)
        if top_p < 1.0:
            pivots = most + tl.zeros([PIVOTS], tl.int32)
            found = _above(
                source, length, largest, temperature, pivots, True, UNIT, TILE, PIVOTS
            )  # fmt: skip
            total = tl.max(found, axis=0).to(tl.float64)
    if top_p < 1.0:
        most = _search(
            source, length, largest, temperature, most, top_p.to(tl.float64) * total,
            True, UNIT, TILE, PIVOTS,
        )  # fmt: skip
    best = tl.full([TILE], -0x8000000000000000, tl.int64)
    for start in range(0, length, TILE):
        column = start + tl.arange(0, TILE)
        inside = column < length
        distance = _distance(source, column, inside, largest, temperature)
        token = tl.load(ids_ptr + row * LIST + column, mask=inside & (column < known), other=column)
        score = gumbel_at(token, ints_ptr + rows + row, rows) - distance
        survives = inside & (distance.to(tl.int32, bitcast=True) <= most)
        best = tl.where(survives, tl.maximum(best, ranked(score, token)), best)
    tl.store(tokens_ptr + row, index_of(tl.max(best, axis=0)))
    tl.store(floor_ptr + row, 0.0 - most.to(tl.float32, bitcast=True))


def draw(logits: Tensor, floats: Tensor, ints: Tensor, table: Table) -> tuple[Tensor, Tensor]:
    """logits fp32 `[rows, vocab]`; floats fp32 `[3, rows]`: temperature (above 0), top_p, min_p;
    ints int64 `[5, rows]`: top_k (0: all), the low and high half of the seed, child index, position
    of the token -> token ids int64 `[rows]`, and fp32 `[rows]` what (logit - largest) / temperature
    had to reach to survive the filters. A row whose largest logit is not finite yields token 0 and
    -inf. What a row yields depends on nothing but that row."""
    rows, vocab = logits.shape
    device = logits.device
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    floor = torch.empty(rows, dtype=torch.float32, device=device)
    if not rows:
        return tokens, floor
    values, chunk = split(table, "draw", rows, vocab)
    choose = table.pick("draw_choose", rows=rows, vocab=vocab)
    splits, length = values["SPLITS"], choose["LIST"]
    logits, floats, ints = dense_rows(logits), floats.contiguous(), ints.contiguous()

    def scratch(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, *shape, dtype=dtype, device=device)

    largest = scratch(splits, dtype=torch.float32)
    counts, weights = scratch(splits, BINS, dtype=torch.int32), scratch(splits, dtype=torch.int64)
    best = scratch(splits, dtype=torch.int64)
    listed, ids = scratch(length, dtype=torch.float32), scratch(length, dtype=torch.int32)
    lengths = scratch(dtype=torch.int32)
    grid, stride = (rows, splits), logits.stride(0)
    # 63 bits hold the sum of a whole vocabulary of ones.
    unit = float(1 << (62 - max(vocab - 1, 1).bit_length()))
    sizes: dict[str, Any] = {"VOCAB": vocab, "CHUNK": chunk, **values}
    whole: dict[str, Any] = {"BINS": BINS, "UNIT": unit, **sizes}
    given = (logits, floats, ints, largest)
    _largest[grid](logits, largest, stride, **sizes)
    _survey[grid](*given, counts, weights, best, stride, rows, **whole)
    _collect[grid](
        *given, counts, weights, listed, ids, lengths, stride, rows, LIST=length, **whole
    )
    _choose[(rows,)](
        *given, weights, best, listed, ids, lengths, tokens, floor, stride, rows,
        VOCAB=vocab, UNIT=unit, SPLITS=splits, **choose,
    )  # fmt: skip
    return tokens, floor


def split(table: Table, kernel: str, rows: int, vocab: int) -> tuple[dict[str, Any], int]:
    """The table's values, with no larger a tile and no more parts than a row needs; and how many
    columns a part has, a multiple of the tile."""
    values = table.pick(kernel, rows=rows, vocab=vocab)
    tile = min(values["TILE"], max(16, triton.next_power_of_2(vocab)))
    splits = min(values["SPLITS"], triton.next_power_of_2(triton.cdiv(vocab, tile)))
    chunk = triton.cdiv(triton.cdiv(vocab, splits), tile) * tile
    return {**values, "TILE": tile, "SPLITS": splits}, chunk


def dense_rows(x: Tensor) -> Tensor:
    if x.stride(1) != 1 and x.shape[1] != 1:
        raise ValueError(f"rows of strides {x.stride()}; a row has to be dense")
    return x
