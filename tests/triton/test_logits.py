"""Penalties, masks and log-probabilities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimaran.core.sampler.penalties import _StagedPenalties
from trimaran.kernels_cuda.portable import logits as portable
from trimaran.kernels_cuda.portable.tuning import Table

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("longest", [1, 50, 1500])
def test_penalties(longest: int, device: torch.device, table: Table) -> None:
    """As the sampler's own; prompts repeat tokens, and one row holds a single token."""
    vocab = 97
    logits = 3 * torch.randn(6, vocab, device=device)
    tokens = torch.randint(0, vocab, (5, longest + 3), dtype=torch.int32, device=device)
    counts = torch.randint(-2, 3, (4, vocab), dtype=torch.int32, device=device).clamp_(min=0)
    lengths = [longest, 1, longest // 2 + 1]
    places = torch.tensor([[4, 0, 3], [2, 3, 0], [1, 4, 0], lengths], device=device)
    settings = torch.tensor([[1.3, 0.2, -0.5], [0.7, 0.0, 1.5], [1.0, -0.1, 0.0]], device=device)
    expected, given = logits.clone(), (tokens[:, :longest], places, settings)
    _StagedPenalties(counts, *given).apply(expected)
    portable.apply_penalties(logits, counts, *given, table)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


def test_nobody_asks(device: torch.device, table: Table) -> None:
    logits = torch.zeros(2, 5, device=device)
    none = torch.zeros(4, 0, dtype=torch.int64, device=device)
    counts, settings = torch.zeros(0, 5, dtype=torch.int32), torch.zeros(0, 3)
    portable.apply_penalties(logits, counts, counts, none, settings, table)
    portable.apply_bitmask(logits, torch.zeros(0, 1, dtype=torch.int32), table)
    assert logits.eq(0).all()


def packed(allowed: Tensor) -> Tensor:
    """bool `[masks, vocab]` -> int32 `[masks, words]`; bits past the vocabulary are 0."""
    masks, vocab = allowed.shape
    bits = torch.zeros(masks, -(-vocab // 32) * 32, dtype=torch.int64, device=allowed.device)
    bits[:, :vocab] = allowed
    powers = 2 ** torch.arange(32, device=allowed.device)
    return (bits.view(masks, -1, 32) * powers).sum(-1).to(torch.int32)


@pytest.mark.parametrize("index", [None, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("vocab", [1, 32, 100, 5000])
def test_bitmask(vocab: int, index: torch.dtype | None, device: torch.device, table: Table) -> None:
    logits = torch.randn(5, vocab, device=device)
    allowed = torch.rand(3, vocab, device=device) < 0.5
    rows = torch.arange(3, device=device) if index is None else torch.tensor([4, 0, 2])
    expected = logits.clone()
    expected[rows] = expected[rows].masked_fill(~allowed, -INF)
    given = None if index is None else rows.to(device, index)
    portable.apply_bitmask(logits, packed(allowed), table, given)
    assert logits.equal(expected)


def test_bitmask_does_not_write_past_a_row(device: torch.device, table: Table) -> None:
    whole = torch.zeros(3, 200, device=device)
    portable.apply_bitmask(whole[:, :70], packed(torch.zeros(3, 70, dtype=torch.bool)), table)
    assert whole[:, :70].eq(-INF).all() and whole[:, 70:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("vocab", [1, 100, 5003])
def test_logprobs(
    vocab: int, rows: int, dtype: torch.dtype, device: torch.device, table: Table
) -> None:
    logits = (5 * torch.randn(rows, vocab, device=device)).to(dtype)
    for shape in ((rows,), (rows, 3)):
        ids = torch.randint(0, vocab, shape, device=device)
        found, ranks = portable.logprobs(logits, ids, table)
        chosen = ids.view(rows, -1)
        expected = logits.float().log_softmax(-1).gather(-1, chosen).view(shape)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        higher = logits[:, None] > logits.gather(-1, chosen)[:, :, None]
        assert ranks.equal(1 + higher.sum(-1).view(shape))


def test_logprobs_of_extremes(device: torch.device, table: Table) -> None:
    logits = torch.randn(6, 3000, device=device)
    logits[0, 5], logits[1, 2000], logits[2] = NAN, INF, -INF
    logits[3, 1:] = -INF
    logits[4] = 3e38 * logits[4].sign()
    ids = torch.tensor([7, 7, 7, 0, 9, 9], device=device)
    found, _ = portable.logprobs(logits, ids, table)
    expected = logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    found, ranks = portable.logprobs(logits[3:4], torch.tensor([1], device=device), table)
    assert found.item() == -INF and ranks.item() == 2
