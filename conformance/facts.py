"""What a report says of the platform beside the outcomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..core.ops import OpBinder
from ..platforms.interface import Platform
from ..platforms.ops import OPS
from ..platforms.registry import available
from .base import Subject

TYPICAL: Mapping[str, Mapping[str, int]] = {
    "embed": {"vocab": 32_000, "hidden": 4096},
    "embed_packed": {"vocab": 32_000, "hidden": 4096},
    "rms_norm": {"size": 4096},
    "add_rms_norm": {"size": 4096},
    "linear": {"in_features": 4096, "out_features": 4096},
    "rope": {"head_dim": 128, "rope_dim": 128},
    "silu_mul": {"size": 14_336},
    "gelu_mul": {"size": 14_336},
    "gelu_tanh_mul": {"size": 14_336},
    "add": {"size": 4096},
    "gather_rows": {"size": 4096},
    "sample": {"vocab": 32_000},
    "draw": {"vocab": 32_000},
}
"""Sizes of a layer of a common model, by which the bindings of a report are chosen."""


def facts(subject: Subject) -> dict[str, Any]:
    """Plain data for the report's fields of these names. Opens no device."""
    cls, platform = subject.cls, subject.platform()
    return {
        "platform": cls.name,
        "vendor": cls.vendor,
        "origin": origin(subject.reference, cls),
        "platform_api": str(cls.api),
        "devices": [plain(one) for one in cls.probe().devices],
        "capabilities": plain(platform.capabilities(subject.device)),
        "facts": {str(key): str(value) for key, value in platform.describe().items()},
        "bindings": bindings(platform, subject.device),
    }


def origin(reference: str, cls: type[Platform]) -> str:
    """The distribution a platform came with, or the module of one that is not installed."""
    if ":" in reference:
        return reference.partition(":")[0]
    return next((one.origin for one in available() if one.cls is cls), "")


def bindings(platform: Platform, device: int) -> dict[str, dict[str, str]]:
    """Op → dtype → what an engine would bind for a layer of a common size."""
    binder = OpBinder(platform)
    for name in platform.capabilities(device).dtypes:
        for op in OPS:
            binder.bind(op, getattr(torch, name), **TYPICAL.get(op, {}))
    chosen: dict[str, dict[str, str]] = {}
    for one in binder.report():
        dtype = str(one.signature.dtype).removeprefix("torch.")
        chosen.setdefault(one.op, {}).setdefault(dtype, one.chosen)
    return chosen


def plain(value: Any) -> Any:
    """Dataclasses, mappings and sequences as what JSON can say; anything else as its text."""
    if dataclasses.is_dataclass(value):
        return {one.name: plain(getattr(value, one.name)) for one in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, Sequence | set | frozenset):
        return [plain(one) for one in value]
    return str(value)
