"""Mixtures of experts: the reference against `transformers`, and the native kernel against the
linears and the activation that it is made of, in every format of weights."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers.native import needs_native
from torch import Tensor

from trimaran.conformance.compare import difference
from trimaran.core.quantization.codes import quantize
from trimaran.core.quantization.scheme import WeightScheme, choose_scheme
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.cpu_moe import NativeMoe
from trimaran.platforms.cpu_ops import NativeGated
from trimaran.platforms.cpu_weights import linear
from trimaran.platforms.interface import DENSE, INT4, INT8, W4A16, OpSignature, PackedWeight
from trimaran.platforms.ops import OPS, Tolerance

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS = [DENSE, INT8, INT4, W4A16]
SIZES = [
    pytest.param(8, 2, 64, 96, id="8 of 64 by 96"),
    pytest.param(37, 5, 96, 64, id="37 of 96 by 64"),
    pytest.param(3, 3, 32, 32, id="all 3"),
    pytest.param(1, 1, 64, 32, id="only 1"),
]
ODD_SIZES = [
    pytest.param(5, 2, 40, 50, id="5 of 40 by 50"),
    pytest.param(4, 1, 7, 1, id="4 of 7 by 1"),
    pytest.param(6, 2, 1031, 33, id="6 of 1031 by 33"),
]
ROWS = [0, 1, 2, 33, 200]
# The combination alone, after equal parts: a share may be off by an ulp of the exponential, and so
# round to the next number of its type.
COMBINED = {
    torch.float32: Tolerance(1e-5, 1e-6),
    torch.bfloat16: Tolerance(1.6e-2, 1e-2),
    torch.float16: Tolerance(2e-3, 2e-3),
}


class Experts:
    """Random weights, in a format; whole, and one expert at a time."""

    def __init__(
        self, format: str, dtype: torch.dtype, count: int, hidden: int, width: int
    ) -> None:
        self.format, self.count, self.hidden = format, count, hidden
        self.gate_up = (torch.randn(count * 2 * width, hidden) / hidden**0.5).to(dtype)
        self.down = (torch.randn(count * hidden, width) / width**0.5).to(dtype)

    def pack(self, weight: Tensor) -> PackedWeight:
        shape = (weight.shape[0], weight.shape[1])
        tensors = {"weight": weight}
        if self.format != DENSE:
            scheme: WeightScheme = choose_scheme(self.format, shape[1]).scheme
            kinds = scheme.tensors(shape)
            tensors = {name: torch.empty(k.shape, dtype=k.dtype) for name, k in kinds.items()}
            quantize(weight, scheme, tensors)
        return CpuPlatform().weight_packers()[self.format].pack(tensors, shape)

    def mix(self, x: Tensor, scores: Tensor, top_k: int, renormalize: bool = False) -> Tensor:
        weights = self.pack(self.gate_up), self.pack(self.down)
        mixed: Tensor = NativeMoe()(x, scores, *weights, top_k, renormalize)
        return mixed

    def by_parts(self, x: Tensor, scores: Tensor, top_k: int, renormalize: bool) -> Tensor:
        """Each expert by the linears and the activation that models without experts use."""
        shares, chosen = scores.float().softmax(-1).sort(dim=-1, descending=True, stable=True)
        shares, chosen = shares[:, :top_k], chosen[:, :top_k]
        if renormalize:
            shares = shares / shares.sum(-1, keepdim=True)
        result = torch.zeros(len(x), self.hidden)
        for expert in range(self.count):
            tokens, places = (chosen == expert).nonzero(as_tuple=True)
            if not len(tokens):
                continue
            gate_up = self.pack(self.gate_up.chunk(self.count)[expert])
            down = self.pack(self.down.chunk(self.count)[expert])
            inner = NativeGated("silu_mul")(linear()(x[tokens], gate_up, None))
            y = linear()(inner, down, None).float()
            result[tokens] += y * shares[tokens, places].to(x.dtype).float().unsqueeze(1)
        return result.to(x.dtype)


# ---------------------------------------------------------------------------------------------
# The reference
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("renormalize", [False, True])
def test_the_reference_is_the_block_of_transformers(renormalize: bool, dtype: torch.dtype) -> None:
    modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = modeling.Qwen3MoeConfig(
        hidden_size=64,
        num_experts=7,
        num_experts_per_tok=3,
        moe_intermediate_size=32,
        norm_topk_prob=renormalize,
    )
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    block = modeling.Qwen3MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        parameter.data.normal_().div_(8)
    block = block.to(dtype)
    x = torch.randn(50, 64).to(dtype)
    scores = torch.nn.functional.linear(x, block.gate.weight)
    gate_up, down = (
        PackedWeight(DENSE, (stacked.shape[0], stacked.shape[1]), (stacked,))
        for stacked in (
            block.experts.gate_up_proj.flatten(0, 1),
            block.experts.down_proj.flatten(0, 1),
        )
    )
    with torch.no_grad():
        expected = block(x[None])[0]
        found = OPS["moe"].reference(x, scores, gate_up, down, 3, renormalize)
    said = difference(found, expected, COMBINED[dtype])
    assert not said


# ---------------------------------------------------------------------------------------------
# The kernel
# ---------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("count", "top_k", "hidden", "width"), SIZES)
def test_is_what_its_parts_are(
    count: int, top_k: int, hidden: int, width: int, format: str, dtype: torch.dtype
) -> None:
    check_parts(count, top_k, hidden, width, format, dtype)


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", [DENSE, INT8])
@pytest.mark.parametrize(("count", "top_k", "hidden", "width"), ODD_SIZES)
def test_experts_that_begin_anywhere_in_a_panel(
    count: int, top_k: int, hidden: int, width: int, format: str, dtype: torch.dtype
) -> None:
    check_parts(count, top_k, hidden, width, format, dtype)


def check_parts(
    count: int, top_k: int, hidden: int, width: int, format: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(count)
    experts = Experts(format, dtype, count, hidden, width)
    for rows in ROWS:
        x, scores = torch.randn(rows, hidden).to(dtype), 2 * torch.randn(rows, count).to(dtype)
        renormalize = rows % 2 == 0
        found = experts.mix(x, scores, top_k, renormalize)
        expected = experts.by_parts(x, scores, top_k, renormalize)
        said = difference(found, expected, COMBINED[dtype])
        assert not said, f"{rows} rows: {said}"


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("format", FORMATS)
def test_the_number_of_threads_changes_nothing(
    format: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    torch.manual_seed(0)
    experts = Experts(format, dtype, 9, 64, 96)
    x, scores = torch.randn(170, 64).to(dtype), torch.randn(170, 9).to(dtype)
    for rows in (1, 5, 170):
        threads(1)
        alone = experts.mix(x[:rows], scores[:rows], 3)
        for count in (2, 3, 7):
            threads(count)
            assert torch.equal(experts.mix(x[:rows], scores[:rows], 3), alone)


@needs_native
@pytest.mark.parametrize("format", FORMATS)
def test_a_token_does_not_depend_on_the_others(format: str) -> None:
    torch.manual_seed(0)
    experts = Experts(format, torch.float32, 6, 96, 64)
    x, scores = torch.randn(150, 96), torch.randn(150, 6)
    together = experts.mix(x, scores, 2)
    for row in (0, 77, 149):
        assert torch.equal(
            experts.mix(x[row : row + 1], scores[row : row + 1], 2)[0], together[row]
        )


@needs_native
@pytest.mark.parametrize("hidden", [64, 40])
def test_experts_that_nobody_chooses_are_not_in_the_result(hidden: int) -> None:
    """Their weights are NaN, and share panels with those of others."""
    torch.manual_seed(0)
    experts = Experts(DENSE, torch.float32, 5, hidden, 50)
    for weight in (experts.gate_up, experts.down):
        for nobody_s in (0, 3):
            weight.chunk(5)[nobody_s].fill_(math.nan)
    x, scores = torch.randn(40, hidden), torch.randn(40, 5)
    scores[:, [0, 3]] = -50.0
    found = experts.mix(x, scores, 2)
    assert found.isfinite().all()
    assert not difference(found, experts.by_parts(x, scores, 2, False), COMBINED[torch.float32])


@needs_native
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_equal_scores_the_first_are_chosen(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    experts = Experts(DENSE, dtype, 20, 32, 32)
    x = torch.randn(64, 32).to(dtype)
    scores = torch.randn(64, 20).round().to(dtype)
    scores[0] = 0.0
    scores[1, 5:] = -math.inf
    found = experts.mix(x, scores, 4, True)
    assert not difference(found, experts.by_parts(x, scores, 4, True), COMBINED[dtype])


@needs_native
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_bad_scores_spoil_their_token_alone(wrong: float, format: str) -> None:
    torch.manual_seed(0)
    experts = Experts(format, torch.float32, 6, 64, 32)
    x, scores = torch.randn(9, 64), torch.randn(9, 6)
    before = experts.mix(x, scores, 2)
    scores[4, 5] = wrong
    scores[5] = -math.inf
    after = experts.mix(x, scores, 2)
    assert after[4:6].isnan().all()
    assert torch.equal(after[[0, 1, 2, 3, 6, 7, 8]], before[[0, 1, 2, 3, 6, 7, 8]])


@needs_native
def test_reads_columns_of_wider_rows() -> None:
    torch.manual_seed(0)
    experts = Experts(DENSE, torch.bfloat16, 6, 64, 32)
    wide = torch.randn(21, 64 + 6 + 9).bfloat16()
    x, scores = wide[:, 2:66], wide[:, 70:76]
    found = experts.mix(x, scores, 2)
    assert torch.equal(found, experts.mix(x.contiguous(), scores.contiguous(), 2))


@needs_native
def test_a_format_without_a_kernel_is_refused_with_a_reason() -> None:
    answer = NativeMoe().supports(OpSignature("moe", torch.bfloat16, {}, "fp8"))
    assert not answer and "fp8" in answer.reason
    for format in FORMATS:
        assert NativeMoe().supports(OpSignature("moe", torch.bfloat16, {}, format))
