"""What is done to logits before a draw, and read from them after: penalties, masks of a grammar,
log-probabilities."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sampling import dense_rows, split
from .tuning import Table


@triton.jit(do_not_specialize=["asking", "longest"])
def _penalized(
    logits_ptr,
    counts_ptr,
    tokens_ptr,
    places_ptr,
    settings_ptr,
    new_ptr,
    stride,
    tokens_stride,
    asking,
    longest,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
):
    """The new logits of the tokens a row holds, `[asking, longest]`."""
    place = tl.program_id(0).to(tl.int64)
    index, slot = tl.load(places_ptr + place), tl.load(places_ptr + asking + place)
    row = tl.load(places_ptr + 2 * asking + place)
    length = tl.load(places_ptr + 3 * asking + place)
    if tl.program_id(1) * TILE >= length:
        return
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < length
    repetition = tl.load(settings_ptr + 3 * place)
    frequency = tl.load(settings_ptr + 3 * place + 1)
    presence = tl.load(settings_ptr + 3 * place + 2)
    token = tl.load(tokens_ptr + row * tokens_stride + column, mask=inside, other=0)
    x = tl.load(logits_ptr + index * stride + token, mask=inside, other=0.0)
    count = tl.load(counts_ptr + slot * VOCAB + token, mask=inside, other=0).to(tl.float32)
    x = tl.where(x > 0.0, tl.div_rn(x, repetition + tl.zeros_like(x)), x * repetition)
    x -= frequency * count + tl.where(count > 0.0, presence, 0.0)
    tl.store(new_ptr + place * longest + column, x, mask=inside)


@triton.jit(do_not_specialize=["asking", "longest"])
def _replace(
    logits_ptr,
    tokens_ptr,
    places_ptr,
    new_ptr,
    stride,
    tokens_stride,
    asking,
    longest,
    TILE: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    length = tl.load(places_ptr + 3 * asking + place)
    if tl.program_id(1) * TILE >= length:
        return
    index, row = tl.load(places_ptr + place), tl.load(places_ptr + 2 * asking + place)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < length
    token = tl.load(tokens_ptr + row * tokens_stride + column, mask=inside, other=0)
    x = tl.load(new_ptr + place * longest + column, mask=inside, other=0.0)
    tl.store(logits_ptr + index * stride + token, x, mask=inside)


def apply_penalties(
    logits: Tensor,
    counts: Tensor,
    tokens: Tensor,
    places: Tensor,
    settings: Tensor,
    table: Table,
) -> None:
    """Repetition, frequency and presence penalties in place, as `core.sampler.penalties` has them:
    of the tokens that a row holds, the logit is divided by the repetition penalty (where it is
    positive; multiplied otherwise), then lowered by frequency * count, and by presence where the
    token was generated.

    logits fp32 `[n, vocab]`; counts int32 `[slots, vocab]`, how often a token was generated;
    tokens int32 `[rows, longest]`, no row longer than that; places int64 `[4, asking]`: index in
    the batch, slot, row, number of tokens; settings fp32 `[asking, 3]`: repetition, frequency,
    presence. Two launches: a token that a row holds twice is read before anything is written.
    """
    asking, longest = places.shape[1], tokens.shape[1]
    if not asking or not longest:
        return
    values = table.pick("penalties", longest=longest)
    new = torch.empty(asking, longest, dtype=torch.float32, device=logits.device)
    grid = (asking, triton.cdiv(longest, values["TILE"]))
    places, strides = places.contiguous(), (dense_rows(logits).stride(0), tokens.stride(0))
    _penalized[grid](
        logits, counts.contiguous(), tokens, places, settings.contiguous(), new, *strides,
        asking, longest, VOCAB=logits.shape[1], **values,
    )  # fmt: skip
    _replace[grid](logits, tokens, places, new, *strides, asking, longest, **values)


@triton.jit
def _bitmask(
    logits_ptr,
    mask_ptr,
    index_ptr,
    stride,
    mask_stride,
    VOCAB: tl.constexpr,
    WORDS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row = place
    if index_ptr is not None:
        row = tl.load(index_ptr + place).to(tl.int64)
    word = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    bit = tl.arange(0, 32)[None, :]
    allowed = tl.load(mask_ptr + place * mask_stride + word, mask=word * 32 < VOCAB, other=-1)
    column = word[:, None] * 32 + bit
    banned = ((allowed[:, None] >> bit) & 1) == 0
    nothing = tl.full([WORDS, 32], float("-inf"), logits_ptr.dtype.element_ty)
    tl.store(logits_ptr + row * stride + column, nothing, mask=banned & (column < VOCAB))


def apply_bitmask(
    logits: Tensor, bitmask: Tensor, table: Table, index: Tensor | None = None
) -> None:
    """logits `[n, vocab]`, in place: -inf where a grammar bans a token. bitmask int32 `[masks,
    ceil(vocab / 32)]` (xgrammar's): bit t % 32 of word t // 32 is 1 where token t is allowed. Mask
    i is for row `index[i]` (int32 or int64), or i. Bits past the vocabulary mean nothing."""
    masks, vocab = len(bitmask), logits.shape[1]
    if not masks:
        return
    values = table.pick("bitmask", vocab=vocab)
    grid = (masks, triton.cdiv(triton.cdiv(vocab, 32), values["WORDS"]))
    _bitmask[grid](
        dense_rows(logits), dense_rows(bitmask), index, logits.stride(0), bitmask.stride(0),
        VOCAB=vocab, **values,
    )  # fmt: skip


@triton.jit
def _weigh(
    logits_ptr,
    ids_ptr,
    most_ptr,
    sums_ptr,
    higher_ptr,
    stride,
    VOCAB: tl.constexpr,
    NUM: tl.constexpr,
    IDS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Of a part of a row: its largest logit, the sum of e^(logit - largest), and for each id how
    many logits are higher than its own."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    logits_ptr += row * stride
    number = tl.arange(0, IDS)
    token = tl.load(ids_ptr + row * NUM + number, mask=number < NUM, other=0)
    chosen = tl.load(logits_ptr + token).to(tl.float32)
    most = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    higher = tl.zeros([TILE, IDS], tl.int32)
    end = min(VOCAB, (part + 1) * CHUNK)
    for start in range(part * CHUNK, end, TILE):
        column = start + tl.arange(0, TILE)
        x = tl.load(logits_ptr + column, mask=column < end, other=float("-inf")).to(tl.float32)
        new = tl.maximum(most, x)
        finite = tl.where(new == float("-inf"), 0.0, new)  # of nothing yet, the sum is 0
        total = total * tl.exp(most - finite) + tl.exp(x - finite)
        most = new
        higher += (x[:, None] > chosen[None, :]).to(tl.int32)
    largest = tl.max(most, axis=0)
    finite = tl.where(largest == float("-inf"), 0.0, largest)
    at = row * SPLITS + part
    tl.store(most_ptr + at, largest)
    tl.store(sums_ptr + at, tl.sum(total * tl.exp(most - finite), axis=0))
    tl.store(higher_ptr + at * IDS + number, tl.sum(higher, axis=0))


@triton.jit
def _logprobs(
    logits_ptr,
    ids_ptr,
    most_ptr,
    sums_ptr,
    higher_ptr,
    logprobs_ptr,
    ranks_ptr,
    stride,
    NUM: tl.constexpr,
    IDS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    part, number = row * SPLITS + tl.arange(0, SPLITS), tl.arange(0, IDS)
    most, sums = tl.load(most_ptr + part), tl.load(sums_ptr + part)
    largest = tl.max(most, axis=0)
    total = tl.log(tl.sum(sums * tl.exp(most - largest), axis=0))
    token = tl.load(ids_ptr + row * NUM + number, mask=number < NUM, other=0)
    chosen = tl.load(logits_ptr + row * stride + token).to(tl.float32)
    higher = tl.load(higher_ptr + part[:, None] * IDS + number[None, :])
    at = row * NUM + number
    tl.store(logprobs_ptr + at, chosen - largest - total, mask=number < NUM)
    tl.store(ranks_ptr + at, 1 + tl.sum(higher, axis=0).to(tl.int64), mask=number < NUM)


def logprobs(logits: Tensor, ids: Tensor, table: Table) -> tuple[Tensor, Tensor]:
    """logits `[rows, vocab]`, ids (int32 or int64) `[rows]` or `[rows, n]` -> the log-probability
    of each id, fp32, and its rank, int64: 1 + how many logits are higher. No log-softmax of a whole
    row is written; a row with NaN or +inf has NaN."""
    rows, vocab = logits.shape
    found = torch.empty(ids.shape, dtype=torch.float32, device=logits.device)
    ranks = torch.empty(ids.shape, dtype=torch.int64, device=logits.device)
    num = ids.numel() // max(rows, 1)
    if not rows or not num:
        return found, ranks
    values, chunk = split(table, "logprobs", rows, vocab)
    splits, places = values["SPLITS"], triton.next_power_of_2(num)
    ids, stride = ids.contiguous(), dense_rows(logits).stride(0)
    most, sums = torch.empty(2, rows, splits, dtype=torch.float32, device=logits.device)
    higher = torch.empty(rows, splits, places, dtype=torch.int32, device=logits.device)
    _weigh[(rows, splits)](
        logits, ids, most, sums, higher, stride,
        VOCAB=vocab, NUM=num, IDS=places, CHUNK=chunk, **values,
    )  # fmt: skip
    _logprobs[(rows,)](
        logits, ids, most, sums, higher, found, ranks, stride,
        NUM=num, IDS=places, SPLITS=splits, num_warps=1,
    )  # fmt: skip
    return found, ranks
