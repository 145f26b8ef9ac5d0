"""What the cpu platform's ops do beyond their references: pieces, few sizes, what a step shares."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trimaran.platforms import cpu_ops
from trimaran.platforms.interface import PackedWeight
from trimaran.platforms.ops import DENSE, OPS


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [5, 40])
def test_a_weight_wider_than_one_piece_is_whole(
    dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    linear = cpu_ops.Linear()
    for width, pieces in ((64, 7 * 64), (96, 10), (32, 1 << 20)):  # 10: not even one row fits
        monkeypatch.setattr(cpu_ops, "WIDENED", pieces)
        x, weight = torch.randn(rows, width).to(dtype), torch.randn(50, width).to(dtype)
        bias = torch.randn(50).to(dtype)
        found = linear(x, PackedWeight(DENSE, (50, width), (weight,)), bias)
        expected = F.linear(x.float(), weight.float(), bias.float()).to(dtype)
        assert found.is_contiguous() and found.dtype == dtype
        torch.testing.assert_close(found, expected)


def test_row_counts_come_in_few_sizes() -> None:
    sizes = [cpu_ops.few_sizes(rows) for rows in range(1, 2049)]
    assert all(0 <= size - rows <= max(7, rows) for rows, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 37
    assert sizes == sorted(sizes)


def test_rope_notices_that_the_step_changed() -> None:
    """The positions are one buffer, refilled every step; cosines kept from the last are stale."""
    torch.manual_seed(0)
    rope = cpu_ops.Rope()
    query, key, table = torch.randn(3, 2, 8), torch.randn(3, 1, 8), torch.randn(16, 8)
    buffer = torch.zeros(1, 8, dtype=torch.int64)
    for first in (0, 5, 2):
        buffer[:, :3] = torch.arange(first, first + 3)
        for _layer in range(2):
            found = rope(query, key, buffer[:, :3], table)
            expected = OPS["rope"].reference(query, key, buffer[:, :3], table)
            assert all(map(torch.equal, found, expected))
    other = torch.randn(16, 8)
    assert torch.equal(
        rope(query, key, buffer[:, :3], other)[0],
        OPS["rope"].reference(query, key, buffer[:, :3], other)[0],
    )


@pytest.mark.parametrize("rows", [1, 8, 9, 70])
def test_padded_rows_change_nothing(rows: int) -> None:
    """In fp32, so that it runs where oneDNN multiplies no bfloat16 too."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(rows, 64), torch.randn(96, 64), torch.randn(96)
    found = cpu_ops._onednn_linear(x, cpu_ops._onednn_pack(weight), bias)
    torch.testing.assert_close(found, F.linear(x, weight, bias), rtol=1e-5, atol=1e-4)
