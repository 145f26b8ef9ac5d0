"""Decoding with multi-head latent attention (DeepSeek-V2, 2024, section 2.1), in latent form: all
heads share one key a token, of which the first LATENT channels are its value as well.

A program takes some heads of one query and part of its keys; a second kernel merges the parts
(flash-decoding, Dao et al. 2023). The softmax is the online one (Milakov & Gimelshein 2018), in
powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import Table

LATENT = 512
ROTARY = 64

_LOG2E = 1.4426950408889634
_LOWEST = tl.constexpr(-1.0e30)
"""Stands for "no score yet": its difference to itself is 0 and not NaN."""


@triton.jit
def _add_products(
    scores,
    query_at,
    key_at,
    held,
    inside,
    LATENT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Scores `[heads, keys]` + the products of queries and keys, CHUNK channels at a time."""
    for first in range(0, LATENT, CHUNK):  # unrolled, all the query's loads would be hoisted
        channel = (first + tl.arange(0, CHUNK))[None, :]
        query = tl.load(query_at + channel, mask=held, other=0.0)
        key = tl.load(key_at + channel, mask=inside[:, None], other=0.0)
        scores = tl.dot(query, tl.trans(key), scores, input_precision="ieee")
    return scores


@triton.jit(do_not_specialize=["tables_stride"])
def _attend(
    query_ptr,
    cache_ptr,
    tables_ptr,
    sequences_ptr,
    lengths_ptr,
    partial_ptr,
    state_ptr,
    scale,
    query_stride,
    cache_stride,
    tables_stride,
    NUM_HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LATENT: tl.constexpr,
    ROTARY: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    OUT: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """CHUNK: how many channels of the queries are held at a time; all of them: they are loaded
    once; fewer (where the registers hold no more): they come from the cache for every tile. OUT:
    how many channels of the result a program computes; if not all, then others repeat its scores.
    """
    tl.static_assert((CHUNK < LATENT) | (OUT == LATENT), "what is split is scored in chunks")
    parts: tl.constexpr = LATENT // OUT
    token = tl.program_id(0).to(tl.int64)
    split, part = tl.program_id(2) // parts, tl.program_id(2) % parts
    length = tl.load(lengths_ptr + token)
    sequence = token
    if sequences_ptr is not None:
        sequence = tl.load(sequences_ptr + token).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    latent, rotary = part * OUT + tl.arange(0, OUT), LATENT + tl.arange(0, ROTARY)
    at = query_ptr + token * query_stride + head[:, None] * (LATENT + ROTARY)
    held = (head < NUM_HEADS)[:, None]
    query_rotary = tl.load(at + rotary[None, :], mask=held, other=0.0)
    if CHUNK == LATENT:
        query = tl.load(at + latent[None, :], mask=held, other=0.0)
    tiles = tl.cdiv(length, BLOCK)
    most = tl.full([HEADS], _LOWEST, tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    found = tl.zeros([HEADS, OUT], tl.float32)
    for tile in range(tiles * split // SPLITS, tiles * (split + 1) // SPLITS):
        key = tile * BLOCK + tl.arange(0, BLOCK)
        inside = key < length
        block = tl.load(
            tables_ptr + sequence * tables_stride + key // BLOCK_SIZE, mask=inside, other=0
        )
        row = cache_ptr + block.to(tl.int64) * cache_stride
        row += key % BLOCK_SIZE * (LATENT + ROTARY)
        vector = tl.load(row[:, None] + latent[None, :], mask=inside[:, None], other=0.0)
        turned = tl.load(row[:, None] + rotary[None, :], mask=inside[:, None], other=0.0)
        scores = tl.dot(query_rotary, tl.trans(turned), input_precision="ieee")
        if CHUNK == LATENT:
            scores = tl.dot(query, tl.trans(vector), scores, input_precision="ieee")
        else:
            scores = _add_products(scores, at, row[:, None], held, inside, LATENT, CHUNK)
        scores *= scale
        scores = tl.where(inside[None, :], scores, _LOWEST)
        higher = tl.maximum(most, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(most - higher)
        most = higher
        total = total * fade + tl.sum(weights, axis=1)
        found = tl.dot(
            weights.to(vector.dtype), vector, found * fade[:, None], input_precision="ieee"
        )
    place = (token * SPLITS + split) * NUM_HEADS + head
    tl.store(partial_ptr + place[:, None] * LATENT + latent[None, :], found, mask=held)
    tl.store(state_ptr + 2 * place, most, mask=head < NUM_HEADS)
    tl.store(state_ptr + 2 * place + 1, total, mask=head < NUM_HEADS)


@triton.jit
def _merge(
    partial_ptr,
    state_ptr,
    out_ptr,
    NUM_HEADS: tl.constexpr,
    LATENT: tl.constexpr,
    SPLITS: tl.constexpr,
):
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    latent = tl.arange(0, LATENT)
    place = (token * SPLITS + tl.arange(0, SPLITS)) * NUM_HEADS + head
    most, total = tl.load(state_ptr + 2 * place), tl.load(state_ptr + 2 * place + 1)
    weights = tl.exp2(most - tl.max(most, axis=0))
    # A part without keys has a weight of no meaning, and found nothing.
    total = tl.sum(weights * total, axis=0)
    partial = tl.load(partial_ptr + place[:, None] * LATENT + latent[None, :])
    out = tl.sum(weights[:, None] * partial, axis=0) / tl.where(total == 0.0, 1.0, total)
    at = out_ptr + (token * NUM_HEADS + head) * LATENT + latent
    tl.store(at, out.to(out_ptr.dtype.element_ty))


def mla_decode(
    query: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    scale: float,
    table: Table,
    *,
    sequences: Tensor | None = None,
) -> Tensor:
    """query `[tokens, heads, LATENT + ROTARY]`, dense but for the stride of tokens, in the dtype of
    the cache; cache `[blocks, block_size, LATENT + ROTARY]`, dense within a block -> `[tokens,
    heads, LATENT]`. `lengths` int32 `[tokens]`: how many keys a token sees, its own among them (0:
    its result is 0); `block_tables` int32 `[seqs, blocks]`, whose row `sequences[token]` (int32;
    None: token) is a token's. Scores are q.k * `scale`."""
    tokens, heads, size = query.shape
    if size != LATENT + ROTARY or query.stride(2) != 1 or query.stride(1) != size:
        raise ValueError(f"queries of shape {tuple(query.shape)} and strides {query.stride()}")
    out = query.new_empty(tokens, heads, LATENT)
    if not tokens:
        return out
    values = table.pick("mla", tokens=tokens, heads=heads)
    values["HEADS"] = min(values["HEADS"], max(16, triton.next_power_of_2(heads)))
    splits = values["SPLITS"]
    partial = query.new_empty(tokens, splits, heads, LATENT, dtype=torch.float32)
    state = query.new_empty(tokens, splits, heads, 2, dtype=torch.float32)
    _attend[(tokens, triton.cdiv(heads, values["HEADS"]), splits * (LATENT // values["OUT"]))](
        query, cache, block_tables, sequences, lengths, partial, state, scale * _LOG2E,
        query.stride(0), cache.stride(0), block_tables.stride(0),
        NUM_HEADS=heads, BLOCK_SIZE=cache.shape[1], LATENT=LATENT, ROTARY=ROTARY,
        **values,
    )  # fmt: skip
    _merge[(tokens, heads)](
        partial, state, out, NUM_HEADS=heads, LATENT=LATENT, SPLITS=splits, num_warps=4
    )
    return out
