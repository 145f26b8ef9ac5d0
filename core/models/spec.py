"""What a family says of a model: a frozen `DecoderSpec`, read by all that builds or sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from ...platforms.interface import AttentionSpec
from ..errors import ConfigError

RopeKind = Literal["default", "linear", "llama3", "yarn"]


@dataclass(frozen=True, kw_only=True)
class RopeSpec:
    """Rotary embedding: the first `dim` of a head's channels turn, by frequencies scaled as
    `kind` says (see `rope.py`). Fields beyond `factor` belong to single kinds."""

    theta: float
    dim: int
    kind: RopeKind = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """One layer's kinds, by the names in `decoder.py`. `sliding_window` counts the keys a
    query sees, itself included (None: all)."""

    mixer: str = "attention"
    feed_forward: str = "gated"
    sliding_window: int | None = None


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """The mixture of experts of layers whose feed-forward is `experts`: each token goes through
    `top_k` of `count` gated MLPs of `width`. `renormalize`: its shares of them add up to 1."""

    count: int
    top_k: int
    width: int
    renormalize: bool


class LayerGroup(NamedTuple):
    """Layers whose caches have the same shape and the same life: they share block tables."""

    name: str
    layers: tuple[int, ...]
    sliding_window: int | None


@dataclass(frozen=True, kw_only=True)
class WeightNames:
    """Where a checkpoint keeps what the layers call `embed`, `norm`, `head` and `q_proj`,
    `gate_proj`… (in `layer`, with `{layer}` for the index; of experts, `{expert}` for theirs). A
    `.weight` or `.bias` follows.

    `ignored(name)`: tensors that old checkpoints carry and nobody needs.
    """

    top: Mapping[str, str]
    layer: Mapping[str, str]
    ignored: Callable[[str], bool] = field(default=lambda name: False, repr=False)

    def of(self, part: str, layer: int | None = None, expert: int | None = None) -> str:
        if layer is None:
            return self.top[part]
        return self.layer[part].format(layer=layer, expert=expert)


@dataclass(frozen=True, kw_only=True)
class DecoderSpec:
    """A decoder-only transformer. Counts are of the whole model, not of a rank's share."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    rms_eps: float
    rope: RopeSpec
    max_positions: int
    names: WeightNames
    activation: str = "silu_mul"
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    experts: ExpertsSpec | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def cache_groups(self) -> tuple[LayerGroup, ...]:
        """Layers by sliding window, in order of their first layer."""
        members: dict[int | None, list[int]] = {}
        for index, layer in enumerate(self.layers):
            members.setdefault(layer.sliding_window, []).append(index)
        return tuple(
            LayerGroup("full" if window is None else f"window_{window}", tuple(layers), window)
            for window, layers in members.items()
        )

    def rank_heads(self, size: int) -> tuple[int, int]:
        """(heads, kv heads) on each of `size` ranks; a kv head is replicated when there are
        fewer of them than ranks. Raises ConfigError when the heads cannot be split evenly."""
        kv_fits = self.num_kv_heads % size == 0 or size % self.num_kv_heads == 0
        widths = [self.intermediate_size, *([self.experts.width] if self.experts else [])]
        if self.num_heads % size or not kv_fits or any(width % size for width in widths):
            experts = f", experts of {self.experts.width}" if self.experts else ""
            raise ConfigError(
                f"tensor_parallel_size={size} does not divide this model: {self.num_heads} heads, "
                f"{self.num_kv_heads} kv heads, intermediate size {self.intermediate_size}"
                f"{experts}.",
                param="tensor_parallel_size",
            )
        return self.num_heads // size, max(1, self.num_kv_heads // size)

    def attention_spec(
        self,
        group: LayerGroup,
        *,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        block_size: int,
        ranks: int = 1,
    ) -> AttentionSpec:
        """The attention of one rank's share of the layers in `group`."""
        num_heads, num_kv_heads = self.rank_heads(ranks)
        return AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=self.head_dim,
            scale=self.head_dim**-0.5,
            dtype=dtype,
            kv_dtype=kv_dtype,
            block_size=block_size,
            sliding_window=group.sliding_window,
        )
