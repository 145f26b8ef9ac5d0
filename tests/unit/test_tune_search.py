"""The search for tuning tables against a clock that is a formula."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from trimaran.platforms.tune_journal import Journal, Result
from trimaran.platforms.tune_search import Job, Launches, OutOfTime, Refused, Search

AXES = {"BLOCK": (16, 32, 64, 128, 256), "SPLITS": (1, 2, 4, 8), "num_warps": (1, 2, 4, 8)}
START = {"BLOCK": 16, "SPLITS": 8, "num_warps": 4}
BEST = {"BLOCK": 128, "SPLITS": 2, "num_warps": 4}
IDENTITY = {"card": "formula"}


def separable(values: Mapping[str, int]) -> float:
    """Each axis costs by its steps from the best one, whatever the others are."""
    seconds = 1e-5
    for axis, ladder in AXES.items():
        steps = abs(ladder.index(values[axis]) - ladder.index(BEST[axis]))
        seconds *= 1 + 0.2 * steps
    return seconds


class Clock:
    """A launch answers its own cost; the clock is off by up to `noise` of it, and gets slower all
    the time, as a card that grows hot."""

    def __init__(self, noise: float = 0.0, drift: float = 0.0) -> None:
        self._random = random.Random(7)
        self._noise, self._drift = noise, drift
        self.readings = 0

    def __call__(self, launch: Callable[[], Any]) -> float:
        self.readings += 1
        slower = 1 + self._drift * self.readings
        return float(launch() * slower * (1 + self._random.uniform(-self._noise, self._noise)))


class Card:
    """Prepares launches that answer what they cost; `refuses` says which it does not take."""

    def __init__(
        self,
        cost: Callable[[Mapping[str, int]], float] = separable,
        refuses: Callable[[Mapping[str, int]], str] = lambda values: "",
    ) -> None:
        self._cost, self._refuses = cost, refuses
        self.prepared: list[dict[str, int]] = []

    def __call__(self, values: Mapping[str, int]) -> Launches:
        self.prepared.append(dict(values))
        if reason := self._refuses(values):
            raise Refused(reason)
        seconds = self._cost(values)
        return {"small": lambda: seconds, "large": lambda: 10 * seconds}


def search(
    path: Path, card: Card, clock: Clock, in_time: Callable[[], bool] = lambda: True
) -> tuple[Search, Journal, list[str]]:
    told: list[str] = []
    journal = Journal(path / "x.jsonl", IDENTITY)
    job = Job("k/0", START, AXES, card)
    return Search(job, clock, journal, in_time, told.append), journal, told


@pytest.mark.parametrize("noise, drift", [(0.0, 0.0), (0.02, 0.0), (0.0, 0.01)])
def test_the_best_of_a_separable_model_is_found(noise: float, drift: float, tmp_path: Path) -> None:
    found, journal, _ = search(tmp_path, Card(), Clock(noise, drift))
    result = found.run()
    assert result.values == BEST
    assert result.seconds / result.before == pytest.approx(
        separable(BEST) / separable(START), rel=0.05
    )
    assert journal.finished == {"k/0": result}
    every = len(AXES["BLOCK"]) * len(AXES["SPLITS"]) * len(AXES["num_warps"])
    assert result.tried < every / 3, "coordinate descent, not the product"


@pytest.mark.parametrize("seed", range(5))
def test_nothing_wins_by_noise_alone(seed: int, tmp_path: Path) -> None:
    clock = Clock(0.1)
    clock._random.seed(seed)
    result = search(tmp_path, Card(lambda values: 1e-5), clock)[0].run()
    assert result.values == START and result.before == 0
    assert result.gain > 0.01 and result.tried > 0


def test_axes_are_gone_through_until_none_helps(tmp_path: Path) -> None:
    def cost(values: Mapping[str, int]) -> float:
        larger = AXES["BLOCK"].index(values["BLOCK"]) if values["num_warps"] == 8 else 0
        return 1e-5 * (1 - 0.1 * larger) / values["num_warps"]

    result = search(tmp_path, Card(cost), Clock())[0].run()
    assert result.values == {"BLOCK": 256, "SPLITS": 8, "num_warps": 8}


def test_who_wins_has_to_do_so_twice(tmp_path: Path) -> None:
    """Values that are fast while they are new, and then no faster than the others."""

    class Fresh(Card):
        def __call__(self, values: Mapping[str, int]) -> Launches:
            if values == START:
                return {"x": lambda: 1e-5}
            readings = iter([0.5e-5] * 3)
            return {"x": lambda: next(readings, 1e-5)}

    found, journal, _ = search(tmp_path, Fresh(), Clock())
    assert found.run().values == START
    assert json.dumps(0.5) in (tmp_path / "x.jsonl").read_text(), "once they did"


def test_a_gain_below_the_least_is_none(tmp_path: Path) -> None:
    def cost(values: Mapping[str, int]) -> float:
        return 1e-5 * (1 - 0.004 * AXES["BLOCK"].index(values["BLOCK"]))

    assert search(tmp_path, Card(cost), Clock())[0].run().values == START


def test_what_is_refused_never_wins_and_is_told(tmp_path: Path) -> None:
    """Refused are here: wrong numbers, and more shared memory than there is."""

    def refuses(values: Mapping[str, int]) -> str:
        if values["SPLITS"] == 2:
            return "numbers differ"
        return "too much shared memory" if values["BLOCK"] > 64 else ""

    found, journal, told = search(tmp_path, Card(refuses=refuses), Clock())
    assert found.run().values == {"BLOCK": 64, "SPLITS": 4, "num_warps": 4}
    assert any("numbers differ" in line for line in told)
    assert any("too much shared memory" in line for line in told)
    again = Journal(tmp_path / "x.jsonl", IDENTITY)
    assert again.refusal("k/0", {"BLOCK": 128, "SPLITS": 8, "num_warps": 4})


def test_a_start_that_fails_is_no_result(tmp_path: Path) -> None:
    found, journal, _ = search(tmp_path, Card(refuses=lambda values: "no"), Clock())
    with pytest.raises(Refused, match="no"):
        found.run()
    assert not journal.finished


@pytest.mark.parametrize("torn", [False, True], ids=["between lines", "inside a line"])
def test_a_search_that_was_killed_goes_on(torn: bool, tmp_path: Path) -> None:
    whole = search(tmp_path / "whole", Card(), Clock())[0].run()
    budget = iter([True] * 4)
    found, _, _ = search(tmp_path, Card(), Clock(), lambda: next(budget, False))
    with pytest.raises(OutOfTime):
        found.run()
    path = tmp_path / "x.jsonl"
    lines = path.read_text().splitlines()
    assert len(lines) == 1 + 1 + 4, "identity, noise, four candidates"
    if torn:
        path.write_text("\n".join([*lines, lines[-1][:20]]))
    card = Card()
    result = search(tmp_path, card, Clock())[0].run()
    assert (result.values, result.tried) == (whole.values, whole.tried)
    measured = [dict(json.loads(json.loads(line)["ratio"])[1]) for line in lines[2:]]
    again = [values for values in card.prepared if values in measured]
    assert again == [{**START, "BLOCK": 128}], "of those measured before the best alone"
    assert len(path.read_text().splitlines()) > len(lines)


def test_a_journal_of_something_else_is_moved_aside(tmp_path: Path) -> None:
    search(tmp_path, Card(), Clock())[0].run()
    other = Journal(tmp_path / "x.jsonl", {"card": "another"})
    assert other.moved == tmp_path / "x.jsonl.old" and other.moved.exists()
    assert not other.finished
    same = Journal(tmp_path / "x.jsonl", {"card": "another"})
    assert same.moved is None


def test_a_journal_keeps_what_is_finished(tmp_path: Path) -> None:
    result = Result(BEST, 1e-5, 2e-5, 0.01, 12)
    Journal(tmp_path / "x.jsonl", IDENTITY).finish("k/0", result)
    assert Journal(tmp_path / "x.jsonl", IDENTITY).finished == {"k/0": result}


def test_a_broken_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    Journal(path, IDENTITY).refuse("k/0", START, "no")
    path.write_text("{\n" + path.read_text())
    with pytest.raises(ValueError, match="x.jsonl: line 1"):
        Journal(path, IDENTITY)
