"""Decoding with multi-head latent attention, one query at a time in fp32."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from trimaran.kernels_cuda.portable.mla import LATENT, ROTARY, mla_decode
from trimaran.kernels_cuda.portable.tuning import Entry, Table

SCALE = (128 + 64) ** -0.5
SIZE = 16


def reference(query: Tensor, cache: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    out = torch.zeros(*query.shape[:2], LATENT, device=query.device)
    for token, length in enumerate(lengths.tolist()):
        if length:
            at = torch.arange(length, device=query.device)
            keys = cache[tables[token][at // SIZE].long(), at % SIZE].float()
            weights = (query[token].float() @ keys.T * SCALE).softmax(-1)
            out[token] = weights @ keys[:, :LATENT]
    return out


def tensors(
    device: torch.device, lengths: list[int], heads: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What no query may see is NaN: other blocks, and the places behind the last key."""
    query = torch.randn(len(lengths), heads, LATENT + ROTARY, device=device)
    columns = max(1, -(-max(lengths) // SIZE))
    cache = torch.full((len(lengths) * columns + 3, SIZE, LATENT + ROTARY), float("nan"))
    tables = 3 + torch.randperm(len(lengths) * columns).view(len(lengths), columns)
    for row, length in enumerate(lengths):
        for position in range(length):
            block = tables[row, position // SIZE]
            cache[block, position % SIZE] = torch.randn(LATENT + ROTARY)
    found = (query.to(dtype), cache.to(device, dtype), tables.int().to(device))
    return *found, torch.tensor(lengths, dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("lengths", "heads"), [([1], 16), ([0, 5, 33, 300], 16), ([70, 16], 5), ([40], 40)], ids=str
)
def test_decode(
    lengths: list[int], heads: int, dtype: torch.dtype, device: torch.device, table: Table
) -> None:
    query, cache, tables, seen = tensors(device, lengths, heads, dtype)
    found = mla_decode(query, cache, tables, seen, SCALE, table)
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(
        found.float(), reference(query, cache, tables, seen), rtol=tolerance, atol=tolerance
    )


def test_queries_held_at_once(device: torch.device, table: Table) -> None:
    values = {"HEADS": 16, "BLOCK": 16, "CHUNK": LATENT, "OUT": LATENT, "SPLITS": 2}
    own = dataclasses.replace(table, entries={"mla": (Entry({}, values, "a test's"),)})
    query, cache, tables, seen = tensors(device, [50, 17], 16, torch.float32)
    found = mla_decode(query, cache, tables, seen, SCALE, own)
    expected = reference(query, cache, tables, seen)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_several_queries_of_a_sequence(device: torch.device, table: Table) -> None:
    query, cache, tables, _ = tensors(device, [20, 40, 7], 16, torch.float32)
    sequences = torch.tensor([1, 1, 0], dtype=torch.int32, device=device)
    seen = torch.tensor([39, 40, 20], dtype=torch.int32, device=device)
    found = mla_decode(query, cache, tables, seen, SCALE, table, sequences=sequences)
    expected = reference(query, cache, tables[sequences.long()], seen)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
