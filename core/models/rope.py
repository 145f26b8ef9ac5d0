"""Rotary embedding tables, for every way of scaling that the families use."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import ConfigError
from .fields import Fields
from .spec import RopeKind, RopeSpec

KINDS: Mapping[str, RopeKind] = {kind: kind for kind in ("default", "linear", "llama3", "yarn")}


def read_rope(config: Fields, head_dim: int) -> RopeSpec:
    """The rope of a config.json: `rope_parameters` (transformers 5), or `rope_theta` beside
    `rope_scaling` (transformers 4, where a null or absent scaling is none)."""
    modern = config.object("rope_parameters")
    scaling = modern if modern.values else config.object("rope_scaling")
    theta = (scaling if "rope_theta" in scaling else config).number("rope_theta", 10000.0)
    # Before transformers 4.45 the key was `type`.
    kind_key = "rope_type" if "rope_type" in scaling else "type"
    kind = scaling.one_of(kind_key, KINDS, "default")
    partial = (scaling if "partial_rotary_factor" in scaling else config).number(
        "partial_rotary_factor", 1.0
    )
    rope = RopeSpec(theta=theta, dim=int(head_dim * partial), kind=kind)
    if rope.dim % 2 or not 2 <= rope.dim <= head_dim:
        raise ConfigError(
            f"{config.where}: the rope cannot turn {rope.dim} of {head_dim} channels.",
            param="partial_rotary_factor",
        )
    return rope if kind == "default" else _read_scaling(rope, scaling, config)


def _read_scaling(rope: RopeSpec, scaling: Fields, config: Fields) -> RopeSpec:
    factor = scaling.number("factor")
    if rope.kind == "linear":
        return RopeSpec(theta=rope.theta, dim=rope.dim, kind=rope.kind, factor=factor)
    original = scaling.size(
        "original_max_position_embeddings", config.size("max_position_embeddings")
    )
    if rope.kind == "llama3":
        return RopeSpec(
            theta=rope.theta,
            dim=rope.dim,
            kind=rope.kind,
            factor=factor,
            original_max_positions=original,
            low_freq_factor=scaling.number("low_freq_factor"),
            high_freq_factor=scaling.number("high_freq_factor"),
        )
    return RopeSpec(
        theta=rope.theta,
        dim=rope.dim,
        kind=rope.kind,
        factor=factor,
        original_max_positions=original,
        attention_factor=scaling.optional_number("attention_factor"),
        mscale=scaling.optional_number("mscale") or 0.0,
        mscale_all_dim=scaling.optional_number("mscale_all_dim") or 0.0,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
    )


def cos_sin_table(rope: RopeSpec, num_positions: int) -> Tensor:
    """fp32 `[positions, dim]`: the cosines of the `dim / 2` angles, then their sines."""
    inverse, magnitude = FREQUENCIES[rope.kind](rope)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inverse)
    return torch.cat((angles.cos(), angles.sin()), dim=-1) * magnitude


def _default(rope: RopeSpec) -> tuple[Tensor, float]:
    """theta^(-2i/dim) (RoFormer, arXiv:2104.09864, section 3.2.2)."""
    exponents = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    return 1.0 / (rope.theta**exponents), 1.0


def _linear(rope: RopeSpec) -> tuple[Tensor, float]:
    """Position interpolation (arXiv:2306.15595): positions shrink by `factor`."""
    return _default(rope)[0] / rope.factor, 1.0


def _llama3(rope: RopeSpec) -> tuple[Tensor, float]:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, a ramp between them
    (the model's reference code, `apply_scaling`)."""
    inverse = _default(rope)[0]
    original, low, high = rope.original_max_positions, rope.low_freq_factor, rope.high_freq_factor
    wavelengths = 2 * math.pi / inverse
    ramp = ((original / wavelengths - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - ramp) * inverse / rope.factor + ramp * inverse, 1.0


def _yarn(rope: RopeSpec) -> tuple[Tensor, float]:
    """YaRN (arXiv:2309.00071, sections 3.2 and 3.4): interpolate channels that turn less than
    `beta_slow` times over the original context, keep those above `beta_fast`, ramp between."""
    inverse = _default(rope)[0]
    low, high = _yarn_dim(rope, rope.beta_fast), _yarn_dim(rope, rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    channels = torch.arange(rope.dim // 2, dtype=torch.float32)
    ramp = ((channels - low) / max(high - low, 0.001)).clamp(0.0, 1.0)
    return inverse / rope.factor * ramp + inverse * (1 - ramp), _yarn_magnitude(rope)


def _yarn_dim(rope: RopeSpec, turns: float) -> float:
    """The channel whose angle makes `turns` turns over the original context."""
    context = rope.original_max_positions / (turns * 2 * math.pi)
    return rope.dim * math.log(context) / (2 * math.log(rope.theta))


def _yarn_magnitude(rope: RopeSpec) -> float:
    """The temperature of the attention, folded into cosines and sines."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


FREQUENCIES: Mapping[RopeKind, Callable[[RopeSpec], tuple[Tensor, float]]] = {
    "default": _default,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
"""Kind → (inverse frequencies `[dim / 2]`, factor on cosines and sines)."""
