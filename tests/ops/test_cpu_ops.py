"""What the cpu platform's ops do beyond their references: packed weights, few sizes, one step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from trimaran.platforms import cpu_linear, cpu_ops, host
from trimaran.platforms.interface import PackedWeight
from trimaran.platforms.ops import DENSE, OPS


def packed(weight: torch.Tensor) -> PackedWeight:
    out_features, in_features = weight.shape
    return cpu_linear.CpuDensePacker().pack({"weight": weight}, (out_features, in_features))


# By the processor, not by `fbgemm_refusal`: where FBGEMM should work, its failure fails the test.
needs_fbgemm = pytest.mark.skipif(
    "avx2" not in host.cpu_flags(), reason="FBGEMM's fp16 kernels are written for AVX2 and up"
)


@needs_fbgemm
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("scale", [0.0, 1e-5, 1e-3, 1.0, 1e4], ids=str)
def test_packed_weights_multiply_as_plain_ones(
    dtype: torch.dtype, rows: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By FBGEMM, on processors with oneDNN's bfloat16 too. Weights of 1e-5 are too small for fp16
    and stay as they are."""
    monkeypatch.setattr(cpu_linear, "onednn_refusal", lambda: "not in this test")
    torch.manual_seed(0)
    whole = torch.randn(rows, 200).to(dtype)
    x, weight = whole[:, 50:150], torch.randn(50, 100).mul(scale).to(dtype)  # x: not contiguous
    bias = torch.randn(50).to(dtype)
    layer = packed(weight)
    assert layer.format == (DENSE if scale == 1e-5 else cpu_linear.FBGEMM)
    for summand in (None, bias):
        found = cpu_linear.Linear()(x, layer, summand)
        widened = None if summand is None else summand.float()
        expected = F.linear(x.float(), weight.float(), widened).to(dtype)
        assert found.is_contiguous() and found.dtype == dtype
        torch.testing.assert_close(found, expected)


@needs_fbgemm
@pytest.mark.parametrize("value", [1e5, float("inf"), float("nan")])
def test_a_weight_beyond_fp16_stays_as_it_is(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "onednn_refusal", lambda: "not in this test")
    weight = torch.ones(8, 8).bfloat16()
    weight[3, 4] = value
    assert packed(weight).tensors[0] is weight


def test_row_counts_come_in_few_sizes() -> None:
    sizes = [cpu_linear.few_sizes(rows) for rows in range(1, 2049)]
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
    found = cpu_linear._onednn_linear(x, cpu_linear._onednn_pack(weight), bias)
    torch.testing.assert_close(found, F.linear(x, weight, bias), rtol=1e-5, atol=1e-4)
