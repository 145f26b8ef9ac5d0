"""Weights to codes and back: errors within half a step, over shapes and values of every kind."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimaran.core.args import EngineArgs
from trimaran.core.errors import ConfigError
from trimaran.core.quantization import codes as codes_module
from trimaran.core.quantization.codes import (
    CLIPPING,
    NotFiniteError,
    dequantize,
    largest_of_rows,
    quantize,
    round_trip,
)
from trimaran.core.quantization.scheme import PLAIN, WeightScheme, choose_scheme
from trimaran.platforms.interface import FP8, INT4, INT8, W4A16
from trimaran.platforms.ops import activation_rounding, float8_rounding

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def filled(
    weight: Tensor, scheme: WeightScheme, largest: Tensor | None = None
) -> dict[str, Tensor]:
    shape = (weight.shape[0], weight.shape[1])
    kinds = scheme.tensors(shape)
    tensors = {name: torch.full(kind.shape, 99, dtype=kind.dtype) for name, kind in kinds.items()}
    quantize(weight, scheme, tensors, largest)
    sizes = (tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert sum(sizes) == scheme.canonical_bytes(shape)
    return tensors


@st.composite
def weights(draw: st.DrawFn, group: int = 1) -> Tensor:
    """`[out, in]` with ordinary rows, zeros, constants, outliers, one sign, tiny and huge ones."""
    rows, columns = draw(st.integers(1, 9)), group * draw(st.integers(1, 5 if group > 1 else 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    for row in range(rows):
        kind = draw(st.sampled_from(("plain", "zero", "constant", "outlier", "positive", "scaled")))
        if kind == "zero":
            weight[row] = 0
        elif kind == "constant":
            weight[row] = draw(st.sampled_from((-3.0, 1e-3, 7.0)))
        elif kind == "outlier":
            weight[row, draw(st.integers(0, columns - 1))] = draw(st.sampled_from((-50.0, 100.0)))
        elif kind == "positive":
            weight[row].abs_()
        elif kind == "scaled":
            weight[row] *= draw(st.sampled_from((1e-42, 1e-30, 1e30, 1e39)))
    return weight.clamp(-3e38, 3e38).to(draw(st.sampled_from(DTYPES))).nan_to_num()


@settings(max_examples=60, deadline=None)
@given(weights())
def test_int8_is_off_by_half_a_step_at_most(weight: Tensor) -> None:
    tensors = filled(weight, WeightScheme(INT8))
    scales, found = tensors["scales"], dequantize(tensors)
    torch.testing.assert_close(scales, weight.float().abs().amax(1) / 127)
    assert tensors["codes"].abs().max() <= 127 and found.isfinite().all()
    # A number below the least normal one has fewer digits than others: 1e-43 is off by its own.
    error = (found - weight.float()).abs()
    assert (error <= 0.5001 * scales.unsqueeze(1) + 1e-43).all()
    assert not found[weight == 0].any()


@settings(max_examples=60, deadline=None)
@given(weights())
def test_fp8_is_off_by_a_sixteenth_at_most(weight: Tensor) -> None:
    """Or by half of the least step, 2^-9, for what is small beside the largest of its row."""
    tensors = filled(weight, WeightScheme(FP8))
    scales, found = tensors["scales"], dequantize(tensors)
    torch.testing.assert_close(scales, weight.float().abs().amax(1) / 448)
    assert tensors["codes"].dtype == torch.float8_e4m3fn and found.isfinite().all()
    error = (found - weight.float()).abs()
    least = 2**-10 * scales.unsqueeze(1)
    assert (error <= 1.0001 * torch.maximum(weight.float().abs() / 16, least) + 1e-40).all()
    assert not found[weight == 0].any()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from((32, 64, 128)).flatmap(lambda g: st.tuples(st.just(g), weights(g))))
def test_int4_is_off_by_less_than_the_plain_range_is(drawn: tuple[int, Tensor]) -> None:
    """Whatever is clipped: the sum of squares is no more than half a step of the whole range for
    each weight, and nobody is off by more than what is clipped."""
    group, weight = drawn
    tensors = filled(weight, WeightScheme(INT4, group))
    assert tensors["codes"].max() <= 15 and tensors["zeros"].max() <= 15
    found, exact = dequantize(tensors).view(-1, group), weight.double().view(-1, group)
    assert found.isfinite().all()
    low, high = exact.amin(1).clamp(max=0), exact.amax(1).clamp(min=0)
    step = (high - low) / 15
    error = found.double() - exact
    assert (error.square().sum(1) <= group * (0.5001 * step + 1e-43).square()).all()
    clipped = (1 - min(CLIPPING)) * torch.maximum(-low, high)
    assert (error.abs().amax(1) <= 0.5001 * step + clipped + step / 2 + 1e-43).all()
    assert not found[exact == 0].any()


def test_clipping_lowers_the_error_of_ordinary_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 1024, generator=torch.Generator().manual_seed(0))
    scheme = WeightScheme(INT4, 128)
    clipped = (dequantize(filled(weight, scheme)) - weight).square().mean()
    monkeypatch.setattr(codes_module, "CLIPPING", (1.0,))
    whole = (dequantize(filled(weight, scheme)) - weight).square().mean()
    assert clipped < 0.92 * whole


@pytest.mark.parametrize(
    "scheme", [WeightScheme(INT8), WeightScheme(FP8), WeightScheme(INT4, 64)], ids=str
)
def test_chunks_and_the_way_back_change_nothing(
    scheme: WeightScheme, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(37, 192).bfloat16()
    whole = filled(weight, scheme)
    monkeypatch.setattr(codes_module, "CHUNK", 5 * 192)
    chunked = filled(weight, scheme)
    assert all(torch.equal(whole[name].float(), chunked[name].float()) for name in whole)
    expected = dequantize(whole).bfloat16()
    round_trip(weight, scheme, weight)
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("scheme", [WeightScheme(INT8), WeightScheme(FP8)], ids=str)
def test_parts_of_rows_take_the_scale_of_the_whole(scheme: WeightScheme) -> None:
    weight = torch.randn(6, 96) * torch.linspace(0.1, 4, 96)
    whole = dequantize(filled(weight, scheme))
    largest = largest_of_rows(weight)
    parts = [
        dequantize(filled(half.contiguous(), scheme, largest)) for half in weight.chunk(2, dim=1)
    ]
    assert torch.equal(torch.cat(parts, dim=1), whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "scheme", [WeightScheme(INT8), WeightScheme(FP8), WeightScheme(INT4, 32)], ids=str
)
def test_what_is_not_finite_is_named(
    scheme: WeightScheme, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codes_module, "CHUNK", 3 * 64)
    weight = torch.randn(8, 64)
    weight[7, 40] = weight[5, 3] = value
    with pytest.raises(NotFiniteError, match="row 5"):
        filled(weight, scheme)


def test_which_layer_gets_which_format() -> None:
    assert choose_scheme(None, 64).scheme == PLAIN
    assert choose_scheme("int8", 100) == (WeightScheme(INT8), "")
    assert choose_scheme("fp8", 100) == (WeightScheme(FP8), "")
    assert choose_scheme("fp8", 1024, head=True) == (WeightScheme(INT8), "")
    for inputs, group in ((1024, 128), (192, 64), (96, 32), (128, 128)):
        assert choose_scheme("int4", inputs) == (WeightScheme(INT4, group), "")
    assert choose_scheme("int4", 1024, head=True) == (WeightScheme(INT8), "")
    scheme, reason = choose_scheme("int4", 80)
    assert scheme == WeightScheme(INT8) and "80 inputs" in reason and "32" in reason


def test_under_w4a16_what_has_no_groups_stays_as_it_is() -> None:
    assert choose_scheme("w4a16", 192) == (WeightScheme(W4A16, 64), "")
    assert choose_scheme("w4a16", 1024, head=True) == (PLAIN, "")
    scheme, reason = choose_scheme("w4a16", 80)
    assert scheme == PLAIN and "80 inputs a rank are kept in their own type" in reason


def test_an_unknown_quantization_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="'int3'; .* one of int8, int4, w4a16, fp8,") as caught:
        EngineArgs(quantization="int3")
    assert caught.value.param == "quantization"


@settings(max_examples=30, deadline=None)
@given(weights(), st.integers(0, 2**31))
def test_rounded_activations_are_within_their_bound(weight: Tensor, seed: int) -> None:
    """What W8A8 adds to the error of a product, computed here in fp64."""
    weight = weight.float().clamp(-1e6, 1e6)
    x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    step = x.abs().amax(1, keepdim=True) / 127
    rounded = (x / step).round() * step
    error = ((rounded - x) @ weight.double().T).abs()
    assert (error <= activation_rounding(x, weight) * 1.0001 + 1e-30).all()


@settings(max_examples=30, deadline=None)
@given(weights(), st.integers(0, 2**31), st.sampled_from((448.0, 240.0)))
def test_activations_in_fp8_are_within_their_bound(weight: Tensor, seed: int, most: float) -> None:
    """Whichever of the two encodings a card has."""
    kind = torch.float8_e4m3fn if most == 448.0 else torch.float8_e4m3fnuz
    weight = weight.float().clamp(-1e6, 1e6)
    x = torch.randn(4, weight.shape[1], generator=torch.Generator().manual_seed(seed)).pow(5)
    scale = x.abs().amax(1, keepdim=True) / most
    rounded = (x / scale).clamp(-most, most).to(kind).double() * scale.double()
    error = ((rounded - x.double()) @ weight.double().T).abs()
    assert (error <= float8_rounding(x, weight).double() * 1.0001 + 1e-30).all()


def test_the_bounds_of_rounded_activations_are_reached() -> None:
    """A step of 1, and everything else halfway between two codes."""
    x, weight = torch.full((1, 200), 0.5), torch.ones(3, 200)
    x[0, 0] = 127
    assert activation_rounding(x, weight).tolist() == [[100.0] * 3]
    x, weight = torch.tensor([[448.0, 17.0, 17.0]]), torch.tensor([[0.0, 1.0, 1.0]])
    rounded = x.to(torch.float8_e4m3fn).float()  # of steps of 2, halfway to the even one, 16
    error = (x - rounded) @ weight.T
    assert error.item() == 2 and 2 <= float8_rounding(x, weight).item() < 2.13
