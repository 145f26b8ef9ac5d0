"""Cases of the kernels between a step's matrix products: activations, cache, sampling, batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import activation, batch, cache, logits, lora, mla, sampling
from .case import Case, float8, integers, rand, short
from .paged import PagedCache
from .tuning import Table

Launch = Callable[[], Any]
QUANTIZED = (torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def _gated(kind: str, tokens: int, size: int) -> Case:
    run = {
        "silu": activation.silu_mul,
        "gelu": activation.gelu_mul,
        "gelu_tanh": activation.gelu_tanh_mul,
    }[kind]

    def call(device: torch.device, table: Table) -> Launch:
        gate_up = rand(device, tokens, 2 * size)
        return lambda: run(gate_up, table)

    return Case("gated", f"{kind} {tokens}x{size}", call)


def _gated_quantized(tokens: int, size: int, dtype: torch.dtype) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        gate_up = rand(device, tokens, 2 * size)
        return lambda: activation.gated_quantized(gate_up, "silu", table, dtype=dtype)

    return Case("gated_quantized", f"silu {tokens}x{size} {short(dtype)}", call, float8(dtype))


def _add(tokens: int, size: int) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        a, b = rand(device, tokens, size), rand(device, tokens, size)
        return lambda: activation.add(a, b, table)

    return Case("add", f"{tokens}x{size}", call)


def _cache(device: torch.device, kv_heads: int, dim: int, dtype: torch.dtype) -> PagedCache:
    shape = (1024, kv_heads, 16, dim)
    scales = torch.zeros(2, *shape[:-1], device=device) if dtype == torch.int8 else ()
    return PagedCache(*torch.zeros(2, *shape, device=device).to(dtype), *scales)


def _slots(device: torch.device) -> torch.Tensor:
    """Of 256 tokens, far apart and all different."""
    return (torch.arange(256, device=device) * 61 % 16384).int()


def _rope(heads: int, kv_heads: int, dim: int, rotary: int) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        query, key = rand(device, 256, heads + kv_heads, dim).split((heads, kv_heads), dim=1)
        positions = integers(device, 4096, 1, 256, dtype=torch.int64)
        cos_sin = rand(device, 4096, rotary, dtype=torch.float32)
        return lambda: cache.rope(query, key, positions, cos_sin, table)

    return Case("rope", f"{heads}/{kv_heads}x{dim} {rotary}", call)


def _rope_write(heads: int, kv_heads: int, dim: int, dtype: torch.dtype, normed: bool) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        whole = rand(device, 256, heads + 2 * kv_heads, dim)
        query, key, value = whole.split((heads, kv_heads, kv_heads), dim=1)
        positions = integers(device, 4096, 256, dtype=torch.int64)
        rotation = cache.Rotation(positions, rand(device, 4096, dim, dtype=torch.float32))
        norms = cache.HeadNorms(rand(device, dim), rand(device, dim), 1e-6) if normed else None
        kept, slots = _cache(device, kv_heads, dim, dtype), _slots(device)

        def launch() -> tuple[torch.Tensor, PagedCache]:
            found = cache.rope_write(query, key, value, rotation, kept, slots, table, norms)
            return found, kept

        return launch

    label = f"{heads}/{kv_heads}x{dim} {short(dtype)}{' normed' if normed else ''}"
    return Case("rope", label, call, float8(dtype))


def _cache_write(kv_heads: int, dim: int, dtype: torch.dtype) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        key, value = rand(device, 256, 2 * kv_heads, dim).chunk(2, dim=1)
        kept, slots = _cache(device, kv_heads, dim, dtype), _slots(device)

        def launch() -> PagedCache:
            cache.write(key, value, kept, slots, table)
            return kept

        return launch

    return Case("cache_write", f"{kv_heads}x{dim} {short(dtype)}", call, float8(dtype))


def _argmax(rows: int, vocab: int) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        scores = rand(device, rows, vocab, dtype=torch.float32)
        return lambda: sampling.argmax(scores, table)

    return Case("argmax", f"{rows}x{vocab}", call)


def _draw(kernel: str, rows: int, vocab: int) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        logits = rand(device, rows, vocab, dtype=torch.float32)
        floats = torch.full((3, rows), 0.7, device=device)
        ints = torch.full((5, rows), 20, device=device)
        return lambda: sampling.draw(logits, floats, ints, table)

    return Case(kernel, f"{rows}x{vocab}", call)


def _penalties(rows: int, vocab: int) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        scores = rand(device, rows, vocab, dtype=torch.float32)
        counts, tokens = integers(device, 3, rows, vocab), integers(device, vocab, rows, 4096)
        places = torch.arange(rows, device=device).repeat(4, 1)
        settings = torch.ones(rows, 3, device=device)

        def launch() -> torch.Tensor:
            logits.apply_penalties(scores, counts, tokens, places, settings, table)
            return scores

        return launch

    return Case("penalties", f"{rows}x{vocab}", call)


def _bitmask(rows: int, vocab: int) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        scores = rand(device, rows, vocab, dtype=torch.float32)
        mask = integers(device, 2**31, rows, -(-vocab // 32))
        index = torch.arange(rows, device=device)

        def launch() -> torch.Tensor:
            logits.apply_bitmask(scores, mask, table, index)
            return scores

        return launch

    return Case("bitmask", f"{rows}x{vocab}", call)


def _logprobs(rows: int, vocab: int) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        scores = rand(device, rows, vocab, dtype=torch.float32)
        ids = integers(device, vocab, rows, dtype=torch.int64)
        return lambda: logits.logprobs(scores, ids, table)

    return Case("logprobs", f"{rows}x{vocab}", call)


def _batch(seqs: int, tokens: int) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        rows, counts, computed = integers(device, 2, 3, seqs)
        held = integers(device, 1000, seqs, 8192)
        groups = [
            batch.Group(integers(device, 1000, seqs, 8192 // size), size) for size in (16, 64)
        ]
        return lambda: batch.prepare(rows, counts, computed, held, groups, tokens, table)

    return Case("batch", f"{seqs}: {tokens}", call)


def _lora(kernel: str, tokens: int, rank: int, dtype: torch.dtype) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        x, y = rand(device, tokens, 4096, dtype=dtype), rand(device, tokens, 6144, dtype=dtype)
        a, b = rand(device, 8, rank, 4096, dtype=dtype), rand(device, 8, 6144, rank, dtype=dtype)
        index, scales = integers(device, 8, tokens), torch.ones(8, device=device)

        def launch() -> torch.Tensor:
            lora.add_lora(y, x, index, a, b, scales, table)
            return y

        return launch

    return Case(kernel, f"{tokens}x4096x{rank}x6144 {short(dtype)}", call)


def _mla(tokens: int, heads: int) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        query = rand(device, tokens, heads, mla.LATENT + mla.ROTARY)
        cache = rand(device, 1024, 64, mla.LATENT + mla.ROTARY)
        tables = integers(device, 1024, tokens, 64)
        lengths = torch.full((tokens,), 4096, dtype=torch.int32, device=device)
        return lambda: mla.mla_decode(query, cache, tables, lengths, 0.1, table)

    return Case("mla", f"{tokens}x{heads}", call)


def step_cases() -> Iterator[Case]:
    for kind in ("silu", "gelu", "gelu_tanh"):
        yield _gated(kind, 256, 14336)
    yield _gated("silu", 256, 768)
    for dtype in QUANTIZED:
        yield _gated_quantized(256, 3072, dtype)
        yield _gated_quantized(256, 14336, dtype)
        yield _gated_quantized(256, 53248, dtype)
    yield _add(256, 4096)
    yield _rope(32, 8, 128, 128)
    yield _rope(32, 32, 80, 32)
    for dtype in (torch.bfloat16, *QUANTIZED):
        yield _rope_write(32, 8, 128, dtype, True)
        yield _rope_write(16, 2, 256, dtype, False)
        yield _cache_write(8, 128, dtype)
        yield _cache_write(2, 256, dtype)
    for rows in (4, 256):
        yield _argmax(rows, 128256)
        yield _draw("draw", rows, 128256)
    yield _draw("draw_choose", 256, 262144)
    yield _penalties(64, 128256)
    yield _bitmask(64, 128256)
    yield _logprobs(4, 128256)
    yield _logprobs(256, 128256)
    yield _batch(256, 4096)
    for kernel in ("lora_shrink", "lora_expand"):
        for tokens in (16, 4096):
            yield _lora(kernel, tokens, 16, torch.bfloat16)
            yield _lora(kernel, tokens, 128, torch.bfloat16)
            yield _lora(kernel, tokens, 256, torch.bfloat16)
    for tokens in (4, 256):
        yield _mla(tokens, 16)
        yield _mla(tokens, 128)
