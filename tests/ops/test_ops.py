"""Every implementation of every platform against the op's reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from trimaran.conformance.cases import CASES, SPECIAL, SPREADS, OpCase, normal, spoiled
from trimaran.conformance.compare import as_tuple
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.cuda import CudaPlatform
from trimaran.platforms.interface import OpImpl, OpSignature, PackedWeight, Platform, WeightPacker
from trimaran.platforms.ops import DENSE, OPS, DensePacker, Tolerance
from trimaran.platforms.strict import StrictPlatform

# The GPU hulls share their ops, which are torch's and run on the host as well.
PLATFORMS: list[type[Platform]] = [CpuPlatform, StrictPlatform, CudaPlatform]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = [1, 3, 33]


def implementations() -> list[Any]:
    return [
        pytest.param(
            platform,
            impl,
            id=f"{platform.name}-{impl.op}-{impl.name}",
            # Whole vocabularies are minutes in Triton's interpreter; tests/triton has small ones.
            marks=[pytest.mark.slow] if (impl.op, impl.name) == ("draw", "triton") else [],
        )
        for platform in PLATFORMS
        for impls in platform().ops().values()
        for impl in impls
    ]


def run(impl: OpImpl, packer: WeightPacker, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Call on copies; weights are packed for the platform. Inputs must come out unchanged."""
    before = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
    given = [
        packer.pack({"weight": arg.tensors[0]}, arg.shape) if isinstance(arg, PackedWeight) else arg
        for arg in args
    ]
    result = impl(*given)
    read_only = list(zip(args, before, strict=True))[1 if impl.op == "copy" else 0 :]
    for now, then in read_only:
        if isinstance(now, Tensor):
            torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    return result if isinstance(result, tuple) else (result,)


def check(found: tuple[Tensor, ...], expected: Any, tolerance: Tolerance) -> None:
    expected = expected if isinstance(expected, tuple) else (expected,)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=True
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("platform, impl", implementations())
def test_agrees_with_the_reference(
    platform: type[Platform], impl: OpImpl, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    spec = OPS[impl.op]
    packer = platform().weight_packers().get(DENSE, DensePacker())
    for tokens in TOKENS:
        for make in CASES[impl.op].values():
            args = make(tokens, dtype)
            support = impl.supports(OpSignature(impl.op, dtype))
            if not support:
                assert support.reason
                continue
            expected = spec.reference(*(a.clone() if isinstance(a, Tensor) else a for a in args))
            check(run(impl, packer, args), expected, spec.tolerance[dtype])


@pytest.mark.parametrize("value", SPECIAL, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("platform, impl", implementations())
def test_places_nan_and_infinity_where_the_reference_does(
    platform: type[Platform], impl: OpImpl, dtype: torch.dtype, value: float
) -> None:
    """One bad element in one row: the same outputs are bad, and no other row is."""
    if not (support := impl.supports(OpSignature(impl.op, dtype))):
        pytest.skip(support.reason)
    torch.manual_seed(1)
    packer = platform().weight_packers().get(DENSE, DensePacker())
    for make in CASES[impl.op].values():
        args = spoiled(impl.op, make(3, dtype), value)
        expected = OPS[impl.op].reference(
            *(a.clone() if isinstance(a, Tensor) else a for a in args)
        )
        found = run(impl, packer, args)
        check(found, expected, OPS[impl.op].tolerance[dtype])
        if impl.op not in SPREADS:
            assert found[0][[0, 2]].isfinite().all()


def copied(arg: Any) -> Any:
    return arg.clone() if isinstance(arg, Tensor) else arg  # `copy` writes to it


def widened(arg: Any) -> Any:
    if isinstance(arg, PackedWeight):
        return PackedWeight(arg.format, arg.shape, tuple(map(widened, arg.tensors)))
    floating = isinstance(arg, Tensor) and arg.dtype.is_floating_point
    return arg.double() if floating else arg


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_one_who_rounds_once_is_within_the_tolerance(op: str, dtype: torch.dtype) -> None:
    """Computed in float64 and then rounded: nobody can be nearer to what the op means."""
    spec = OPS[op]
    for variant in CASES[op]:
        for seed in range(20):
            args = OpCase(op, variant, 33, dtype, seed).arguments()
            wide = [widened(arg) for arg in args]
            if op == "rope":  # cosine and sine are rounded by definition
                wide[3] = wide[3].to(dtype).double()
            expected = as_tuple(spec.reference(*map(copied, args)))
            exact = as_tuple(spec.reference(*wide))
            found = tuple(one.to(like.dtype) for one, like in zip(exact, expected, strict=True))
            check(found, expected, spec.tolerance[dtype])


def test_every_op_has_cases_and_a_tolerance_for_every_dtype() -> None:
    assert CASES.keys() == OPS.keys()
    assert all(spec.tolerance.keys() == set(DTYPES) for spec in OPS.values())


@pytest.mark.parametrize("name", [n for n, spec in OPS.items() if spec.composition])
def test_a_fused_op_is_left_out_only_with_its_composition(name: str) -> None:
    assert not OPS[name].required
    assert all(part in OPS and OPS[part].required for part in OPS[name].composition)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_and_rope_are_bit_equal_to_transformers(dtype: torch.dtype) -> None:
    modeling = pytest.importorskip("transformers.models.qwen3.modeling_qwen3")
    torch.manual_seed(2)
    x, norm = normal(7, 64, dtype=dtype), modeling.Qwen3RMSNorm(64, 1e-6).to(dtype)
    norm.weight.data.normal_()
    assert torch.equal(OPS["rms_norm"].reference(x, norm.weight.data, 1e-6), norm(x).detach())
    query, key = normal(5, 4, 64, dtype=dtype), normal(5, 2, 64, dtype=dtype)
    angles = torch.outer(torch.arange(5.0), torch.rand(32))
    table = torch.cat((angles.cos(), angles.sin()), 1)
    cos, sin = (
        angles.repeat(1, 2).cos()[None].to(dtype),
        angles.repeat(1, 2).sin()[None].to(dtype),
    )
    theirs = modeling.apply_rotary_pos_emb(
        query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin
    )
    ours = OPS["rope"].reference(query, key, torch.arange(5)[None], table)
    assert all(torch.equal(a, b[0].transpose(0, 1)) for a, b in zip(ours, theirs, strict=True))


def test_sample_takes_the_first_of_equal_scores() -> None:
    scores = torch.tensor([[0.0, 2.0, 2.0], [5.0, 5.0, 1.0]])
    assert OPS["sample"].reference(scores).tolist() == [1, 0]
