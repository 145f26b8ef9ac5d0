"""The attention of small models, in blocks that the platform under examination takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from ..platforms.interface import AttentionSpec, Platform
from .base import Subject

SLOPES = (0.25, 0.0625, 0.015625, 0.00390625)
"""Those of four heads (Press et al. 2022, section 3)."""
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "gqa": {},
    "mha": {"num_kv_heads": 4},
    "mqa": {"num_kv_heads": 1},
    "head 80": {"head_dim": 80, "scale": 80**-0.5},
    "head 128": {"head_dim": 128, "scale": 128**-0.5},
    "window": {"sliding_window": 20},
    "window of one": {"sliding_window": 1},
    "softcap": {"softcap": 3.0},
    "softcap window": {"softcap": 3.0, "sliding_window": 20},
    "not causal": {"causal": False},
    "alibi not causal": {"alibi_slopes": SLOPES, "causal": False},
    "alibi softcap window": {"alibi_slopes": SLOPES, "softcap": 3.0, "sliding_window": 20},
    "alibi": {"alibi_slopes": SLOPES},
}
QUICK: tuple[str, ...] = ("gqa", "mqa", "head 80", "window", "softcap", "alibi")


def spec_for(
    subject: Subject,
    shape: str = "gqa",
    dtype: torch.dtype | None = None,
    kv_dtype: torch.dtype | None = None,
    blocks: int = 0,
) -> AttentionSpec:
    """4 heads over 2 KV heads of 64, changed as `SHAPES[shape]` says. `dtype` None: the first that
    the platform computes in; `kv_dtype` None: the same. `blocks` picks among the block sizes that
    the platform allows."""
    platform = subject.platform()
    dtype = dtype or dtypes(platform, subject.device)[0]
    spec = AttentionSpec(
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
        scale=0.125,
        dtype=dtype,
        kv_dtype=kv_dtype or dtype,
        block_size=16,
    )
    spec = dataclasses.replace(spec, **SHAPES[shape])
    sizes = block_sizes(platform, spec)
    return dataclasses.replace(spec, block_size=sizes[blocks % len(sizes)])


def dtypes(platform: Platform, device: int) -> list[torch.dtype]:
    """What it computes in, by its own word; those that torch has not are left to L0."""
    found = (getattr(torch, name, None) for name in platform.capabilities(device).dtypes)
    return [dtype for dtype in found if isinstance(dtype, torch.dtype)]


def kv_dtypes(platform: Platform, device: int) -> list[torch.dtype]:
    found = (getattr(torch, name, None) for name in platform.capabilities(device).kv_dtypes)
    return [dtype for dtype in found if isinstance(dtype, torch.dtype)]


def block_sizes(platform: Platform, spec: AttentionSpec) -> list[int]:
    """The preferred block, the smallest allowed one and an odd multiple of it, where they meet the
    constraints of `spec`."""
    limits = platform.kv_constraints(spec)
    multiples = (limits.block_multiple * count for count in range(1, 4097))
    step = next(
        (one for one in multiples if _bytes_of(platform, spec, one) % limits.alignment == 0),
        limits.block_multiple,
    )
    wanted = (limits.preferred_block_size, step, 3 * step)
    allowed = [one for one in wanted if one % step == 0]
    return list(dict.fromkeys(allowed)) or [step]


def _bytes_of(platform: Platform, spec: AttentionSpec, size: int) -> int:
    tried = dataclasses.replace(spec, block_size=size)
    offered = [impl for impl in platform.attention(tried) if impl.supports(tried)]
    return offered[0].block_bytes(tried) if offered else 0
