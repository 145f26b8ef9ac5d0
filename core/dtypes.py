"""Which element types to compute and to cache in."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch

from ..platforms.interface import Capabilities
from .errors import ConfigError

logger = logging.getLogger("trimaran.resolve")

HALVES = ("bfloat16", "float16")
FLOAT8 = {
    "fp8": ("float8_e4m3fn", "float8_e4m3fnuz"),
    "fp8_e4m3": ("float8_e4m3fn", "float8_e4m3fnuz"),
    "fp8_e5m2": ("float8_e5m2",),
}
"""The field's names for a cache in float8 -> torch's, for each vendor's encoding of it."""
EIGHT_BITS = ("int8", *FLOAT8)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"{name!r} is no element type.", param="dtype")
    return found


def choose_dtype(
    asked: str, hf_config: Mapping[str, Any], capabilities: Capabilities, platform: str
) -> torch.dtype:
    """The asked dtype, or for `auto` the checkpoint's if the platform has it natively."""
    known = capabilities.dtypes
    if asked != "auto":
        if asked not in known:
            raise ConfigError(
                f"Platform {platform!r} has no dtype {asked!r}; it has {', '.join(known)}.",
                param="dtype",
            )
        if known[asked] != "native":
            logger.info("dtype=%s is %s on platform %s", asked, known[asked], platform)
        return dtype_of(asked)
    wanted = str(hf_config.get("dtype") or hf_config.get("torch_dtype") or "float32")
    wanted = wanted.removeprefix("torch.")
    if known.get(wanted) == "native":
        return dtype_of(wanted)
    # A 16-bit checkpoint stays in 16 bits where the platform is fast at any of them. bfloat16
    # holds whatever float16 does; the other way values over 65,504 are infinite, which few
    # checkpoints have, and fp32 would take twice the memory.
    halves = HALVES if wanted in HALVES else ()
    fallback = next((half for half in halves if known.get(half) == "native"), "float32")
    state = known.get(wanted, "unknown")
    logger.info(
        "dtype=%s: the checkpoint's %s is %s on platform %s", fallback, wanted, state, platform
    )
    return dtype_of(fallback)


def choose_kv_dtype(
    asked: str, dtype: torch.dtype, capabilities: Capabilities, platform: str
) -> torch.dtype:
    """The asked element type of the KV cache, or for `auto` the model's own; of a float8 the kind
    that the platform keeps."""
    name = dtype_name(dtype) if asked == "auto" else asked
    known = capabilities.kv_dtypes
    name = next((kind for kind in FLOAT8.get(name, ()) if kind in known), name)
    # One that names none keeps what it computes in; a cache in 8 bits must be named.
    if name not in known and (known or name in EIGHT_BITS):
        has = ", ".join(known or capabilities.dtypes)
        raise ConfigError(
            f"Platform {platform!r} keeps no {name} KV cache; it keeps {has}. "
            "`trimaran platforms` says what it uses, and why.",
            param="kv_cache_dtype",
        )
    return dtype_of(name)
