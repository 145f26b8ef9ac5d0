"""Noise, the highest score, and draws, against `platforms.philox` and `platforms.draw`."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from trimaran.kernels_cuda.portable import noise, sampling
from trimaran.kernels_cuda.portable.tuning import Entry, Table
from trimaran.platforms.draw import draw
from trimaran.platforms.philox import NoiseKey, gumbel, gumbel_rows, philox4x32

INF, NAN = float("inf"), float("nan")


def count(device: torch.device, on_card: int, interpreted: int) -> int:
    """Of rows: the interpreter takes some tenths of a second for one."""
    return on_card if device.type == "cuda" else interpreted


@pytest.fixture
def brief(table: Table) -> Table:
    """With a short list, so that rows need not be long to be too wide for it, and few parts."""
    own = {
        "draw": {"SPLITS": 4, "TILE": 512},
        "draw_choose": {"LIST": 256, "TILE": 512, "PIVOTS": 8},
    }
    entries = {name: (Entry({}, values, "a test's"),) for name, values in own.items()}
    return dataclasses.replace(table, entries={**table.entries, **entries})


@triton.jit
def _noise(key_ptr, ids_ptr, bits_ptr, at_ptr, from_ptr, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    ids = tl.load(ids_ptr + place)
    words = noise.bits_of_blocks(ids, key_ptr, 1)
    for lane in tl.static_range(4):
        tl.store(bits_ptr + 4 * place + lane, words[lane].to(tl.int64))
    tl.store(at_ptr + place, noise.gumbel_at(ids, key_ptr, 1))
    tl.store(from_ptr + place, noise.gumbel_from(COUNT, COUNT, key_ptr, 1))


@triton.jit
def _gumbel(bits_ptr, out_ptr, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    tl.store(out_ptr + place, noise.gumbel(tl.load(bits_ptr + place).to(tl.uint32)))


@triton.jit
def _functions(x_ptr, exp_ptr, log_ptr, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    x = tl.load(x_ptr + place)
    tl.store(exp_ptr + place, noise.exp_negative(-x))
    tl.store(log_ptr + place, noise.log(x))


@pytest.mark.parametrize(
    "key",
    [(0, 0, 0, 0), (1, 2, 3, 4), (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0x7FFFFFFF), (5, 0, 0, 9)],
    ids=str,
)
def test_noise(key: tuple[int, ...], device: torch.device) -> None:
    """The words bit for bit; the variates to an ulp or two."""
    ids = torch.cat((torch.arange(64), torch.randint(0, 2**18, (64,)))).to(device)
    bits = torch.empty(128, 4, dtype=torch.int64, device=device)
    at, following = torch.empty(2, 128, device=device)
    given = torch.tensor(key, device=device)
    _noise[(1,)](given, ids, bits, at, following, COUNT=128)
    low, high, child, position = (given[i : i + 1] for i in range(4))
    words = philox4x32((ids, position, child, torch.zeros_like(child)), (low, high))
    assert bits.equal(torch.stack([word.expand(128) for word in words], dim=1))
    whole = gumbel_rows(NoiseKey(low, high, child, position), 2**18)[0]
    torch.testing.assert_close(at, whole[ids], rtol=3e-7, atol=3e-7)
    torch.testing.assert_close(following, whole[128:256], rtol=3e-7, atol=3e-7)


def test_variates_of_few_and_many_bits(device: torch.device) -> None:
    """Where 1 - u is 1, and where it is nearly 0."""
    few = torch.arange(32, device=device)
    bits = torch.cat((few, 0xFFFFFFFF - few, 0x4AFB0CCC - 16 + few, (1 << few)))
    found = torch.empty(128, device=device)
    _gumbel[(1,)](bits, found, COUNT=128)
    torch.testing.assert_close(found, gumbel(bits), rtol=3e-7, atol=3e-7)


def test_exponential_and_logarithm(device: torch.device) -> None:
    parts = torch.rand(2000), 10 ** (40 * torch.rand(2000) - 37), torch.linspace(80, 90, 95)
    x = torch.cat((*parts, torch.ones(1))).to(device)
    exp, log = torch.empty(2, 4096, device=device)
    _functions[(1,)](x, exp, log, COUNT=4096)
    expected = (-x.double()).exp()
    assert ((exp.double() - expected).abs() <= expected * 1.2e-7 + 1e-37).all()
    expected = x.double().log()
    assert ((log.double() - expected).abs() <= expected.abs() * 1.2e-7).all()


@pytest.mark.parametrize("rows", [0, 1, 20])
@pytest.mark.parametrize("vocab", [1, 7, 1000, 5003])
def test_argmax(vocab: int, rows: int, device: torch.device, table: Table) -> None:
    scores = torch.randn(rows, vocab, device=device)
    assert sampling.argmax(scores, table).equal(scores.argmax(-1))
    assert sampling.argmax(scores.bfloat16(), table).equal(scores.bfloat16().argmax(-1))
    assert sampling.argmax(scores[:, : vocab // 2 + 1], table).equal(
        scores[:, : vocab // 2 + 1].argmax(-1)
    )


def test_argmax_of_equals_and_of_what_is_no_number(device: torch.device, table: Table) -> None:
    scores = torch.full((7, 3000), -INF, device=device)
    scores[1, [2999, 2000, 1100]] = 3.0
    scores[2, 1500], scores[2, 17], scores[2, 2500] = INF, 1.0, NAN
    scores[3] = torch.where(torch.arange(3000) % 2 == 0, -0.0, 0.0)
    scores[4] = -5.0
    scores[5, [700, 800]] = NAN
    scores[6, 1023:] = INF
    expected = torch.tensor([0, 1100, 2500, 0, 0, 700, 1023], device=device)
    assert sampling.argmax(scores, table).equal(expected)


def settings(device: torch.device, rows: int) -> tuple[Tensor, Tensor]:
    """Every mixture of filters in turn; the first six are none, top_p, top_k, both, all, and top_p
    with min_p."""
    mixture = torch.tensor([0, 1, 2, 3, 7, 5, 4, 6]).repeat(-(-rows // 8))[:rows]

    def some(value: Tensor, bit: int, none: float) -> Tensor:
        return torch.where((mixture & bit) == 0, torch.full_like(value, none), value)

    floats = torch.stack(
        [
            0.3 + 1.7 * torch.rand(rows),
            some(torch.rand(rows), 1, 1.0),
            some(torch.rand(rows) ** 3, 4, 0.0),
        ]
    )
    top_k = some(2 ** (10 * torch.rand(rows)), 2, 0.0).long()
    ints = torch.stack([top_k, *torch.randint(0, 2**32, (3, rows)), torch.arange(rows)])
    return floats.to(device), ints.to(device)


def check(logits: Tensor, floats: Tensor, ints: Tensor, table: Table) -> None:
    tokens, floor = sampling.draw(logits, floats, ints, table)
    their_tokens, their_floor = draw(logits, floats, ints)
    # A floor of min_p is a logarithm, which may be an ulp off; others are logits.
    torch.testing.assert_close(floor, their_floor, rtol=2e-7, atol=0)
    assert tokens.equal(their_tokens)


@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize("vocab", [50, 1000, 3001])
def test_draws_are_the_references(
    vocab: int, spread: float, device: torch.device, brief: Table
) -> None:
    rows = count(device, 200, 6)
    logits = spread * torch.randn(rows, vocab, device=device)
    check(logits, *settings(device, rows), brief)


def test_rows_too_wide_for_the_list(device: torch.device, brief: Table) -> None:
    logits = 0.1 * torch.randn(2, 1500, device=device)
    floats, ints = settings(device, 2)
    floats[1], floats[2], ints[0] = 0.9, 0.0, torch.tensor([0, 700])
    check(logits, floats, ints, brief)


def test_ties_survive_together(device: torch.device, brief: Table) -> None:
    rows = count(device, 100, 6)
    logits = torch.randn(rows, 2000, device=device).mul_(2).round_()
    check(logits, *settings(device, rows), brief)
    check(torch.zeros(rows, 500, device=device), *settings(device, rows), brief)


def test_settings_at_their_ends(device: torch.device, brief: Table) -> None:
    logits = 3 * torch.randn(8, 700, device=device)
    logits[:, 300:] = -INF
    ones = torch.ones(8)
    top_p = torch.tensor([0.0, 1e-9, 1 - 2.0**-24, 0.5, 1.0, 1.0, 1.0, 1.0])
    min_p = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1e-30, 0.0, 0.0])
    top_k = torch.tensor([0, 0, 0, 0, 0, 0, 1, 650])
    ints = torch.stack([top_k, *torch.randint(0, 2**32, (4, 8))]).to(device)
    for temperature in (1e-5, 1.0, 100.0)[: count(device, 3, 2)]:
        floats = torch.stack([temperature * ones, top_p, min_p]).to(device)
        check(logits, floats, ints, brief)


def test_logits_at_the_edges_of_bins(device: torch.device, brief: Table) -> None:
    """Where what the bins say of a nucleus is exact, and its last logit is the last that they
    leave."""
    logits = -0.25 * torch.arange(60, device=device).repeat(6, 1)
    top_p = torch.tensor([0.2, 0.35, 0.5, 0.65, 0.8, 0.95])
    floats = torch.stack([torch.ones(6), top_p, torch.zeros(6)]).to(device)
    ints = torch.stack([torch.zeros(6).long(), *torch.randint(0, 2**32, (4, 6))]).to(device)
    check(logits, floats, ints, brief)


def test_a_nucleus_that_ends_exactly(device: torch.device, brief: Table) -> None:
    """The largest logit weighs 1, and the others each a half to the last bit: a share of a half
    is the largest alone, and the next share there is takes the others too."""
    logits = torch.full((4, 50), -INF, device=device)
    logits[:, 7], logits[:, [3, 40]] = 0.0, -math.log(2)
    half = torch.tensor(0.5)
    top_p = torch.stack([half, half, half.nextafter(torch.tensor(1.0)), torch.tensor(0.75)])
    floats = torch.stack([torch.ones(4), top_p, torch.zeros(4)]).to(device)
    ints = torch.stack([torch.tensor([0, 3, 0, 0]), *torch.randint(0, 2**32, (4, 4))]).to(device)
    check(logits, floats, ints, brief)
    _, floor = sampling.draw(logits, floats, ints, brief)
    lowest = logits[0, 3].item()
    assert floor.tolist() == [0.0, 0.0, lowest, lowest]


def test_rows_that_fail(device: torch.device, brief: Table) -> None:
    logits = torch.randn(10, 700, device=device)
    logits[:2, 650], logits[2:4, 3], logits[4:6] = NAN, INF, -INF
    logits[6:8, :699] = -INF
    logits[8:, 1] = -INF
    floats, ints = settings(device, 10)
    floats[1, ::2], floats[1, 1::2], floats[2], ints[0] = 0.9, 1.0, 0.0, 0
    tokens, floor = sampling.draw(logits, floats, ints, brief)
    assert tokens[:8].tolist() == [0, 0, 0, 0, 0, 0, 699, 699]
    assert floor[:6].eq(-INF).all()
    their_tokens, their_floor = draw(logits, floats, ints)
    assert tokens.equal(their_tokens) and floor.equal(their_floor)


def test_a_rows_draw_does_not_depend_on_the_others(
    device: torch.device, table: Table, brief: Table
) -> None:
    """Nor on how many programs share the row."""
    logits = torch.randn(6, 3000, device=device)
    floats, ints = settings(device, 6)
    tokens, floor = sampling.draw(logits, floats, ints, table)
    for row in (0, 3):
        one = slice(row, row + 1)
        token, its_floor = sampling.draw(logits[one], floats[:, one], ints[:, one], brief)
        assert token.equal(tokens[one]) and its_floor.equal(floor[one])


def test_frequencies(device: torch.device, brief: Table) -> None:
    """Chi-square of draws of one distribution; 7 degrees of freedom, 1 in 10,000."""
    rows = count(device, 4000, 120)
    logits = torch.tensor([0.0, 1, -1, 2, 0.5, 1.5, -0.5, 0.2], device=device).repeat(rows, 1)
    floats = torch.tensor([1.0, 1.0, 0.0], device=device)[:, None].repeat(1, rows)
    ints = torch.zeros(5, rows, dtype=torch.int64, device=device)
    ints[4] = torch.arange(rows)
    tokens, _ = sampling.draw(logits, floats, ints, brief)
    expected = rows * logits[0].softmax(0)
    seen = torch.bincount(tokens, minlength=8)
    assert ((seen - expected) ** 2 / expected).sum() < 29.9
