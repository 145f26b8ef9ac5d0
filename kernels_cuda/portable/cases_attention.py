"""Typical calls of the attention kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from . import attention
from .case import Case
from .paged import PagedCache
from .tuning import Table


@dataclass(frozen=True, slots=True)
class Layer:
    """What `attention.Spec` asks for, of a model's layer."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = torch.bfloat16
    block_size: int = 16
    causal: bool = True
    sliding_window: int | None = None
    softcap: float = 0.0
    sinks: bool = False
    slopes: bool = False

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


def attention_call(
    layer: Layer, queries: tuple[int, ...], keys: int
) -> Callable[[torch.device, Table], Callable[[], Any]]:
    """A step of sequences with so many queries each, and `keys` keys."""

    def call(device: torch.device, table: Table) -> Callable[[], Any]:
        query = torch.empty(
            sum(queries), layer.num_heads, layer.head_dim, dtype=layer.dtype, device=device
        )
        each = -(-keys // layer.block_size)
        blocks = len(queries) * each  # none is shared: a cache's second reading is a cheap one
        kept = (blocks, layer.num_kv_heads, layer.block_size, layer.head_dim)
        both = [
            torch.empty(kept, dtype=torch.float32, device=device).normal_().to(layer.kv_dtype)
            for _ in "kv"
        ]
        cache = PagedCache(both[0], both[1])
        if layer.kv_dtype == torch.int8:
            scales = torch.full(kept[:-1], 0.02, device=device)
            cache = cache._replace(key_scales=scales, value_scales=scales)
        starts = torch.tensor([0, *queries], device=device).cumsum(0).int()
        sequences = attention.Sequences(
            torch.rand(blocks, device=device).argsort().int().view(len(queries), each),
            starts,
            torch.full((len(queries),), keys, dtype=torch.int32, device=device),
            max(queries),
            keys,
        )
        heads = torch.zeros(layer.num_heads, device=device)
        features = {
            "slopes": heads if layer.slopes else None,
            "sinks": heads if layer.sinks else None,
        }

        def launch() -> torch.Tensor:
            plan = attention.plan(layer, sequences, table)
            return attention.attend(query, cache, plan, **features)

        return launch

    return call


LAYERS = {
    "8 heads of 128": Layer(),
    "gpt-oss": Layer(64, 8, 64, sliding_window=128, sinks=True),
    "gemma": Layer(8, 4, 256, block_size=32, sliding_window=4096, softcap=50.0),
    "alibi": Layer(32, 32, 80, slopes=True),
    "mqa": Layer(71, 1, 64),
    "int8": Layer(kv_dtype=torch.int8, block_size=48),
    "fp32": Layer(head_dim=64, dtype=torch.float32, kv_dtype=torch.float32),
    "fp32, heads of 256": Layer(8, 4, 256, torch.float32, torch.float32),
    "e4m3fn": Layer(kv_dtype=torch.float8_e4m3fn),
    "e4m3fnuz": Layer(kv_dtype=torch.float8_e4m3fnuz),
    "e5m2, heads of 192": Layer(16, 4, 192, torch.float16, torch.float8_e5m2),
}
STEPS = {
    "prompt": ("attend_tiles", (2048, 100), 4096),
    "decode": ("attend_splits", (1,) * 16, 8192),
    "drafts": ("attend_splits", (8,) * 16, 8192),
    "short": ("attend_tiles", (1,) * 16, 128),
}


def attention_cases() -> list[Case]:
    made = []
    for name, layer in LAYERS.items():
        fp8 = layer.kv_dtype if layer.kv_dtype.itemsize == 1 else None
        for step, (kernel, queries, keys) in STEPS.items():
            if step in ("drafts", "short") and layer != Layer():
                continue
            call = attention_call(layer, queries, keys)
            wanted = None if fp8 == torch.int8 else fp8
            made.append(Case(kernel, f"{name}, {step}", call, wanted, layer.head_dim))
    return made
