"""Paged attention: tiles of queries and split keys, against the reference on random caches. What
may not be read, blocks of nobody, slots behind a sequence's end, is NaN throughout."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from helpers.interpreter import skip_unknown
from torch import Tensor

from trimaran.kernels_cuda.portable import attention, attention_split, attention_tile
from trimaran.kernels_cuda.portable.attention import Sequences
from trimaran.kernels_cuda.portable.paged import PagedCache
from trimaran.kernels_cuda.portable.tuning import Table
from trimaran.platforms.attention_reference import attend, quantize_vectors
from trimaran.platforms.compute import AttentionSpec

MIXED = ((5, 21), (1, 40), (1, 1), (17, 17), (3, 233), (1, 170), (40, 75))
"""(queries, keys) of sequences: prompts, later parts of prompts, single tokens."""
DECODE = ((1, 1), (1, 130), (1, 415), (1, 64), (1, 257))


@pytest.fixture
def table(table: Table) -> Table:
    """Few programs, so that the interpreter has few to run, and splits of a few tiles."""
    table = change(table, "attend_tiles", BLOCK_M=32, BLOCK_N=32)
    return change(table, "attend_splits", BLOCK_N=32, PROGRAMS=12, MIN_TILES=3)


def spec_of(heads: int = 4, kv_heads: int = 2, head_dim: int = 64, **more: Any) -> AttentionSpec:
    more = {"dtype": torch.float32, "block_size": 16, "scale": head_dim**-0.5} | more
    more.setdefault("kv_dtype", more["dtype"])
    return AttentionSpec(heads, kv_heads, head_dim, **more)


def change(table: Table, kernel: str, **values: int) -> Table:
    """The table with one entry for the kernel, of other constants."""
    last = table.entries[kernel][-1]
    last = dataclasses.replace(last, values={**last.values, **values})
    return dataclasses.replace(table, entries={**table.entries, kernel: (last,)})


@dataclasses.dataclass(frozen=True)
class Step:
    """Random queries and a cache, and what they stand for: `found` are each sequence's keys and
    values `[keys, kv_heads, head_dim]` as they are read from the cache."""

    query: Tensor
    cache: PagedCache
    sequences: Sequences
    found: list[tuple[Tensor, Tensor]]
    shape: Sequence[tuple[int, int]]

    def expected(self, spec: AttentionSpec, sinks: Tensor | None = None) -> Tensor:
        parts = self.query.split([queries for queries, _ in self.shape])
        made = [
            attend(query, *both, spec)
            if sinks is None
            else attend_with_sinks(query, *both, spec, sinks)
            for query, both in zip(parts, self.found, strict=True)
        ]
        return torch.cat(made).to(self.query.dtype)


def attend_with_sinks(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, sinks: Tensor
) -> Tensor:
    """A sink is one more score in each softmax, whose weight is then dropped."""
    group = spec.num_heads // spec.num_kv_heads
    key, value = (one.float().repeat_interleave(group, dim=1) for one in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * spec.scale
    at = torch.arange(len(key), device=query.device)
    distance = at[len(key) - len(query) :].unsqueeze(1) - at
    hidden = (distance < 0) | (distance >= (spec.sliding_window or len(key) + 1))
    scores = scores.masked_fill(hidden, float("-inf"))
    sink = sinks.view(-1, 1, 1).expand(-1, len(query), 1)
    weights = torch.cat([scores, sink], dim=-1).softmax(dim=-1)[..., :-1]
    return torch.einsum("hqk,khd->qhd", weights, value)


def stored(vectors: Tensor, dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor | None]:
    """What a cache of `dtype` keeps of `[keys, kv_heads, head_dim]`."""
    if dtype == torch.int8:
        return quantize_vectors(vectors)
    return (vectors / scale).to(dtype), None


def make_step(
    shape: Sequence[tuple[int, int]],
    spec: AttentionSpec,
    device: torch.device,
    scales: tuple[float, float] = (1.0, 1.0),
) -> Step:
    """The queries are a slice of wider rows, as of a fused projection."""
    size, tokens = spec.block_size, sum(queries for queries, _ in shape)
    needed = [-(-keys // size) for _, keys in shape]
    order = (torch.randperm(sum(needed) + 2) + 1).tolist()
    blocks = len(order) + 1
    layout = (blocks, spec.num_kv_heads, size, spec.head_dim)
    # Bytes of 0x7f or 0x80 are NaN in every float8; an int8 cache is poisoned by its scales.
    if spec.kv_dtype.itemsize == 1:
        byte = 0x80 if spec.kv_dtype == torch.float8_e4m3fnuz else 0x7F
        kept = [torch.full(layout, byte, dtype=torch.uint8).view(spec.kv_dtype) for _ in "kv"]
    else:
        kept = [torch.full(layout, float("nan"), dtype=spec.kv_dtype) for _ in "kv"]
    vector_scales = [torch.full(layout[:-1], float("nan")) for _ in "kv"]
    tables = torch.zeros(len(shape), max(needed) + 1, dtype=torch.int32)
    found = []
    for i, (queries, keys) in enumerate(shape):
        mine = [order.pop() for _ in range(needed[i])]
        at = torch.arange(keys)
        block = torch.tensor(mine)[at // size]
        values = []
        for which in range(2):
            new = torch.randn(keys, spec.num_kv_heads, spec.head_dim)
            codes, scale = stored(new, spec.kv_dtype, scales[which])
            kept[which].view(codes.dtype)[block, :, at % size] = codes
            if scale is not None:
                vector_scales[which][block, :, at % size] = scale
                values.append(codes.float() * scale.unsqueeze(-1))
            else:
                values.append(codes.float() * scales[which])
        tables[i, : needed[i]] = torch.tensor(mine, dtype=torch.int32)
        if spec.sliding_window is not None and spec.causal:
            gone = max(0, keys - queries - spec.sliding_window + 1) // size
            tables[i, :gone] = 0
        found.append(tuple(one.to(device) for one in values))
    starts = torch.tensor([0] + [queries for queries, _ in shape]).cumsum(0).int()
    lens = torch.tensor([keys for _, keys in shape], dtype=torch.int32)
    most = [max(pair[side] for pair in shape) for side in range(2)]
    sequences = Sequences(tables.to(device), starts.to(device), lens.to(device), *most)
    cache = PagedCache(*(one.to(device) for one in kept), None, None, *scales)
    if spec.kv_dtype == torch.int8:
        cache = cache._replace(
            key_scales=vector_scales[0].to(device), value_scales=vector_scales[1].to(device)
        )
    wide = torch.randn(tokens, spec.num_heads + 2, spec.head_dim, device=device).to(spec.dtype)
    return Step(wide[:, 1:-1], cache, sequences, found, shape)


def check(step: Step, spec: AttentionSpec, table: Table, **features: Tensor) -> attention.Plan:
    plan = attention.plan(spec, step.sequences, table)
    found = attention.attend(step.query, step.cache, plan, **features)
    assert found.shape == step.query.shape
    assert found.is_contiguous()
    tolerance = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[spec.dtype]
    expected = step.expected(spec, features.get("sinks"))
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    return plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [MIXED, DECODE], ids=["mixed", "decode"])
def test_batches(
    shape: Sequence[tuple[int, int]], dtype: torch.dtype, device: torch.device, table: Table
) -> None:
    spec = spec_of(dtype=dtype)
    plan = check(make_step(shape, spec, device), spec, table)
    assert plan.splits is not None
    assert (plan.tiles is None) == (shape is DECODE)


@pytest.mark.parametrize(
    "shape", [[(1, 1)], [(1, 700)], [(5, 35)], [(33, 33)], [(2, 300), (9, 140)]], ids=str
)
def test_few_sequences(shape: list[tuple[int, int]], device: torch.device, table: Table) -> None:
    spec = spec_of()
    check(make_step(shape, spec, device), spec, table)


@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (6, 2), (40, 1), (4, 4)], ids=str)
def test_groups_of_heads(heads: tuple[int, int], device: torch.device, table: Table) -> None:
    spec = spec_of(*heads)
    check(make_step(((9, 30), (1, 200), (2, 14)), spec, device), spec, table)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_head_sizes(head_dim: int, device: torch.device, table: Table) -> None:
    spec = spec_of(head_dim=head_dim)
    check(make_step(((9, 41), (1, 200)), spec, device), spec, table)


@pytest.mark.parametrize("block_size", [16, 32, 48, 64])
def test_block_sizes(block_size: int, device: torch.device, table: Table) -> None:
    spec = spec_of(block_size=block_size)
    check(make_step(((9, 141), (1, 200)), spec, device), spec, table)


FEATURES = {
    "window": {"sliding_window": 20},
    "window of 1": {"sliding_window": 1},
    "wide window": {"sliding_window": 170},
    "softcap": {"softcap": 0.7},
    "alibi": {"alibi_slopes": (0.5, 0.25, 0.125, 0.0625)},
    "not causal": {"causal": False, "sliding_window": 20},
    "not causal, alibi": {"causal": False, "alibi_slopes": (0.5, 0.25, 0.125, 0.0625)},
    "all": {"sliding_window": 170, "softcap": 3.0, "alibi_slopes": (0.01, 0.1, 0.0, 0.02)},
}


@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, device: torch.device, table: Table) -> None:
    spec = spec_of(**FEATURES[name])
    slopes = torch.tensor(spec.alibi_slopes, device=device) if spec.alibi_slopes else None
    check(make_step(MIXED, spec, device), spec, table, slopes=slopes)


def test_a_window_that_ends_within_a_tile_of_queries(device: torch.device, table: Table) -> None:
    """The last queries of a tile no longer see keys that the first ones see, tiles before those
    that not all see yet."""
    spec = spec_of(sliding_window=70)
    check(make_step(((40, 260),), spec, device), spec, table)


@pytest.mark.filterwarnings("ignore:overflow")  # in the interpreter; it is meant to
def test_softcap_of_large_scores(device: torch.device, table: Table) -> None:
    spec = spec_of(softcap=50.0, scale=1000.0)
    check(make_step(((5, 21), (1, 200)), spec, device), spec, table)


@pytest.mark.parametrize("window", [None, 20])
def test_sinks(window: int | None, device: torch.device, table: Table) -> None:
    spec = spec_of(sliding_window=window)
    sinks = torch.tensor([2.0, -1.0, 30.0, float("-inf")], device=device)
    check(make_step(MIXED, spec, device), spec, table, sinks=sinks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 150])
def test_int8_cache(
    dtype: torch.dtype, window: int | None, device: torch.device, table: Table
) -> None:
    spec = spec_of(dtype=dtype, kv_dtype=torch.int8, sliding_window=window, block_size=48)
    check(make_step(MIXED, spec, device), spec, table)


@triton.jit
def _decode(code_ptr, out_ptr, dtype: tl.constexpr):
    place = tl.arange(0, 256)
    value = attention_tile.decode(tl.load(code_ptr + place), dtype)
    tl.store(out_ptr + place, value.to(tl.float32))


def test_every_int8_code_as_bfloat16(device: torch.device) -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8, device=device)
    found = torch.empty(256, device=device)
    _decode[(1,)](codes, found, tl.bfloat16)
    assert found.equal(codes.float())


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz]


@pytest.mark.parametrize("kv_dtype", FLOAT8, ids=str)
def test_float8_cache(kv_dtype: torch.dtype, device: torch.device, table: Table) -> None:
    if device.type == "cuda" and str(kv_dtype).removeprefix("torch.") not in table.fp8:
        pytest.skip(f"this card converts no {kv_dtype}")
    skip_unknown(kv_dtype)
    spec = spec_of(dtype=torch.float16, kv_dtype=kv_dtype)
    check(make_step(MIXED, spec, device, scales=(0.5, 2.0)), spec, table)


@pytest.mark.parametrize("queries", [1, 3])
def test_splits_agree_with_tiles(queries: int, device: torch.device, table: Table) -> None:
    """Also where one program's share is many tiles, and where it is one."""
    spec = spec_of(2, 1, sliding_window=300)
    step = make_step([(queries, keys) for keys in (5, 500, 64, 101, 33)], spec, device)
    whole = attention.plan(spec, step.sequences, change(table, "attend_splits", MIN_TILES=1000))
    assert whole.splits is None
    expected = attention.attend(step.query, step.cache, whole)
    for programs, min_tiles in ((100, 1), (12, 1), (1, 1), (30, 3)):
        values = {"PROGRAMS": programs, "MIN_TILES": min_tiles, "SPLITS": 4}
        plan = attention.plan(spec, step.sequences, change(table, "attend_splits", **values))
        assert plan.splits is not None
        assert plan.tiles is None
        assert plan.splits.starts[-1] <= plan.splits.items
        found = attention.attend(step.query, step.cache, plan)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_plan_follows_the_lengths(device: torch.device, table: Table) -> None:
    """As in a graph: made for the longest there may be, right for any. A long sequence beside short
    ones is what is split."""
    spec = spec_of()
    step = make_step(DECODE, spec, device)
    sequences = step.sequences._replace(max_keys=100_000)
    plan = attention.plan(spec, sequences, change(table, "attend_splits", PROGRAMS=16, MIN_TILES=4))
    assert plan.splits is not None
    assert plan.splits.starts.diff().tolist() == [1, 2, 4, 1, 3]
    assert plan.splits.items == 5 + 16 // 2
    found = attention.attend(step.query, step.cache, plan)
    torch.testing.assert_close(found, step.expected(spec), rtol=2e-5, atol=2e-5)


def test_many_sequences(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, table: Table
) -> None:
    """More than are looked at together."""
    monkeypatch.setattr(attention, "CHUNK", 16)
    monkeypatch.setattr(attention_split, "CHUNK", 16)
    spec = spec_of(1, 1)
    shape = [(1, 1 + i % 3) for i in range(35)] + [(3, 150), (20, 20)]
    plan = check(make_step(shape, spec, device), spec, table)
    assert plan.splits is not None


def test_padding(device: torch.device, table: Table) -> None:
    """Sequences without queries are passed over; one without keys gives zeros, whose NaN in the
    scratch block is not read."""
    spec = spec_of()
    step = make_step(((1, 150), (1, 16), (1, 1)), spec, device)
    starts = torch.tensor([0, 1, 1, 2, 3, 3], dtype=torch.int32, device=device)
    lens = torch.tensor([150, 7, 16, 0, 9], dtype=torch.int32, device=device)
    rows = torch.tensor([0, 2, 1, 2, 2], device=device)
    tables = step.sequences.block_tables[rows]
    expected = step.expected(spec)
    expected[2] = 0.0
    for max_keys in (64, 4096):
        plan = attention.plan(spec, Sequences(tables, starts, lens, 1, max_keys), table)
        assert (plan.splits is None) == (max_keys == 64)
        found = attention.attend(step.query, step.cache, plan)
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


def test_what_is_no_number_stays_with_who_sees_it(device: torch.device, table: Table) -> None:
    spec = spec_of()
    step = make_step(((4, 20), (1, 200), (1, 300)), spec, device)
    block = step.sequences.block_tables[1, 3].item()
    step.cache.values[block, 1, 5] = float("nan")
    found = attention.attend(step.query, step.cache, attention.plan(spec, step.sequences, table))
    bad = found.isnan().any(dim=-1)  # [tokens, heads]
    assert bad[4].tolist() == [False, False, True, True]
    assert bad.sum() == 2
