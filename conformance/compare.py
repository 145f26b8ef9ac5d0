"""Two results, element by element."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..platforms.ops import Tolerance


def as_tuple(results: Any) -> tuple[Any, ...]:
    return tuple(results) if isinstance(results, tuple | list) else (results,)


def difference(found: Any, expected: Any, tolerance: Tolerance) -> str:
    """How results differ from what was expected; empty if they agree: shapes, dtypes, NaN and
    infinities at the same places, and the rest within the tolerance."""
    found, expected = as_tuple(found), as_tuple(expected)
    if len(found) != len(expected):
        return f"{len(found)} results, not {len(expected)}"
    for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if said := _of_one(ours, theirs, tolerance):
            return f"result {i}: {said}" if len(expected) > 1 else said
    return ""


def _of_one(found: Any, expected: Tensor, tolerance: Tolerance) -> str:
    if not isinstance(found, Tensor):
        return f"{type(found).__name__} where a tensor is due"
    if found.shape != expected.shape:
        return f"shape {list(found.shape)}, not {list(expected.shape)}"
    if found.dtype != expected.dtype:
        return f"{found.dtype}, not {expected.dtype}"
    wrong = ~_agrees(found, expected, tolerance)
    if not wrong.any():
        return ""
    at = wrong.nonzero()[0].tolist()
    where = ", ".join(map(str, at))
    ours, theirs = found[tuple(at)].item(), expected[tuple(at)].item()
    share = f"{int(wrong.sum())} of {wrong.numel()} elements differ"
    allowed = f" (rtol {tolerance.rtol:g}, atol {tolerance.atol:g})"
    return f"{share}; at [{where}] found {ours:.7g}, expected {theirs:.7g}{allowed}"


def _agrees(found: Tensor, expected: Tensor, tolerance: Tolerance) -> Tensor:
    if not found.dtype.is_floating_point:
        return found == expected
    ours, theirs = found.double(), expected.double()
    near = (ours - theirs).abs() <= tolerance.atol + tolerance.rtol * theirs.abs()
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    return torch.where(theirs.isfinite(), near, same)
