"""The sampler against slow, obvious references: filters, features, log-probabilities, failures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from trimaran.core.plan import NewRow, RowSampling
from trimaran.core.sampler import sampler as sampler_module
from trimaran.core.sampler.sampler import Sampled, Sampler
from trimaran.platforms.host_device import HostDevice
from trimaran.platforms.interface import Device
from trimaran.platforms.philox import NoiseKey, gumbel_rows
from trimaran.platforms.strict_device import StrictDevice

VOCAB = 97
LENGTH = 32


class Bench:
    """A sampler with its token table, driven as the runner drives it."""

    def __init__(self, device: Device | None = None, rows: int = 8, **options: str) -> None:
        self.device = device or HostDevice()
        self.tokens = torch.zeros((rows, LENGTH), dtype=torch.int32)
        self.sampler = Sampler(self.device, self.tokens, VOCAB, **options)
        self.lengths: dict[int, int] = {}

    def add(
        self, row: int, sampling: RowSampling, prompt: Sequence[int] = (1, 2), output=()
    ) -> None:
        known = [*prompt, *output]
        new = NewRow(row, known, len(prompt), [[]], sampling)
        self.lengths[row] = len(known)
        for work in self.sampler.add(new):
            self.device.launch(work).wait()
        self.device.launch(lambda: self._write(row, known)).wait()

    def _write(self, row: int, known: list[int]) -> None:
        self.tokens[row, : len(known)] = torch.tensor(known, dtype=torch.int32)

    def remove(self, row: int) -> None:
        self.sampler.remove(row)
        del self.lengths[row]

    def step(self, rows: Sequence[int], logits: Tensor) -> Sampled:
        """Draw a token for each of `rows` and append it."""
        positions = np.array([self.lengths[row] for row in rows])
        staged = self.sampler.stage(np.array(rows), positions)
        found: list[Sampled] = []

        def work() -> None:
            sampled = staged.run(logits.clone())
            self.tokens[rows, positions] = sampled.token_ids.int()
            found.append(sampled)

        self.device.launch(work).wait()
        for row in rows:
            self.lengths[row] += 1
        return found[0]


def random_logits(rows: int, seed: int = 0, scale: float = 3.0, vocab: int = VOCAB) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def reference_noise(sampling: RowSampling, position: int, vocab: int = VOCAB) -> Tensor:
    seed = sampling.seed
    parts = (seed & 0xFFFFFFFF, seed >> 32, sampling.child_index, position)
    return gumbel_rows(NoiseKey(*(torch.tensor([p]) for p in parts)), vocab)[0]


def reference_token(logits: Tensor, sampling: RowSampling, position: int) -> int:
    """One row by the definitions: probabilities, sorted; then Gumbel-max over the survivors."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probs = (logits.double() / sampling.temperature).softmax(-1)
    keep = probs >= sampling.min_p * probs.max()
    if sampling.top_k:
        keep &= probs >= probs.sort(descending=True).values[sampling.top_k - 1]
    if sampling.top_p < 1:
        order = probs.masked_fill(~keep, 0).sort(descending=True)
        before = order.values.cumsum(-1) - order.values
        keep[order.indices[before >= sampling.top_p * order.values.sum()]] = False
    noisy = logits / sampling.temperature + reference_noise(sampling, position, len(logits))
    return int(noisy.masked_fill(~keep, -math.inf).argmax())


SETTINGS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.5, "top_k": 7},
    {"temperature": 1.0, "top_p": 0.6},
    {"temperature": 2.0, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 1e-6},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.3, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
]


@pytest.mark.parametrize("short", [4, 16, 256])
def test_draws_match_the_definitions(short: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler_module, "SHORT", short)
    rows = range(len(SETTINGS))
    bench = Bench(rows=len(SETTINGS))
    asked = [RowSampling(seed=11 + row, **SETTINGS[row]) for row in rows]
    for row in rows:
        bench.add(row, asked[row])
    for step in range(12):
        logits = random_logits(len(SETTINGS), seed=step)
        expected = [reference_token(logits[row], asked[row], 2 + step) for row in rows]
        assert bench.step(rows, logits).token_ids.tolist() == expected


@pytest.mark.parametrize("settings", [{"top_k": 5, "top_p": 0.6}, {"top_k": 3}, {"top_p": 0.97}])
@pytest.mark.parametrize("shape", ["tail", "equals"])
def test_borders_beyond_the_short_list(
    settings: dict[str, float], shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nucleus of a top_k that the first look does not reach, and equals that straddle it."""
    monkeypatch.setattr(sampler_module, "SHORT", 4)
    monkeypatch.setattr(sampler_module, "_EQUALS", -1)
    if shape == "tail":
        head = torch.tensor([0.3, 0.25, 0.2, 0.1])
        probs = torch.cat([head, torch.linspace(0.002, 0.001, VOCAB - 4)])
    else:
        probs = torch.tensor([2.0, 1.5] + [1.0] * 8 + [0.01] * (VOCAB - 10))
    logits = probs.log()[torch.randperm(VOCAB, generator=torch.Generator().manual_seed(0))]
    bench = Bench(rows=64)
    asked = [RowSampling(seed=row, **settings) for row in range(64)]
    for row in range(64):
        bench.add(row, asked[row])
    found = bench.step(range(64), logits.expand(64, -1)).token_ids.tolist()
    kept = _kept_with_equals(logits, settings)
    for row, token in enumerate(found):
        noisy = (logits + reference_noise(asked[row], 2)).masked_fill(~kept, -math.inf)
        assert token == int(noisy.argmax())


def _kept_with_equals(logits: Tensor, settings: dict[str, float]) -> Tensor:
    """Survivors; whoever equals the last one survives with it."""
    probs = logits.double().softmax(-1)
    order = probs.sort(descending=True).values
    if top_k := int(settings.get("top_k", 0)):
        probs = probs.masked_fill(probs < order[top_k - 1] * (1 - 1e-9), 0)
    order = probs.sort(descending=True).values
    border = order[(order.cumsum(-1) >= settings.get("top_p", 1.0) * order.sum() - 1e-12)][0]
    return probs >= border * (1 - 1e-9) if "top_p" in settings else probs > 0


def test_a_large_vocabulary_matches_too() -> None:
    vocab = 30_000
    tokens = torch.zeros((8, 8), dtype=torch.int32)
    sampler = Sampler(HostDevice(), tokens, vocab)
    settings = [
        {"top_k": 20, "top_p": 0.95}, {"top_p": 0.9}, {"top_p": 0.9999}, {"top_k": 5000},
        {"top_k": 5000, "min_p": 0.3}, {"min_p": 1e-9}, {"top_k": 300, "top_p": 0.5}, {},
    ]  # fmt: skip
    asked = [RowSampling(seed=2**40 + i, **s) for i, s in enumerate(settings)]
    for row, sampling in enumerate(asked):
        assert not sampler.add(NewRow(row, [1], 1, [[]], sampling))
    logits = random_logits(8, scale=2.0, vocab=vocab)
    staged = sampler.stage(np.arange(8), np.full(8, 1))
    found = staged.run(logits.clone()).token_ids.tolist()
    assert found == [reference_token(logits[row], asked[row], 1) for row in range(8)]


def test_a_row_draws_the_same_alone_and_among_others() -> None:
    sampling = RowSampling(seed=5, top_p=0.9)
    logits = random_logits(8)
    alone, among = Bench(), Bench()
    alone.add(3, sampling)
    for row in range(8):
        among.add(row, sampling if row == 6 else RowSampling(seed=row, top_k=row * 9))
    for _ in range(5):
        lone = alone.step([3], logits[6:7]).token_ids.tolist()
        assert among.step(range(8), logits).token_ids.tolist()[6] == lone[0]


def test_seed_child_and_position_all_matter() -> None:
    logits = torch.zeros(1, VOCAB).expand(8, -1)
    bench = Bench()
    for row in range(8):
        bench.add(row, RowSampling(seed=row // 2, child_index=row % 2))
    draws = [tuple(bench.step(range(8), logits).token_ids.tolist()) for _ in range(6)]
    assert len(set(draws)) == 6
    assert len({tuple(column) for column in zip(*draws, strict=True)}) == 8


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7}, {"top_p": 0.7}, {"top_k": 5, "temperature": 2.0}]
)
def test_frequencies_follow_the_distribution(settings: dict[str, float]) -> None:
    """Chi-square over 20,000 seeded draws; the bound is the 1 - 1e-6 quantile (Wilson-Hilferty)."""
    draws, rows, vocab = 20_000, 2_000, 12
    logits = random_logits(1, seed=3, scale=1.0, vocab=vocab)[0]
    sampling = RowSampling(**settings)
    probs = (logits.double() / sampling.temperature).softmax(-1)
    if sampling.top_k:
        probs[probs < probs.sort(descending=True).values[sampling.top_k - 1]] = 0
    if sampling.top_p < 1:
        order = probs.sort(descending=True)
        probs[order.indices[order.values.cumsum(-1) - order.values >= sampling.top_p]] = 0
    probs /= probs.sum()
    sampler = Sampler(HostDevice(), torch.zeros((rows, 4), dtype=torch.int32), vocab)
    for row in range(rows):
        sampler.add(NewRow(row, [0], 1, [[]], RowSampling(seed=row, **settings)))
    counts = torch.zeros(vocab, dtype=torch.float64)
    for position in range(draws // rows):
        staged = sampler.stage(np.arange(rows), np.full(rows, position))
        tokens = staged.run(logits.expand(rows, -1).clone()).token_ids
        counts += tokens.bincount(minlength=vocab)
    assert counts[probs == 0].sum() == 0
    kept = probs > 0
    expected = probs[kept] * draws
    chi_square = ((counts[kept] - expected) ** 2 / expected).sum().item()
    freedom = int(kept.sum()) - 1
    spread = 2 / (9 * freedom)
    assert chi_square < freedom * (1 - spread + 4.75 * math.sqrt(spread)) ** 3


def test_tiny_temperatures_are_greedy() -> None:
    bench = Bench()
    bench.add(0, RowSampling(temperature=1e-30))
    logits = random_logits(1)
    assert bench.step([0], logits).token_ids.item() == logits.argmax().item()


def test_ties_go_to_the_first_index() -> None:
    bench = Bench()
    bench.add(0, RowSampling(temperature=0.0))
    logits = torch.zeros(1, VOCAB)
    logits[0, [20, 40, 60]] = 1.0
    assert bench.step([0], logits).token_ids.item() == 20


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_row_fails_alone(bad: float) -> None:
    bench, clean = Bench(), Bench()
    for row in range(8):
        sampling = RowSampling(seed=row, top_p=0.9 if row % 2 else 1.0, repetition_penalty=1.1)
        bench.add(row, sampling)
        clean.add(row, sampling)
    logits = random_logits(8)
    expected = clean.step(range(8), logits).token_ids.tolist()
    logits[2, 5] = logits[3, 6] = bad
    found = bench.step(range(8), logits)
    assert found.failed.nonzero()[:, 0].tolist() == [2, 3]
    assert found.token_ids.tolist() == [0 if row in (2, 3) else expected[row] for row in range(8)]


def test_a_row_with_everything_banned_fails() -> None:
    bench = Bench()
    bench.add(0, RowSampling(allowed_token_ids=[4], min_tokens=1, suppress_ids=[4]))
    bench.add(1, RowSampling())
    assert bench.step([0, 1], random_logits(2)).failed.tolist() == [True, False]


# ---------------------------------------------------------------------------------------------
# Log-probabilities
# ---------------------------------------------------------------------------------------------


def test_raw_logprobs_and_ranks() -> None:
    bench = Bench()
    bench.add(0, RowSampling(temperature=0.0, logprobs=3, logit_bias={7: 50.0}))
    bench.add(1, RowSampling())
    bench.add(2, RowSampling(temperature=0.0, logprobs=0))
    bench.add(3, RowSampling(temperature=0.0, logprobs=-1))
    logits = random_logits(4)
    sampled = bench.step(range(4), logits)
    assert sampled.logprobs is not None
    first, third, whole = sampled.logprobs.positions([3, 0, VOCAB])
    expected = logits.log_softmax(-1)
    order = expected[0].argsort(descending=True)
    assert first.token_ids == [7, *order[:3].tolist()]
    assert first.logprobs == pytest.approx(
        [expected[0, 7].item(), *expected[0, order[:3]].tolist()], abs=1e-5
    )
    assert first.ranks == [order.tolist().index(7) + 1, 1, 2, 3]
    assert third.token_ids == [logits[2].argmax().item()] and third.ranks == [1]
    assert len(whole.token_ids) == VOCAB + 1


def test_processed_logprobs_see_the_filters() -> None:
    bench = Bench(logprobs_mode="processed")
    bench.add(0, RowSampling(temperature=0.5, top_k=4, logprobs=6, seed=3))
    bench.add(1, RowSampling(temperature=0.0, logprobs=2, allowed_token_ids=[3, 8, 9]))
    logits = random_logits(2)
    sampled = bench.step([0, 1], logits)
    assert sampled.logprobs is not None
    drawn, greedy = sampled.logprobs.positions([6, 2])
    top = logits[0].topk(4)
    expected = (top.values / 0.5).log_softmax(-1)
    assert drawn.token_ids[1:5] == top.indices.tolist()
    assert drawn.logprobs[1:] == pytest.approx([*expected.tolist(), -math.inf, -math.inf])
    allowed = logits[1, [3, 8, 9]].log_softmax(-1)
    assert greedy.logprobs[0] == pytest.approx(allowed.max().item(), abs=1e-5)


# ---------------------------------------------------------------------------------------------
# Strict: staged state must not be read late
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampling", "more"),
    [
        (RowSampling(), False),
        (RowSampling(temperature=0.0), False),
        (RowSampling(allowed_token_ids=[3]), True),
        (RowSampling(bad_words_ids=[[3, 4]]), True),
        (RowSampling(min_tokens=2, suppress_ids=[3]), True),
        (RowSampling(logit_bias={3: 1.0}), True),
        (RowSampling(presence_penalty=0.5), True),
        (RowSampling(logprobs=0), True),
    ],
)
def test_whether_more_is_asked_costs_no_copy(
    sampling: RowSampling, more: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked at every step that decodes, before anything is staged."""
    bench = Bench()
    bench.add(1, RowSampling())
    bench.add(2, sampling)
    monkeypatch.setattr(bench.device, "to_device", None)
    for rows in ([1, 2], [1]):
        positions = np.array([bench.lengths[row] for row in rows])
        assert bench.sampler.only_chooses(np.array(rows), positions) != (more and 2 in rows)


def test_min_tokens_end() -> None:
    """Then the row asks nothing any more."""
    bench = Bench()
    bench.add(2, RowSampling(min_tokens=2, suppress_ids=[3]))
    asked = [not bench.sampler.only_chooses(np.array([2]), np.array([at])) for at in (2, 3, 4)]
    assert asked == [True, True, False]


def test_staged_steps_survive_changes_of_the_host_state() -> None:
    """Two steps are queued before the first runs, and a row is reused in between."""
    device = StrictDevice(0, 0.01)
    try:
        bench = Bench(device)
        features = {"logit_bias": {5: 2.0}, "presence_penalty": 1.0, "bad_words_ids": [[3]]}
        bench.add(0, RowSampling(seed=1, top_k=9, **features))
        expected = Bench()
        expected.add(0, RowSampling(seed=1, top_k=9, **features))
        logits = random_logits(2)
        first = bench.sampler.stage(np.array([0]), np.array([2]))
        found: list[Sampled] = []
        event = device.launch(lambda: found.append(first.run(logits[:1].clone())))
        bench.sampler.remove(0)
        works = bench.sampler.add(NewRow(0, [9], 1, [[]], RowSampling(seed=2)))
        second = bench.sampler.stage(np.array([0]), np.array([1]))
        for work in works:
            device.launch(work)
        last = device.launch(lambda: found.append(second.run(logits[1:].clone())))
        event.wait()
        last.wait()
        want = reference_token(logits[1], RowSampling(seed=2), 1)
        assert found[1].token_ids.item() == want
        assert found[0].token_ids.item() == expected.step([0], logits[:1]).token_ids.item()
    finally:
        device.close()
