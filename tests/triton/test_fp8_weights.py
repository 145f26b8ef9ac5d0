"""Linear layers and experts in FP8: the two encodings, the portable kernel, torch's scaled product
(which its CPU build has too), and an engine through them."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch
from helpers import quantized_platform
from helpers.decoder_harness import Harness
from helpers.engine_loop import greedy, open_loop
from helpers.interpreted_gpu import InterpretedGpu
from helpers.tiny_models import model_path, prompt
from torch import Tensor

from trimaran.conformance.base import Subject
from trimaran.conformance.l1_weights import check_packer, check_product
from trimaran.core.quantization.codes import dequantize, quantize
from trimaran.core.quantization.scheme import WeightScheme
from trimaran.kernels_cuda.portable.tuning import Table
from trimaran.platforms.gpu_scaled_mm import ScaledMm
from trimaran.platforms.gpu_weights import FLOAT8_ROWS, Float8Packer, QuantizedLinear, TritonMoe
from trimaran.platforms.interface import FP8, INT8, OpImpl, OpSignature, PackedWeight
from trimaran.platforms.strict import StrictPlatform

GPU = "helpers.interpreted_gpu:InterpretedGpu"
OCP, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
KINDS = [OCP, FNUZ]


def table_of(table: Table, *kinds: torch.dtype) -> Table:
    return dataclasses.replace(table, fp8=tuple(str(kind).removeprefix("torch.") for kind in kinds))


def coded(rows: int, columns: int) -> dict[str, Tensor]:
    weight, scheme = torch.randn(rows, columns), WeightScheme(FP8)
    weight[rows // 3] = 0
    kinds = scheme.tensors((rows, columns)).items()
    tensors = {name: torch.empty(kind.shape, dtype=kind.dtype) for name, kind in kinds}
    quantize(weight, scheme, tensors)
    return tensors


def signature(dtype: torch.dtype, format: str = FP8, **sizes: int) -> OpSignature:
    return OpSignature("linear", dtype, {"in_features": 64, "out_features": 48} | sizes, format)


# -- layouts --------------------------------------------------------------------------------------


def test_every_code_keeps_its_value_in_the_other_encoding() -> None:
    bits = torch.arange(256, dtype=torch.uint8)
    codes = bits[(bits & 0x7F) != 0x7F].view(1, -1)  # all that are finite
    given = {"codes": codes.view(OCP), "scales": torch.tensor([0.375])}
    before = codes.clone()
    packed = Float8Packer(FNUZ).pack(given, (1, 254))
    made, scales = packed.tensors
    assert made.dtype == FNUZ and torch.equal(codes, before)
    assert torch.equal(made.float() * scales, given["codes"].float() * 0.375)
    assert packed.extra_bytes == Float8Packer(FNUZ).packed_bytes(torch.bfloat16, (1, 254)) == 258


def test_codes_of_the_card_s_own_encoding_are_kept() -> None:
    given = coded(5, 32)
    packed = Float8Packer(OCP).pack(given, (5, 32))
    assert packed.tensors[0] is given["codes"] and packed.tensors[1] is given["scales"]
    assert packed.extra_bytes == 0 and Float8Packer(OCP).packed_bytes(OCP, (5, 32)) is None
    assert Float8Packer(OCP).layout != Float8Packer(FNUZ).layout


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_kit_takes_the_layout(kind: torch.dtype) -> None:
    check_packer(Subject(GPU, quick=True), FP8, Float8Packer(kind), torch.bfloat16)


# -- products -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_products_of_the_portable_kernel(kind: torch.dtype, table: Table) -> None:
    linear = QuantizedLinear(table_of(table, kind))
    check_product(Subject(GPU, quick=True), FP8, Float8Packer(kind), [linear], torch.float32)


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """torch's product, held to what its CUDA and ROCm sources check (`_scaled_mm_out_cuda` in
    ScaledBlas.cpp, `check_inputs` in RowwiseScaledMM.cu), which the one for CPUs does not."""
    shapes: list[tuple[int, ...]] = []
    real = torch._scaled_mm

    def checked(
        a: Tensor, b: Tensor, *, scale_a: Tensor, scale_b: Tensor, bias: Any, out_dtype: Any
    ) -> Tensor:
        (tokens, inputs), outputs = a.shape, b.shape[1]
        assert a.dtype == b.dtype and a.dtype in KINDS and b.shape[0] == inputs
        assert inputs % 16 == 0 and outputs % 16 == 0
        assert a.stride(1) == 1 and a.stride(0) >= inputs, "rows of the first"
        assert b.stride(0) == 1 and b.stride(1) >= inputs, "columns of the second"
        assert scale_a.dtype == scale_b.dtype == torch.float32
        assert scale_a.shape == (tokens, 1) and scale_a.stride(0) == 1
        assert scale_b.shape == (1, outputs) and scale_b.stride(1) == 1
        assert scale_a.is_contiguous() and scale_b.is_contiguous()
        assert out_dtype == torch.bfloat16
        assert bias is None or (bias.dtype == out_dtype and bias.shape == (outputs,))
        shapes.append((tokens, inputs, outputs))
        return real(a, b, scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", checked)
    return shapes


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_products_of_torch(kind: torch.dtype, table: Table, rules: list[tuple[int, ...]]) -> None:
    linear = ScaledMm(table_of(table, kind), ["gfx942" if kind == FNUZ else "sm_90"])
    check_product(Subject(GPU, quick=True), FP8, Float8Packer(kind), [linear], torch.bfloat16)
    assert {(outputs, inputs) for _, inputs, outputs in rules} == {(16, 64), (256, 256)}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_both_products_agree(kind: torch.dtype, table: Table) -> None:
    """They round activations alike; a step of queries lies among others, as in a fused matrix."""
    table = table_of(table, kind)
    weight = Float8Packer(kind).pack(coded(48, 64), (48, 64))
    x, bias = torch.randn(7, 100).bfloat16()[:, 20:84], torch.randn(48).bfloat16()
    for summand in (None, bias):
        ours = QuantizedLinear(table)(x, weight, summand)
        theirs = ScaledMm(table, ["sm_90"])(x, weight, summand)
        assert ours.dtype == theirs.dtype == torch.bfloat16
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("cards", "given", "reason"),
    [
        (["sm_90"], signature(torch.bfloat16, INT8), "fp8 weights, not int8"),
        (["sm_90"], signature(torch.float32), "torch.float32 not"),
        (["sm_90"], signature(torch.float16), "torch.float16 not"),
        (["sm_90"], signature(torch.bfloat16, in_features=72), "in_features 72: .* of 16"),
        (["sm_90"], signature(torch.bfloat16, out_features=1031), "out_features 1031"),
        (["sm_120"], signature(torch.bfloat16), "on sm_120"),
        (["sm_90", "gfx1201"], signature(torch.bfloat16), "on gfx1201"),
        ([], signature(torch.bfloat16), "no card"),
    ],
    ids=str,
)
def test_what_torch_does_not_multiply(
    cards: list[str], given: OpSignature, reason: str, table: Table
) -> None:
    answer = ScaledMm(table, cards).supports(given)
    assert not answer and re.search(reason, answer.reason)


def test_cards_that_multiply_no_float8_refuse_it(table: Table) -> None:
    older = table_of(table, torch.float8_e5m2)
    for impl in (QuantizedLinear(older), TritonMoe(older)):
        answer = impl.supports(signature(torch.float16))
        assert not answer and "generic multiplies no float8" in answer.reason
        assert impl.supports(signature(torch.float16, INT8))
    impls: list[OpImpl] = [QuantizedLinear(table), ScaledMm(table, ["sm_90"])]
    assert all(impl.supports(signature(torch.bfloat16)) for impl in impls)
    assert impls[1].priority > impls[0].priority


# -- models ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_tokens_are_those_of_the_same_rounding() -> None:
    """fp32 around it: a platform that rounds tokens and multiplies by the codes' values."""
    found = {}
    for platform in (GPU, "helpers.quantized_platform:Rounding"):
        with open_loop("llama3", platform=platform, quantization=FP8, max_num_seqs=4) as loop:
            requests = [greedy(str(i), prompt(n, 40 + n), 8) for i, n in enumerate((3, 9, 24))]
            made = loop.run(requests)
        found[platform] = [made[str(i), 0].tokens for i in range(3)]
    first, second = found.values()
    assert first == second
    with open_loop("llama3", platform="strict", quantization=FP8, max_num_seqs=4) as loop:
        made = loop.run(requests)
    assert first != [made[str(i), 0].tokens for i in range(3)], "activations are rounded"
    assert quantized_platform.CALLS[f"kept {FP8}"]


def test_experts_in_fp8_are_near_what_their_codes_stand_for() -> None:
    ours = Harness(InterpretedGpu(), model_path("qwen3_moe"), length=32, quantization=FP8)
    exact = Harness(StrictPlatform(), model_path("qwen3_moe"), length=32, quantization=FP8)
    layers: list[Any] = [one.decoder.layers[0].feed_forward for one in (ours, exact)]
    packed: list[PackedWeight] = [layers[0].gate_up.packed, layers[0].down.packed]
    assert [weight.format for weight in packed] == [FLOAT8_ROWS] * 2
    codes, scales = packed[1].tensors
    values = dequantize({"codes": codes, "scales": scales})
    assert torch.equal(values, layers[1].down.packed.tensors[0])
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    found, expected = (layer(x) for layer in layers)
    error = (found - expected).square().mean().sqrt()
    assert 0 < error < 0.06 * expected.square().mean().sqrt()
    ours.close()
    exact.close()
