"""The native ops beyond the cases of the kit: every size, the whole range of a gate, threads."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.native import needs_native
from torch import Tensor

from trimaran.conformance.compare import as_tuple, difference
from trimaran.kernels_cpu.library import Call, library
from trimaran.platforms import cpu_native, cpu_ops
from trimaran.platforms.cpu_dense import NativeDensePacker
from trimaran.platforms.interface import OpSignature
from trimaran.platforms.ops import EXACT, OPS

pytestmark = needs_native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65, 511, 512, 513, 1031]  # around W, 4 W, a piece
GATED = ["silu_mul", "gelu_mul", "gelu_tanh_mul"]
EXACTLY = ("embed", "add", "rope", "gather_rows", "sample")  # equal to the reference in every bit


def native(op: str) -> cpu_native.NativeOp:
    (impl,) = (one for one in cpu_ops.cpu_ops()[op] if one.name == "native")
    assert isinstance(impl, cpu_native.NativeOp)
    return impl


def columns(rows: int, size: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """Some columns of wider rows, as a projection's slices are."""
    return torch.randn(rows, size + 5).mul(scale).to(dtype)[:, 2 : 2 + size]


def angles(rotary: int, positions: int = 50) -> Tensor:
    turned = torch.outer(torch.arange(float(positions)), torch.rand(rotary // 2))
    return torch.cat((turned.cos(), turned.sin()), 1)


def arguments(op: str, rows: int, size: int, dtype: torch.dtype) -> tuple[Any, ...]:
    if op == "embed":
        return torch.randint(0, 9, (rows,)), columns(9, size, dtype)
    if op == "gather_rows":
        return columns(7, size, dtype), torch.randint(0, 7, (2 * rows,))[::2]
    if op == "add":
        return columns(rows, size, dtype), columns(rows, size, dtype)
    if op == "rms_norm":
        return columns(rows, size, dtype, 5.0), torch.randn(size).to(dtype), 1e-6
    if op == "add_rms_norm":
        weight = torch.randn(size).to(dtype)
        return columns(rows, size, dtype), columns(rows, size, dtype, 3.0), weight, 1e-5
    if op == "rope":
        both = torch.randn(rows, 5, 2 * size + 3).to(dtype)
        positions = torch.randint(0, 50, (2, rows + 3))[:, :rows]
        return both[:, :3], both[:, 3:], positions, angles(2 * size)
    if op == "sample":
        return (columns(rows, size, torch.float32).round(),)  # many are equal
    if op == "draw":
        return drawing(columns(rows, size, torch.float32, 4.0), top_k=5, top_p=0.7, min_p=0.01)
    return (columns(rows, 2 * size, dtype, 3.0),)


def drawing(
    logits: Tensor,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 1 << 63 | 12345,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The op's arguments; positions count from 100."""
    rows = len(logits)
    floats = torch.tensor([[temperature], [top_p], [min_p]]).repeat(1, rows)
    ints = torch.tensor([[top_k], [seed & 0xFFFFFFFF], [seed >> 32], [2], [100]]).repeat(1, rows)
    ints[4] += torch.arange(rows)
    return logits, floats.T.contiguous().T, ints, 256  # as numpy lays out what it selects


NATIVE = [
    op
    for op, impls in cpu_ops.cpu_ops().items()
    if impls[0].name == "native" and op not in ("linear", "embed_packed")  # of packed weights
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", NATIVE)
def test_every_size_agrees_with_the_reference(op: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tolerance = EXACT if op in EXACTLY else OPS[op].tolerance[dtype]
    for size in SIZES:
        for rows in (1, 2, 5):
            args = arguments(op, rows, size, dtype)
            found = native(op)(*args)
            assert all(one.is_contiguous() for one in as_tuple(found))
            said = difference(found, OPS[op].reference(*args), tolerance)
            assert not said, f"{rows} rows of {size}: {said}"


@pytest.mark.parametrize("op", NATIVE)
def test_the_number_of_threads_changes_nothing(op: str, threads: Callable[[int], None]) -> None:
    torch.manual_seed(0)
    for rows, size in ((1, 40), (1, 5000), (3, 700), (40, 65)):
        args = arguments(op, rows, size, torch.bfloat16)
        threads(1)
        alone = as_tuple(native(op)(*args))
        for count in (2, 3, 7):
            threads(count)
            assert all(map(torch.equal, as_tuple(native(op)(*args)), alone))


def every_value(dtype: torch.dtype) -> Tensor:
    bits = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    return bits.view(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", GATED)
def test_every_gate_there_is(op: str, dtype: torch.dtype) -> None:
    """Infinities, NaN and subnormals too."""
    gate = every_value(dtype)
    for up in (1.0, -3.0):
        both = torch.cat((gate, torch.full_like(gate, up)))[None]
        said = difference(native(op)(both), OPS[op].reference(both), OPS[op].tolerance[dtype])
        assert not said


@pytest.mark.parametrize("op, activation", [(op, at) for at, op in enumerate(GATED)])
def test_activations_in_fp32_are_near_what_they_mean(op: str, activation: int) -> None:
    """Against fp64: relative to the gate, because 1 + erf and 1 + tanh round near -1."""
    gate = torch.linspace(-30, 30, 100_003)
    found = native(op)(torch.cat((gate, torch.ones_like(gate)))[None])[0]
    expected = OPS[op].reference(torch.cat((gate, torch.ones_like(gate))).double()[None])[0]
    bound = 2e-7 * torch.maximum(expected.abs(), gate.abs() if activation else expected.abs())
    assert bool(((found - expected).abs() <= bound + 1e-38).all())


@pytest.mark.parametrize("ids", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_packed_table_are_its_own(
    dtype: torch.dtype, ids: torch.dtype, threads: Callable[[int], None]
) -> None:
    """Every row, of vocabularies around a panel and beyond; ids lie apart, as columns do."""
    for vocab in (1, 31, 32, 33, 97):
        for size in SIZES:
            table = columns(vocab, size, dtype)
            packed = NativeDensePacker().pack({"weight": table}, (vocab, size))
            order = torch.randperm(vocab).repeat_interleave(2).to(ids)[::2]
            for count in (1, 3):
                threads(count)
                assert torch.equal(native("embed_packed")(order, packed), table[order.long()])


@pytest.mark.parametrize("op", ["embed", "embed_packed"])
def test_an_id_outside_the_table_gives_a_row_of_nan(op: str) -> None:
    table: Any = torch.randn(4, 6).bfloat16()
    packed = NativeDensePacker().pack({"weight": table}, (4, 6)) if op == "embed_packed" else table
    for outside in (-1, 4, 1 << 30):
        found = native(op)(torch.tensor([1, outside, 3]), packed)
        assert torch.equal(found[[0, 2]], table[[1, 3]])
        assert found[1].isnan().all()


# ---------------------------------------------------------------------------------------------
# sample
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("vocab", [1, 9, 300, 2048, 5000, 20_011])
def test_sample_finds_the_first_best(
    vocab: int, count: int, threads: Callable[[int], None]
) -> None:
    """Equals, NaN and rows of minus infinity, in every part of a row."""
    threads(count)
    generator = torch.Generator().manual_seed(0)
    for special in (7.0, math.inf, math.nan, -math.inf):
        for rows in (1, 3, 64):
            scores = torch.randn(rows, vocab, generator=generator)
            if special == -math.inf:
                scores[:] = special
            places = torch.randint(0, vocab, (rows, 3), generator=generator)
            scores.scatter_(1, places, special)
            assert torch.equal(native("sample")(scores), scores.argmax(-1))


# ---------------------------------------------------------------------------------------------
# draw
# ---------------------------------------------------------------------------------------------


def spread(kind: str, rows: int, vocab: int) -> Tensor:
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(rows, vocab, generator=generator)
    if kind == "peaked":  # as a trained model's
        return 2.5 * logits + 20 * torch.rand(rows, vocab, generator=generator).pow(300)
    if kind == "equal":
        return torch.zeros(rows, vocab)
    if kind == "steps":  # many are equal, and many are banned
        return logits.round().masked_fill(logits > 1.7, -math.inf)
    return logits


@pytest.mark.parametrize("kind", ["flat", "peaked", "equal", "steps"])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"min_p": 0.05},
        {"top_k": 1},
        {"top_k": 50},
        {"top_k": 50, "top_p": 0.95},
        {"top_k": 9, "top_p": 0.6, "min_p": 0.1},
        {"top_k": 2_000, "top_p": 0.9},
        {"top_p": 0.95},
        {"top_p": 0.3, "min_p": 0.001},
        {"top_p": 0.9999},
        {"top_p": 1e-9},
    ],
    ids=str,
)
def test_draw_draws_what_the_reference_draws(
    filters: dict[str, Any], kind: str, threads: Callable[[int], None]
) -> None:
    """The same tokens and floors, in vocabularies around a span and far beyond, by one thread a
    row and by three together."""
    for vocab in (1, 63, 64, 65, 500, 9_001):
        args = drawing(spread(kind, 5, vocab), **filters)
        expected = OPS["draw"].reference(*args)
        for count in (1, 3):
            threads(count)
            assert all(map(torch.equal, native("draw")(*args), expected)), (vocab, count)


def test_draw_is_a_fair_lottery() -> None:
    """Over many positions each token comes as often as its probability says."""
    probs = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    logits = probs.log().repeat(20_000, 1)
    tokens, _ = native("draw")(*drawing(logits, temperature=1.0))
    found = tokens.bincount(minlength=5) / len(tokens)
    assert bool(((found - probs).abs() < 4 * (probs * (1 - probs) / len(tokens)).sqrt()).all())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_row_that_cannot_be_drawn_from_yields_token_0(
    value: float, threads: Callable[[int], None]
) -> None:
    good = torch.randn(3, 200)
    bad = good.clone()
    bad[1, slice(None) if value == -math.inf else 177] = value
    options: list[dict[str, Any]] = [{}, {"top_k": 3}, {"top_p": 0.5}]
    for count in (1, 2):
        threads(count)
        for filters in options:
            tokens, floors = native("draw")(*drawing(bad, **filters))
            assert tokens[1] == 0 and floors[1] == -math.inf
            expected = native("draw")(*drawing(good, **filters))[0]
            assert torch.equal(tokens[[0, 2]], expected[[0, 2]])


# ---------------------------------------------------------------------------------------------
# qk_norm_rope
# ---------------------------------------------------------------------------------------------


def qk_norm_rope(
    query: Tensor, key: Tensor, weights: tuple[Tensor, Tensor], positions: Tensor, table: Tensor
) -> tuple[Tensor, Tensor]:
    """As a compiled step calls it: rows a token of the run."""
    call: Call = library().call("qk_norm_rope", query.dtype, per_token=1)
    out = torch.empty(query.shape, dtype=query.dtype), torch.empty(key.shape, dtype=key.dtype)
    tensors = query, key, positions, table, *weights
    call.input[:6] = [one.data_ptr() for one in tensors]
    call.output[:2] = out[0].data_ptr(), out[1].data_ptr()
    call.n[:4] = query.shape[1], key.shape[1], query.shape[2], table.shape[1]
    call.n[4:8] = query.stride(0), key.stride(0), positions.stride(-1), table.stride(0)
    call.n[8:10] = out[0].stride(0), out[1].stride(0)
    call.f[:2] = 1e-6, 1e-5
    library().run(library().program([call]), len(query))
    return out


@pytest.mark.parametrize("rotary", [6, 32, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_qk_norm_rope_is_its_parts_bit_by_bit(
    dtype: torch.dtype, rotary: int, threads: Callable[[int], None]
) -> None:
    torch.manual_seed(0)
    norm, rope = native("rms_norm"), native("rope")
    for tokens, count in ((1, 1), (1, 3), (7, 1), (7, 2)):
        threads(count)
        query, key, _ = torch.randn(tokens, 8, 64).mul(4).to(dtype).split([5, 2, 1], dim=1)
        weights = torch.randn(64).to(dtype), torch.randn(64).to(dtype)
        positions, table = torch.randint(0, 50, (1, tokens)), angles(rotary)
        found = qk_norm_rope(query, key, weights, positions, table)
        normed = norm(query, weights[0], 1e-6), norm(key, weights[1], 1e-5)
        assert all(map(torch.equal, found, rope(*normed, positions, table)))


# ---------------------------------------------------------------------------------------------
# Which implementation serves
# ---------------------------------------------------------------------------------------------


def test_torch_serves_where_the_library_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_native, "unavailable", lambda: "no compiler")
    for op, impls in cpu_ops.cpu_ops().items():
        supported = [one.name for one in impls if one.supports(OpSignature(op, torch.bfloat16))]
        assert "native" not in supported
        if op in ("rms_norm", "rope", *GATED):
            assert supported == ["cpu"]
