"""Philox-4x32-10 against its published vectors and a scalar reference; noise built upon it."""

import math

import pytest
import torch

from trimaran.platforms import philox
from trimaran.platforms.philox import (
    MAX_GUMBEL,
    NoiseKey,
    gumbel,
    gumbel_at,
    gumbel_rows,
    philox4x32,
    uniform,
)

# Random123's known-answer tests (kat_vectors): counter, key, output.
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def scalar_philox(counter: list[int], key: list[int]) -> list[int]:
    """The paper's algorithm in Python integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def make_key(*rows: tuple[int, int, int, int]) -> NoiseKey:
    """Rows of (seed low, seed high, child, position)."""
    return NoiseKey(*torch.tensor(rows, dtype=torch.int64).T)


def random_key(rows: int, seed: int = 0) -> NoiseKey:
    generator = torch.Generator().manual_seed(seed)
    return NoiseKey(*torch.randint(0, 2**32, (4, rows), generator=generator))


@pytest.mark.parametrize("counter, key, expected", VECTORS)
def test_published_vectors(counter: str, key: str, expected: str) -> None:
    assert scalar_philox(words(counter), words(key)) == words(expected)
    found = philox4x32(
        tuple(torch.tensor([word]) for word in words(counter)),
        tuple(torch.tensor([word]) for word in words(key)),
    )
    assert [word.item() for word in found] == words(expected)


def test_tensor_arithmetic_is_bit_exact() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randint(0, 2**32, (6, 200), generator=generator)
    inputs[:, :4] = 2**32 - 1  # the largest products
    found = philox4x32(tuple(inputs[:4]), tuple(inputs[4:]))
    for column in range(200):
        *counter, k0, k1 = inputs[:, column].tolist()
        assert [word[column].item() for word in found] == scalar_philox(counter, [k0, k1])


def test_every_part_of_the_key_matters() -> None:
    base = (1, 2, 3, 4)
    variants = [base, (9, 2, 3, 4), (1, 9, 3, 4), (1, 2, 9, 4), (1, 2, 3, 9)]
    noise = gumbel_rows(make_key(*variants), 64)
    for row in noise[1:]:
        assert not torch.isin(row, noise[0]).any()


def test_noise_of_a_token_is_defined_by_the_scalar_reference() -> None:
    key = (0x12345678, 0x9ABCDEF0, 5, 77)
    noise = gumbel_rows(make_key(key), 50)[0]
    for token in range(50):
        bits = scalar_philox([token // 4, 77, 5, 0], [0x12345678, 0x9ABCDEF0])[token % 4]
        expected = -math.log(-math.log1p(-(bits + 0.5) / 2**32))
        assert noise[token].item() == pytest.approx(expected, rel=2e-6, abs=2e-6)


@pytest.mark.parametrize("vocab", [1, 3, 4, 1031])
def test_noise_does_not_depend_on_what_else_is_computed(
    vocab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = random_key(7)
    whole = gumbel_rows(key, vocab)
    assert whole.shape == (7, vocab)
    alone = gumbel_rows(key.rows(slice(3, 4)), vocab)
    assert torch.equal(alone[0], whole[3])
    tokens = torch.randint(0, vocab, (7, 5))
    assert torch.equal(gumbel_at(key, tokens), whole.gather(1, tokens))
    monkeypatch.setattr(philox, "_CHUNK", 1)
    assert torch.equal(gumbel_rows(key, vocab), whole)


def test_extremes_stay_inside_the_open_interval() -> None:
    bits = torch.tensor([0, 1, 2**31, 2**32 - 2, 2**32 - 1])
    values = uniform(bits)
    assert ((values > 0) & (values < 1)).all()
    noise = gumbel(bits)
    assert noise.isfinite().all()
    assert noise.max().item() <= MAX_GUMBEL


def test_noise_is_gumbel_distributed() -> None:
    noise = gumbel_rows(random_key(64), 4096).flatten().double()
    assert noise.mean().item() == pytest.approx(0.5772157, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)
    for quantile in (0.001, 0.1, 0.5, 0.9, 0.999):
        share = (noise <= -math.log(-math.log(quantile))).double().mean().item()
        assert share == pytest.approx(quantile, abs=4 * math.sqrt(quantile / len(noise)))
