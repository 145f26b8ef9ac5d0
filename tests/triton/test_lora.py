"""Low-rank adapters of mixed tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimaran.kernels_cuda.portable import lora
from trimaran.kernels_cuda.portable.tuning import Table


def reference(y: Tensor, x: Tensor, index: Tensor, a: Tensor, b: Tensor, scales: Tensor) -> Tensor:
    """In fp32, with A x rounded to the dtype."""
    y = y.float().clone()
    for token, adapter in enumerate(index.tolist()):
        if adapter >= 0:
            hidden = (a[adapter].float() @ x[token].float()).to(b.dtype)
            y[token] += scales[adapter] * (b[adapter].float() @ hidden.float())
    return y


def tensors(
    device: torch.device, tokens: int, rank: int, sizes: tuple[int, int], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    inputs, outputs = sizes
    x, y = torch.randn(tokens, inputs), torch.randn(tokens, outputs)
    a = torch.randn(5, rank, inputs) / inputs**0.5
    b = torch.randn(5, outputs, rank) / rank**0.5
    return *(one.to(device, dtype) for one in (y, x, a, b)), torch.rand(5, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(64, 64), (200, 300)], ids=str)
@pytest.mark.parametrize(("tokens", "rank"), [(1, 8), (3, 16), (40, 24), (70, 64), (5, 100)])
def test_mixed_adapters(
    tokens: int,
    rank: int,
    sizes: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
    table: Table,
) -> None:
    y, x, a, b, scales = tensors(device, tokens, rank, sizes, dtype)
    index = torch.randint(-1, 5, (tokens,), dtype=torch.int32, device=device)
    index[0] = 4
    expected = reference(y, x, index, a, b, scales).to(dtype)
    lora.add_lora(y, x, index, a, b, scales, table)
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


def test_tokens_without_an_adapter_keep_every_bit(device: torch.device, table: Table) -> None:
    y, x, a, b, scales = tensors(device, 20, 8, (64, 64), torch.float32)
    index = torch.full((20,), -1, dtype=torch.int32, device=device)
    before = y.clone()
    lora.add_lora(y, x, index, a, b, scales, table)
    assert y.equal(before)
    index[3] = 0
    lora.add_lora(y, x, index, a, b, scales, table)
    assert y.ne(before).any(1).nonzero().flatten().tolist() == [3]


def test_what_is_no_number_stays_in_its_token(device: torch.device, table: Table) -> None:
    y, x, a, b, scales = tensors(device, 6, 8, (64, 64), torch.float32)
    x[2, 5], a[4] = float("nan"), float("inf")
    index = torch.tensor([0, 1, 1, 4, 0, -1], dtype=torch.int32, device=device)
    lora.add_lora(y, x, index, a, b, scales, table)
    assert y.isfinite().all(1).tolist() == [True, True, False, False, True, True]


def test_views(device: torch.device, table: Table) -> None:
    """Rows of x and y may be parts of wider ones; what is beside them is not touched."""
    y, x, a, b, scales = tensors(device, 4, 8, (100, 60), torch.float32)
    index = torch.tensor([1, 0, 3, 2], dtype=torch.int32, device=device)
    expected = reference(y, x, index, a, b, scales)
    wide = torch.full((4, 200), 7.0, device=device)
    wide[:, 70:130] = y
    lora.add_lora(wide[:, 70:130], x.repeat(1, 2)[:, :100], index, a, b, scales, table)
    torch.testing.assert_close(wide[:, 70:130], expected, rtol=1e-5, atol=1e-5)
    assert wide[:, :70].eq(7).all() and wide[:, 130:].eq(7).all()
