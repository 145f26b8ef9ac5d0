"""L1, packed weights: what a packer's layout takes, and that each `linear` that says it multiplies
by a quantized format does so. Products by dense weights are cases of the op `linear`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.quantization.codes import dequantize, quantize
from ..core.quantization.scheme import choose_scheme
from ..platforms.interface import (
    DENSE,
    FP8,
    W4A16,
    Device,
    OpImpl,
    OpSignature,
    PackedWeight,
    WeightPacker,
)
from ..platforms.ops import OPS, ReferenceOp, activation_rounding, float8_rounding
from .attention_specs import dtypes
from .base import Check, Failed, Skipped, Subject, expect
from .calls import CANONICAL, ask_support, call, place
from .cases import dense, normal
from .lab import opened
from .report import REFUSED

SHAPES = ((16, 64), (17, 64), (100, 33), (33, 96), (1, 128), (256, 256))
"""(out, in); a quantized format is asked for those that it can hold."""
TOKENS = (1, 3, 14, 130)
QUICK_TOKENS = (1, 3, 14)
OUTLIER = -2000.0
SUMMED = 1e-4
"""Share of the rounding of activations by which fp32 arithmetic around it may be off."""


def checks(subject: Subject) -> list[Check]:
    platform = subject.platform()
    linears = platform.ops().get("linear") or [ReferenceOp(OPS["linear"])]
    found = []
    for format, packer in platform.weight_packers().items():
        for dtype in dtypes(platform, subject.device):
            name = f"packer/{format}/{str(dtype).removeprefix('torch.')}"
            packed = partial(check_packer, subject, format, packer, dtype)
            found.append(Check(name, packed, about=_about(check_packer)))
            if format != DENSE:
                product = partial(check_product, subject, format, packer, linears, dtype)
                about = _about(check_product)
                found.append(Check(f"{name}/product", product, required=False, about=about))
    return found


def _about(run: Any) -> str:
    return str(run.__doc__).partition("\n")[0]


def weights(subject: Subject, format: str, dtype: torch.dtype) -> Iterator[PackedWeight]:
    """Weights in their canonical form, on the host. Raises `Failed` for a format that is none."""
    expect(format in CANONICAL, f"no engine makes weights of the format {format!r}")
    for rows, columns in SHAPES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(subject.seed_of(format, rows, columns))
            plain = dense(rows, columns, dtype)
        scheme = choose_scheme(None if format == DENSE else format, columns).scheme
        if format == DENSE:
            yield plain
        elif scheme.format == format:
            (weight,) = plain.tensors
            weight[rows // 2, : columns // 2] = 0
            if rows > 1:
                weight[rows // 3] = 0
            kinds = scheme.tensors(plain.shape)
            codes = {
                name: torch.empty(kind.shape, dtype=kind.dtype) for name, kind in kinds.items()
            }
            quantize(weight, scheme, codes)
            tensors = tuple(codes[name] for name in CANONICAL[format])
            yield PackedWeight(format, plain.shape, tensors)


def check_packer(subject: Subject, format: str, packer: WeightPacker, dtype: torch.dtype) -> None:
    """A packed weight keeps its shape, and takes the bytes that were promised."""
    for weight in weights(subject, format, dtype):
        case = _case(subject, weight, dtype)
        with opened(subject) as device:
            given = place(device, weight, device.to_device)
            before = sum(device.memory().by_tag.values())
            packed = packer.pack(given, weight.shape)
            device.synchronize()
            allocated = sum(device.memory().by_tag.values()) - before
        shape = isinstance(packed, PackedWeight) and packed.shape == weight.shape
        expect(shape, f"pack() returned {packed!r}", case=case)
        promised = packer.packed_bytes(dtype, weight.shape)
        if promised is None:
            expect(not packed.extra_bytes, "kept as it is, and yet with extra bytes", case=case)
            continue
        kept = [one for one in given.values() if any(one is part for part in packed.tensors)]
        taken = allocated + packed.extra_bytes + sum(one.nbytes for one in kept)
        close = abs(taken - promised) <= max(1024, 0.02 * promised)
        expect(close, f"it takes {taken} bytes, promised were {promised}", case=case)


def check_product(
    subject: Subject,
    format: str,
    packer: WeightPacker,
    linears: Sequence[OpImpl],
    dtype: torch.dtype,
) -> None:
    """Every `linear` that supports the format multiplies by what the codes stand for."""
    any_multiplied, reasons = False, dict[str, str]()
    with opened(subject) as device:
        for weight in weights(subject, format, dtype):
            rows, columns = weight.shape
            sizes = {"in_features": columns, "out_features": rows}
            use = OpSignature("linear", dtype, sizes, format)
            for impl in linears:
                if answer := ask_support(impl, use):
                    any_multiplied = True
                    _examine(subject, device, impl, packer, weight, dtype)
                reasons[impl.name] = answer.reason  # engines do not bind who refuses
    if not any_multiplied:
        raise Skipped(REFUSED + "; ".join(f"{name}: {why}" for name, why in reasons.items()))


def _examine(
    subject: Subject,
    device: Device,
    impl: OpImpl,
    packer: WeightPacker,
    weight: PackedWeight,
    dtype: torch.dtype,
) -> None:
    for tokens in QUICK_TOKENS if subject.quick else TOKENS:
        x, bias = _inputs(subject, tokens, weight, dtype)
        case = f"{tokens} tokens, {_case(subject, weight, dtype)}"
        for summand in (None, bias):
            try:
                found, touched = call(device, impl, packer, (x, weight, summand))
            except Exception as error:  # the platform's; which case it was matters more than where
                said = f"supports() said yes, the call raises {type(error).__name__}: {error}"
                raise Failed(f"linear/{impl.name}: {said}", case=case) from error
            said = touched or _difference(found, x, weight, summand)
            expect(not said, f"linear/{impl.name}: {said}", case=case)


def _case(subject: Subject, weight: PackedWeight, dtype: torch.dtype) -> str:
    return f"{weight.format} weight {list(weight.shape)} for {dtype}, seed {subject.seed}"


def _inputs(
    subject: Subject, tokens: int, weight: PackedWeight, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Tokens, of several one of zeros and one with an outlier, and a bias."""
    rows, columns = weight.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(subject.seed_of(weight.format, rows, columns, tokens))
        x, bias = normal(tokens, columns, dtype=dtype), normal(rows, dtype=dtype)
    if tokens > 2:
        x[1] = 0
        x[2, columns // 2] = OUTLIER
    return x, bias


def _difference(found: Any, x: Tensor, weight: PackedWeight, bias: Tensor | None) -> str:
    """How a product differs from that of the values which the codes stand for, beyond the op's
    tolerance and the rounding of activations, which W4A16 does not allow; empty if it does not."""
    plain = dequantize(dict(zip(CANONICAL[weight.format], weight.tensors, strict=True)))
    expected = x.double() @ plain.double().T + (0 if bias is None else bias.double())
    (result,) = found if len(found) == 1 else (None,)
    if not isinstance(result, Tensor) or result.shape != expected.shape or result.dtype != x.dtype:
        return f"not one tensor {list(expected.shape)} of {x.dtype}"
    rtol, atol = OPS["linear"].tolerance[x.dtype]
    allowed = SUMMED if weight.format == W4A16 else 1 + SUMMED
    rounding = float8_rounding if weight.format == FP8 else activation_rounding
    rounded = rounding(x, plain).double() * allowed
    wrong = ~((result.double() - expected).abs() <= atol + rtol * expected.abs() + rounded)
    if not wrong.any():
        return ""
    token, output = wrong.nonzero()[0].tolist()
    return (
        f"{int(wrong.sum())} of {wrong.numel()} elements differ; at [{token}, {output}] found "
        f"{float(result[token, output]):.7g}, expected {float(expected[token, output]):.7g} (more "
        f"than {rtol:g} of it, {atol:g} and the rounding of activations, "
        f"{float(rounded[token, output]):.3g})"
    )
