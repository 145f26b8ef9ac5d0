"""L1: every implementation of every op, forced, against the op's reference on the host; fusions;
weights are in `l1_weights`, attention in `l1_attention`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..platforms.interface import (
    Device,
    Fusion,
    OpImpl,
    OpSignature,
    Platform,
    WeightPacker,
)
from ..platforms.ops import CHAINS, DENSE, OPS, DensePacker, ReferenceOp, Tolerance, chain
from . import l1_attention, l1_weights
from .attention_specs import dtypes
from .base import Check, Failed, Measurements, Skipped, Subject, expect
from .calls import ask_support, call
from .cases import CASES, CHAIN_CASES, SPECIAL, SPREADS, OpCase, sizes
from .compare import as_tuple, difference
from .lab import as_bits, opened
from .report import REFUSED
from .speed import op_speed

TOKENS = (1, 3, 33, 130)
QUICK_TOKENS = (1, 3, 33)
UNUSUAL = (torch.float64, torch.int8, torch.bool)


def checks(subject: Subject) -> list[Check]:
    platform = subject.platform()
    found = []
    for op, impls in _offered(platform).items():
        for impl in impls:
            at = f"{op}/{impl.name}"
            found.append(_check(f"{at}/supports", check_supports, subject, impl))
            for dtype in dtypes(platform, subject.device):
                for what, run in (("", check_op), ("/special", check_special)):
                    name = f"{at}/{_name(dtype)}{what}"
                    found.append(_check(name, run, subject, impl, dtype, may_refuse=True))
    for fusion in platform.fusions():
        for dtype in dtypes(platform, subject.device):
            name = f"fusion/{fusion.name}/{_name(dtype)}"
            found.append(_check(name, check_fusion, subject, fusion, dtype, may_refuse=True))
    return found + l1_weights.checks(subject) + l1_attention.checks(subject)


def _check(
    name: str, run: Callable[..., Measurements | None], *args: Any, may_refuse: bool = False
) -> Check:
    """`may_refuse`: nobody must have a use for what it is about, so that it may be skipped."""
    about = (run.__doc__ or "").partition("\n")[0]
    return Check(name, partial(run, *args), required=not may_refuse, about=about)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _offered(platform: Platform) -> Mapping[str, Sequence[OpImpl]]:
    """Every op with the platform's implementations; those of which it has none by the reference,
    which then runs on the device."""
    own = platform.ops()
    return {op: own.get(op) or [ReferenceOp(spec)] for op, spec in OPS.items()}


def cases_of(
    op: str, dtype: torch.dtype, subject: Subject, variants: Mapping[str, Any]
) -> Iterator[OpCase]:
    """Few tokens first: the first case to fail is a small one."""
    for tokens in QUICK_TOKENS if subject.quick else TOKENS:
        for variant in variants:
            yield OpCase(op, variant, tokens, dtype, subject.seed_of(op, variant, tokens))


# ---------------------------------------------------------------------------------------------
# One implementation
# ---------------------------------------------------------------------------------------------


def check_supports(subject: Subject, impl: OpImpl) -> None:
    """It answers for every use, refuses with a reason, and raises nothing."""
    computed = dtypes(subject.platform(), subject.device)
    for variant in CASES[impl.op]:
        known = sizes(impl.op, OpCase(impl.op, variant, 1, computed[0], 0).arguments())
        for dtype in (*UNUSUAL, *computed):
            for factor in (1, 1000):
                larger = {key: size * factor for key, size in known.items()}
                ask_support(impl, OpSignature(impl.op, dtype, larger))


def check_op(subject: Subject, impl: OpImpl, dtype: torch.dtype) -> Measurements | None:
    """Equal to the reference on every case, inputs and what lies around them untouched."""
    tolerance = OPS[impl.op].tolerance[dtype]
    cases = list(accepted(impl, cases_of(impl.op, dtype, subject, CASES[impl.op])))
    with opened(subject) as device:
        packer = dense_packer(subject.platform(), impl)
        for case in cases:
            examine(device, impl, packer, case, OPS[impl.op].reference, tolerance)
        if subject.platform().capabilities(subject.device).deterministic:
            _expect_same_bits(device, impl, packer, cases[-1])
        return op_speed(device, impl, packer, dtype, subject.quick)


def accepted(impl: OpImpl, cases: Iterable[OpCase]) -> Iterator[OpCase]:
    """Those that it supports: for the others an engine asks somebody else. Raises `Skipped` if
    there is none."""
    reason, any_accepted = "", False
    for case in cases:
        use = OpSignature(case.op, case.dtype, sizes(case.op, case.arguments()))
        if answer := ask_support(impl, use):
            any_accepted = True
            yield case
        reason = answer.reason
    if not any_accepted:
        raise Skipped(REFUSED + reason)


def _expect_same_bits(device: Device, impl: OpImpl, packer: WeightPacker, case: OpCase) -> None:
    first, second = (call(device, impl, packer, case.arguments())[0] for _ in range(2))
    same = all(torch.equal(as_bits(a), as_bits(b)) for a, b in zip(first, second, strict=True))
    said = f"{impl.op}/{impl.name}: two calls differ, although it claims to be deterministic"
    expect(same, said, case=case.text(), seed=case.seed)


def check_special(subject: Subject, impl: OpImpl, dtype: torch.dtype) -> None:
    """NaN and infinities stand where the reference puts them, and in no other row."""
    tolerance = OPS[impl.op].tolerance[dtype]
    cases = (
        OpCase(impl.op, variant, 3, dtype, subject.seed_of(variant), value)
        for value in SPECIAL
        for variant in CASES[impl.op]
    )
    with opened(subject) as device:
        packer = dense_packer(subject.platform(), impl)
        for case in accepted(impl, cases):
            found = examine(device, impl, packer, case, OPS[impl.op].reference, tolerance)
            if impl.op not in SPREADS:
                clean = bool(found[0][[0, 2]].isfinite().all())
                expect(clean, "a bad row spoils others", case=case.text(), seed=case.seed)


def dense_packer(platform: Platform, impl: OpImpl) -> WeightPacker:
    """Who packs for `impl`, as in an engine: the platform; but the reference that stands in where
    the platform has no implementation of its own reads plain weights."""
    if isinstance(impl, ReferenceOp) and not platform.ops().get(impl.op):
        return DensePacker()
    return platform.weight_packers().get(DENSE, DensePacker())


Reference = Callable[..., Any]


def examine(
    device: Device,
    impl: OpImpl,
    packer: WeightPacker,
    case: OpCase,
    reference: Reference,
    tolerance: Tolerance,
) -> tuple[Tensor, ...]:
    """One case that it supports; where it fails, the fewest tokens that still do are told. Returns
    what was found."""
    fault, found = _fault(device, impl, packer, case, reference, tolerance)
    if not fault:
        return found
    for tokens in range(1, case.tokens):
        if case.special is not None and tokens < 3:
            continue
        smaller = OpCase(case.op, case.variant, tokens, case.dtype, case.seed, case.special)
        said, _ = _fault(device, impl, packer, smaller, reference, tolerance)
        if said:
            fault, case = said, smaller
            break
    raise Failed(f"{impl.op}/{impl.name}: {fault}", case=case.text(), seed=case.seed)


def _fault(
    device: Device,
    impl: OpImpl,
    packer: WeightPacker,
    case: OpCase,
    reference: Reference,
    tolerance: Tolerance,
) -> tuple[str, tuple[Tensor, ...]]:
    """What is wrong with the implementation's answer to `case` (empty: nothing), and the answer."""
    args = case.arguments()
    expected = as_tuple(reference(*(_copy(arg) for arg in args)))
    try:
        found, touched = call(device, impl, packer, args)
    except Exception as error:  # the platform's; which case it was matters more than where
        return f"supports() said yes, the call raises {type(error).__name__}: {error}", ()
    return touched or difference(found, expected, tolerance), found


def _copy(arg: Any) -> Any:
    return arg.clone() if isinstance(arg, Tensor) else arg


# ---------------------------------------------------------------------------------------------
# Fusions
# ---------------------------------------------------------------------------------------------


def check_fusion(subject: Subject, fusion: Fusion, dtype: torch.dtype) -> None:
    """Equal to the chain of its composition's references; a chain that models run."""
    composition = tuple(fusion.composition)
    expect(composition in CHAINS, f"no model runs {' + '.join(composition)}: see ops.CHAINS")
    op = "+".join(composition)
    expect(fusion.impl.op == op, f"its implementation's op is {fusion.impl.op!r}, not {op!r}")
    reference = chain(composition, [OPS[part].reference for part in composition])
    parts = [OPS[part].tolerance[dtype] for part in composition]
    # Each part may be off by its own, and carries on what the one before was off by.
    tolerance = Tolerance(2 * sum(one.rtol for one in parts), 4 * sum(one.atol for one in parts))
    with opened(subject) as device:
        packer = dense_packer(subject.platform(), fusion.impl)
        for case in accepted(fusion.impl, cases_of(op, dtype, subject, CHAIN_CASES)):
            examine(device, fusion.impl, packer, case, reference, tolerance)
