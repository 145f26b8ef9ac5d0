"""The search for better values of a tuning table's entry: coordinate descent against a clock.

A candidate is a neighbour of the best values so far along one axis. It is timed in turns with them,
so that a card that grows hot slows both, and wins by more than the noise or not at all: the noise
is what the start differs from itself by. What was measured is in a journal; a search that goes on
takes it from there. Nothing here knows a card.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from .tune_journal import Journal, Result, Values

Launches = Mapping[str, Callable[[], Any]]
"""By the label of the case."""
ROUNDS = 3
"""Timings of each of two candidates that are compared."""
SAME = 5
"""Comparisons of the start with itself."""
LEAST_GAIN = 0.01
"""A card repeats itself better than it stays the same from day to day."""


class Timer(Protocol):
    def __call__(self, launch: Callable[[], Any]) -> float:
        """Seconds that `launch` takes on the device."""


class Refused(Exception):
    """Values that cannot be taken, and why."""


class CardLost(Refused):
    """Values after which the device answers no more."""


class OutOfTime(Exception):
    """The time that the search was given is over."""


@dataclass(frozen=True, slots=True)
class Job:
    """An entry to be tuned. `prepare` makes values' launches, a case each, and raises `Refused` for
    those that cannot run or compute something else."""

    name: str
    start: Values
    axes: Mapping[str, tuple[int, ...]]
    prepare: Callable[[Values], Launches]


class Search:
    """Of one job. `in_time` says whether to go on, and is asked before each candidate; `tell` is
    given what is done, for people."""

    def __init__(
        self,
        job: Job,
        timer: Timer,
        journal: Journal,
        in_time: Callable[[], bool] = lambda: True,
        tell: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._job = job
        self._timer = timer
        self._journal = journal
        self._in_time = in_time
        self._tell = tell
        self._kept: dict[str, Launches] = {}
        self._tried: set[str] = set()
        self._left: set[str] = set()

    def run(self) -> Result:
        """Raises `OutOfTime`; `Refused` where the start itself cannot be taken; `CardLost`."""
        job = self._job
        gain = max(LEAST_GAIN, 2 * self._noise())
        best = self._descend(gain)
        seconds, before = 0.0, 0.0
        if best != job.start:
            ratio, seconds, before = self._compare(best, job.start, SAME)
            best = best if ratio < 1 - gain else job.start
        result = Result(best, seconds, before, gain, len(self._tried))
        self._journal.finish(job.name, result)
        return result

    def _noise(self) -> float:
        start = self._job.start
        known = self._journal.recall(self._job.name, start, start)
        if known is None:
            ratios = [self._compare(start, start, ROUNDS)[0] for _ in range(SAME)]
            known = max(abs(ratio - 1) for ratio in ratios)
            self._journal.note(self._job.name, start, start, known)
        return known

    def _descend(self, gain: float) -> Values:
        """Along one axis after the other, as far as it gets better, until none helps."""
        best, improved = self._job.start, True
        while improved:
            improved = False
            for axis in self._job.axes:
                for direction in (1, -1):
                    before, best = best, self._walk(best, axis, direction, gain)
                    if best != before:
                        improved = True
                        break  # behind is what has just lost
        return best

    def _walk(self, best: Values, axis: str, direction: int, gain: float) -> Values:
        while (other := self._neighbour(best, axis, direction)) is not None:
            if _words(other) in self._left:
                break  # noise must not lead round in a circle
            ratio = self._ratio(other, best)
            if ratio is None or ratio >= 1 - gain:
                break
            self._left.add(_words(best))
            best = other
        return best

    def _neighbour(self, values: Values, axis: str, direction: int) -> Values | None:
        ladder = self._job.axes[axis]
        at = ladder.index(values[axis]) + direction
        return {**values, axis: ladder[at]} if 0 <= at < len(ladder) else None

    def _ratio(self, values: Values, best: Values) -> float | None:
        """How long `values` take for each second of `best`; None: they are refused."""
        name, journal = self._job.name, self._journal
        self._tried.add(_words(values))
        if journal.refusal(name, values):
            return None
        if (known := journal.recall(name, values, best)) is not None:
            return known
        if not self._in_time():
            raise OutOfTime
        self._keep(best)
        try:
            ratio = self._compare(values, best, ROUNDS)[0]
        except Refused as refused:
            journal.refuse(name, values, str(refused))
            self._tell(f"{_words(values)}: {refused}")
            if isinstance(refused, CardLost):
                raise
            return None
        journal.note(name, values, best, ratio)
        self._tell(f"{_words(values)}: {ratio:.3f} of the best's time")
        return ratio

    def _compare(self, values: Values, other: Values, rounds: int) -> tuple[float, float, float]:
        """The time of `values` over that of `other`, the geometric mean over the cases; then the
        seconds of all cases of each."""
        both = self._launches(other), self._launches(values)
        others, mine, logarithms = 0.0, 0.0, []
        for case in both[0]:
            turns = [[self._timer(one[case]) for one in both] for _ in range(rounds)]
            b, a = (statistics.median(column) for column in zip(*turns, strict=True))
            others, mine = others + b, mine + a
            logarithms.append(math.log(a / b))
        return math.exp(statistics.fmean(logarithms)), mine, others

    def _launches(self, values: Values) -> Launches:
        if not self._kept:  # what the start computes is what all others have to
            self._kept[_words(self._job.start)] = self._job.prepare(self._job.start)
        if _words(values) not in self._kept:
            self._kept[_words(values)] = self._job.prepare(values)
        return self._kept[_words(values)]

    def _keep(self, values: Values) -> None:
        """Of all launches, which hold tensors, those of `values` alone."""
        self._kept = {_words(values): self._launches(values)}


def _words(values: Values) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
