"""Kernels one by one through the platform's own choice of them: time, share of the rate that the
canary measured, and how much longer torch (and FlashInfer, where it is installed) takes.

A limit is max(bytes that must move / bandwidth, operations / bf16 rate), of one call.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trimaran.core.args import QUANTIZATIONS
from trimaran.core.ops import OpBinder, WeightUse
from trimaran.platforms import ops
from trimaran.platforms.interface import AttentionBatch, AttentionSpec

from .part import Bench, Found, Piece, Skip
from .timing import Clock

BF16 = torch.bfloat16
BLOCK = 32
Call = Callable[[], Any]


class Heads(NamedTuple):
    query: int
    kv: int
    dim: int = 128


QWEN, LLAMA = Heads(16, 8), Heads(32, 8)
"""Of Qwen3-0.6B, and of Llama 3 8B."""
DECODES = ((1, 32_768), (64, 1024), (256, 1024), (32, 8192), (8, 32_768), (2, 131_072))
PREFILLS = ((1, 2048, 2048), (1, 8192, 8192), (8, 2048, 2048), (1, 2048, 32_768))
"""Sequences, queries of each, keys of each."""
LINEARS = (1, 16, 64, 256, 4096)
WIDTHS = (4096, 12_288)  # in, out


class Kernels:
    """What the kernels are called on: a device, and a binder for each way to quantize."""

    def __init__(self, bench: Bench, clock: Clock) -> None:
        self.tiny, self.clock, self.rates = bench.tiny, clock, bench.rates()
        self.device = clock.torch_device
        torch.manual_seed(0)

    def binder(self, quantization: str | None = None) -> OpBinder:
        return OpBinder(self.clock.platform, self.clock.device, quantization=quantization)

    @cached_property
    def plain(self) -> OpBinder:
        return self.binder()

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=BF16)

    def measure(self, ours: Call, moved: float, operations: float, **peers: Call | str) -> Found:
        """`moved`: bytes; a peer that is words did not run, for that reason."""
        found = self.clock.time(ours)
        seconds = found["seconds"]
        found |= {"gb_s": moved / seconds / 1e9, "tflop_s": operations / seconds / 1e12}
        if self.rates:
            reading = moved / self.rates["read_gb_s"] / 1e9
            computing = operations / self.rates["gemm_gflop_s"] / 1e9
            found |= {
                "percent_of_bandwidth": 100 * reading / seconds,
                "percent_of_bf16_rate": 100 * computing / seconds,
                "percent_of_limit": 100 * max(reading, computing) / seconds,
            }
        for name, peer in peers.items():
            found[f"{name}_over_ours"] = self._ratio(peer, seconds)
        return found

    def _ratio(self, peer: Call | str, seconds: float) -> float | str:
        """How many times longer the peer takes; or why it does not run."""
        if isinstance(peer, str):
            return peer
        try:
            return float(self.clock.time(peer)["seconds"]) / seconds
        except Exception as error:  # another's kernel: our figure stands without it
            return f"{type(error).__name__}: {error}"[:300]


def kernels(bench: Bench) -> Iterator[Piece]:
    clock = bench.opened(lambda: Clock.open(bench))
    made: list[Kernels] = []

    def on(work: Callable[..., Found], *args: Any) -> Callable[[], Found]:
        def run() -> Found:
            if not made:
                made.append(Kernels(bench, clock()))
            return work(made[0], *args)

        return run

    for heads in (QWEN, LLAMA):
        label = f"{heads.query}/{heads.kv} heads"
        for batch, context in ((2, 64),) if bench.tiny else DECODES:
            yield f"decode attention {label}, {batch}x{context}", on(decode, heads, batch, context)
        for shape in ((1, 32, 64),) if bench.tiny else PREFILLS:
            name = "{}x{} of {}".format(*shape)
            yield f"prefill attention {label}, {name}", on(prefill, heads, *shape)
    sizes = (2, 64) if bench.tiny else (32, 8192)
    yield "decode attention int8 cache, {}x{}".format(*sizes), on(decode, LLAMA, *sizes, torch.int8)
    yield from _row_kernels(on, *((16, 64) if bench.tiny else (16_384, 4096)))
    yield from _linears(bench, on)


def decode(
    kernels: Kernels, heads: Heads, batch: int, context: int, kv_dtype: torch.dtype = BF16
) -> Found:
    """A token of each sequence against its whole context."""
    return attention(kernels, heads, (batch, 1, context), kv_dtype)


def prefill(kernels: Kernels, heads: Heads, batch: int, queries: int, keys: int) -> Found:
    return attention(kernels, heads, (batch, queries, keys), BF16)


def attention(
    kernels: Kernels, heads: Heads, shape: tuple[int, int, int], kv_dtype: torch.dtype
) -> Found:
    batch, queries, keys = shape
    scale = heads.dim**-0.5
    spec = AttentionSpec(heads.query, heads.kv, heads.dim, scale, BF16, kv_dtype, BLOCK)
    impl = kernels.plain.attention(spec)
    each = -(-keys // BLOCK)
    cache = impl.alloc(kernels.clock.device, spec, batch * each + 1)
    for tensor in cache.tensors:
        _fill(tensor, kv_dtype)
    tables = torch.randperm(batch * each, device=kernels.device).add(1).view(batch, each).int()
    query = kernels.randn(batch * queries, heads.query, heads.dim)
    metadata = kernels.clock.do(lambda: impl.plan(spec, _batch(shape, tables)))
    moved = batch * each * impl.block_bytes(spec) + 2 * query.nbytes
    seen = batch * queries * (keys - (queries - 1) / 2)  # pairs of a query and a key it sees
    return kernels.measure(
        lambda: impl.run(query, cache, spec, metadata),
        moved,
        4 * heads.query * heads.dim * seen,
        sdpa=_sdpa(kernels, heads, shape),
        flashinfer=_flashinfer(kernels, spec, cache, tables, query, keys),
    ) | {"by_kernel": impl.name}


def _fill(tensor: Tensor, kv_dtype: torch.dtype) -> None:
    """Values like those of a model; scales, where they are kept beside 8-bit codes."""
    if tensor.dtype == kv_dtype and kv_dtype.is_floating_point:
        tensor.normal_()
    elif tensor.dtype.is_floating_point:
        tensor.fill_(0.01)
    else:
        tensor.random_(0, 127)


def _batch(shape: tuple[int, int, int], tables: Tensor) -> AttentionBatch:
    batch, queries, keys = shape
    starts = [i * queries for i in range(batch + 1)]
    slots = torch.zeros(batch * queries, dtype=torch.int64, device=tables.device)
    return AttentionBatch(starts, [keys] * batch, tables, slots)


def _sdpa(kernels: Kernels, heads: Heads, shape: tuple[int, int, int]) -> Call | str:
    """torch's, over keys and values that lie in one piece: without pages, a simpler task."""
    batch, queries, keys = shape
    if queries not in (1, keys):
        return "torch's causal mask begins with the first key"
    query = kernels.randn(batch, heads.query, queries, heads.dim)
    key, value = (kernels.randn(batch, heads.kv, keys, heads.dim) for _ in "kv")
    return lambda: F.scaled_dot_product_attention(
        query, key, value, is_causal=queries > 1, enable_gqa=True
    )


def _flashinfer(
    kernels: Kernels, spec: Any, cache: Any, tables: Tensor, query: Tensor, keys: int
) -> Call | str:
    if importlib.util.find_spec("flashinfer") is None:
        return "not installed"
    if spec.kv_dtype != BF16 or len(query) != len(tables):
        return "asked for decode over a bf16 cache only"
    import flashinfer

    work = torch.empty(256 << 20, dtype=torch.uint8, device=kernels.device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(work, "HND")
    batch, each = tables.shape
    wrapper.plan(
        torch.arange(batch + 1, dtype=torch.int32, device=kernels.device) * each,
        tables.flatten(),
        torch.full((batch,), (keys - 1) % BLOCK + 1, dtype=torch.int32, device=kernels.device),
        *(spec.num_heads, spec.num_kv_heads, spec.head_dim, BLOCK),
        q_data_type=BF16,
        kv_data_type=BF16,
    )
    return lambda: wrapper.run(query, (cache.tensors[0], cache.tensors[1]))


def _row_kernels(on: Callable[..., Call], tokens: int, size: int) -> Iterator[Piece]:
    yield f"rms_norm {tokens}x{size}", on(rms_norm, tokens, size)
    yield f"add_rms_norm {tokens}x{size}", on(add_rms_norm, tokens, size)
    yield f"silu_mul {tokens}x{size}", on(silu_mul, tokens, size)
    yield f"rope_write {tokens} tokens, 16/8 heads", on(rope_write, tokens)


def rms_norm(kernels: Kernels, tokens: int, size: int) -> Found:
    call = kernels.plain.bind("rms_norm", BF16, size=size)
    x, weight = kernels.randn(tokens, size), kernels.randn(size)
    theirs = partial(F.rms_norm, x, (size,), weight, 1e-6)
    return kernels.measure(lambda: call(x, weight, 1e-6), 2 * x.nbytes, 0, torch=theirs)


def add_rms_norm(kernels: Kernels, tokens: int, size: int) -> Found:
    call = kernels.plain.bind("add_rms_norm", BF16, size=size)
    x, residual, weight = *(kernels.randn(tokens, size) for _ in "xr"), kernels.randn(size)
    ours = partial(call, x, residual, weight, 1e-6)

    def theirs() -> Tensor:
        return F.rms_norm(x + residual, (size,), weight, 1e-6)

    return kernels.measure(ours, 4 * x.nbytes, 0, torch=theirs)


def silu_mul(kernels: Kernels, tokens: int, size: int) -> Found:
    call = kernels.plain.bind("silu_mul", BF16, size=size)
    both = kernels.randn(tokens, 2 * size)

    def theirs() -> Tensor:
        return F.silu(both[:, :size]) * both[:, size:]

    return kernels.measure(lambda: call(both), 1.5 * both.nbytes, 0, torch=theirs)


def rope_write(kernels: Kernels, tokens: int) -> Found:
    """The norms of the heads, the rotation and the write to the cache in one launch, against the
    same by torch's ops."""
    heads, dim = QWEN, QWEN.dim
    spec = AttentionSpec(heads.query, heads.kv, dim, 1.0, BF16, BF16, BLOCK)
    impl = kernels.plain.attention(spec)
    if not hasattr(impl, "rope_write"):
        raise Skip(f"attention by {impl.name!r} has no such kernel")
    # Only where there is a card need Triton be there.
    from trimaran.kernels_cuda.portable.cache import HeadNorms, Rotation

    cache = impl.alloc(kernels.clock.device, spec, tokens // BLOCK + 2)
    query, key, value = (kernels.randn(tokens, n, dim) for n in (heads.query, heads.kv, heads.kv))
    weight = kernels.randn(dim)
    positions = torch.arange(tokens, device=kernels.device).view(1, -1)
    angles = torch.randn(tokens, dim, device=kernels.device)
    slots = torch.arange(tokens, device=kernels.device) + BLOCK

    def ours() -> Tensor:
        rotation, norms = Rotation(positions, angles), HeadNorms(weight, weight, 1e-6)
        return impl.rope_write(query, key, value, rotation, cache, slots, norms)

    def theirs() -> None:
        normed = (ops.rms_norm(one, weight, 1e-6) for one in (query, key))
        impl.write(ops.rope(*normed, positions, angles)[1], value, cache, slots)

    moved = 2 * (query.nbytes + key.nbytes + value.nbytes) + angles.nbytes
    return kernels.measure(ours, moved, 0, torch=theirs)


def _linears(bench: Bench, on: Callable[..., Call]) -> Iterator[Piece]:
    widths = (64, 128) if bench.tiny else WIDTHS
    for quantization in (None, *QUANTIZATIONS):
        for tokens in (2,) if bench.tiny else LINEARS:
            name = "{} {}x{}x{}".format(quantization or "bf16", tokens, *widths)
            yield f"linear {name}", on(linear, quantization, tokens, *widths)
    for tokens in (2,) if bench.tiny else LINEARS:
        name = "linear float8 {}x{}x{}".format(tokens, *widths)
        yield name, on(float8_linear, bench.on_card, tokens, *widths)


def linear(kernels: Kernels, quantization: str | None, tokens: int, size: int, out: int) -> Found:
    """As a model's layer does it: the rounding of activations is in it, where there is one."""
    binder = kernels.binder(quantization)
    x, weight = kernels.randn(tokens, size), kernels.randn(out, size)
    scheme = binder.scheme(size)
    packed = binder.pack(weight, scheme=scheme)
    call = binder.bind(
        "linear", BF16, packed_format(binder, scheme, out, size), in_features=size, out_features=out
    )
    bits = scheme_bits(scheme)
    moved = size * out * bits / 8 + 2 * tokens * (size + out)
    theirs = partial(F.linear, x, weight)
    found = kernels.measure(
        lambda: call(x, packed, None), moved, 2 * tokens * size * out, torch_bf16=theirs
    )
    return found | {"format": packed.format}


def packed_format(binder: Any, scheme: Any, out: int, size: int) -> str:
    found: str = binder.weight_format(scheme, BF16, WeightUse.by_linear((out, size)))
    if found != scheme.format:
        raise Skip("; ".join(binder.remarks))
    return found


def scheme_bits(scheme: Any) -> int:
    """Bits a weight, scales left out."""
    return {"dense": 16, "int8": 8, "int4": 4, "w4a16": 4}.get(scheme.format, 8)


def float8_linear(kernels: Kernels, on_card: bool, tokens: int, size: int, out: int) -> Found:
    """The portable kernel with weights and activations in the card's own 8-bit float."""
    if not on_card:
        raise Skip("the portable kernels want a card")
    # As above.
    from trimaran.kernels_cuda.portable import gemm, quantize
    from trimaran.platforms.gpu_kernels import table_for

    table = table_for(kernels.clock.platform.capabilities().isa)
    known = [name for name in ("float8_e4m3fn", "float8_e4m3fnuz") if name in table.fp8]
    if not known:
        raise Skip(f"{table.architecture} has no 8-bit float with 4 bits of exponent")
    dtype = getattr(torch, known[0])
    x, weight = kernels.randn(tokens, size), kernels.randn(out, size)
    codes, scales = kernels.clock.do(lambda: quantize.quantize_tokens(weight, dtype, table))

    def ours() -> Tensor:
        rounded, steps = quantize.quantize_tokens(x, dtype, table)
        return gemm.matmul_scaled(rounded, codes, steps, scales, None, table, dtype=BF16)

    rounded = x.to(dtype)
    one = torch.ones((), device=kernels.device)
    theirs = partial(torch._scaled_mm, rounded, codes.t(), one, one, out_dtype=BF16)
    moved = size * out + 2 * tokens * (size + out)
    return kernels.measure(ours, moved, 2 * tokens * size * out, torch_scaled_mm=theirs)
