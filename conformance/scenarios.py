"""What engines are run with, how their tokens are judged, and how a failure is made small."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .base import Failed, Subject
from .engines import Found, RowShape, dtype_of, open_session, request
from .models import MIN_MARGIN, Case, oracle

ROUNDED = 1.0
"""In a 16-bit type tokens may differ from those of fp32, but each must be one whose fp32
log-probability is at most this much below the best one's."""

SHRINK_SECONDS = 8.0


@dataclass(frozen=True)
class Scenario:
    """Prompts to run on an engine with some settings. `rounds`: how often all of them are run, one
    round after the other. `shuffled`: they arrive in an order drawn from this seed, a few between
    steps."""

    model: str
    cases: tuple[Case, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 1
    shuffled: int | None = None

    def __str__(self) -> str:
        lines = [
            f"model: {self.model} (conformance/models.py)",
            f"settings: {dict(self.settings)}",
            f"rounds: {self.rounds}, arrivals: "
            + ("all at once" if self.shuffled is None else f"shuffled by {self.shuffled}"),
        ]
        for case in self.cases:
            lines.append(f"prompt of {len(case.prompt)} tokens: {list(case.prompt)}")
            lines.append(f"  expected: {list(case.tokens)}")
        return "\n".join(lines)

    def smaller(self) -> Iterator[Scenario]:
        """Simpler ones, the boldest cuts first."""
        cases = self.cases
        if len(cases) > 1:
            half = len(cases) // 2
            yield dataclasses.replace(self, cases=cases[:half])
            yield dataclasses.replace(self, cases=cases[half:])
        if len(cases) <= 4:
            for i in range(len(cases) if len(cases) > 1 else 0):
                yield dataclasses.replace(self, cases=cases[:i] + cases[i + 1 :])
        count = len(cases[0].tokens)
        for fewer in {1, count // 2, count - 1} - {0, count}:
            cut = [dataclasses.replace(case, tokens=case.tokens[:fewer]) for case in cases]
            yield dataclasses.replace(self, cases=tuple(cut))
        if self.rounds > 1:
            yield dataclasses.replace(self, rounds=self.rounds - 1)
        longest = max(range(len(cases)), key=lambda i: len(cases[i].prompt))
        prompt = cases[longest].prompt
        for length in {len(prompt) // 2, len(prompt) - 1} - {0}:
            shorter = oracle(self.model).case(prompt[:length], count)
            if shorter.margin >= MIN_MARGIN:
                cut = [*cases[:longest], shorter, *cases[longest + 1 :]]
                yield dataclasses.replace(self, cases=tuple(cut))


@dataclass
class Ran:
    """What a scenario yielded: each round's sequences in the order of the cases, and what shows
    that the wanted road was taken."""

    rounds: list[list[Found]] = field(default_factory=list)
    largest_batch: int = 0
    plans: list[list[RowShape]] = field(default_factory=list)
    kv_left: int = 0

    @property
    def last(self) -> list[Found]:
        return self.rounds[-1]

    @property
    def num_preemptions(self) -> int:
        return sum(found.num_preemptions for one in self.rounds for found in one)


def execute(subject: Subject, scenario: Scenario) -> Ran:
    """Run it on the platform under test."""
    ran = Ran()
    count = len(scenario.cases[0].tokens)
    requests = [request(str(i), case.prompt, count) for i, case in enumerate(scenario.cases)]
    with open_session(subject, scenario.model, **scenario.settings) as session:
        for number in range(scenario.rounds):
            seed = scenario.shuffled
            arrivals = None if seed is None else random.Random(f"{seed}/{number}")
            found = session.run(requests, arrivals)
            ran.rounds.append([found[str(i), 0] for i in range(len(requests))])
        ran.largest_batch, ran.plans = session.largest_batch, session.plans
        ran.kv_left = session.client.engine.scheduler.stats().kv_used
    return ran


def mistake(subject: Subject, scenario: Scenario, ran: Ran) -> str:
    """What is wrong with the tokens, in words; empty if nothing is."""
    exact = dtype_of(subject) == "float32"
    for number, found_round in enumerate(ran.rounds):
        where = f" in round {number + 1}" if scenario.rounds > 1 else ""
        for case, found in zip(scenario.cases, found_round, strict=True):
            who = f"{scenario.model}: the prompt of {len(case.prompt)} tokens{where}"
            if found.error is not None:
                return f"{who} ended with an error: {found.error}"
            if len(found.tokens) != len(case.tokens):
                return f"{who} yielded {len(found.tokens)} tokens instead of {len(case.tokens)}"
            wrong = _first_difference(case, found) if exact else _first_bad(scenario, case, found)
            if wrong:
                return f"{who} {wrong}"
    if ran.kv_left:
        return f"{scenario.model}: {ran.kv_left} KV blocks are in use after the last request"
    return ""


def _first_difference(case: Case, found: Found) -> str:
    for i, (want, got) in enumerate(zip(case.tokens, found.tokens, strict=True)):
        if want != got:
            return (
                f"differs from the reference at generated token {i}: expected {want}, got {got} "
                f"(position {len(case.prompt) + i})"
            )
    return ""


def _first_bad(scenario: Scenario, case: Case, found: Found) -> str:
    logprobs = oracle(scenario.model).logprobs([*case.prompt, *found.tokens])
    for i, got in enumerate(found.tokens):
        row = logprobs[len(case.prompt) + i - 1]
        regret = float(row.max() - row[got])
        if not regret <= ROUNDED:
            return (
                f"has a token {got} at {i} that the fp32 reference finds {regret:.3g} less likely "
                f"(in log-probability) than the best one; {ROUNDED} is allowed"
            )
    return ""


def judge(subject: Subject, scenario: Scenario) -> Ran:
    """Run a scenario; raises `Failed` with the smallest one found that fails as well."""
    try:
        ran = execute(subject, scenario)
        wrong = mistake(subject, scenario, ran)
    except Failed:
        raise
    except Exception as error:
        raise Failed(
            f"{scenario.model}: the engine failed: {type(error).__name__}: {error}",
            case=str(shrink(scenario, lambda smaller: _fails(subject, smaller))),
            seed=subject.seed,
        ) from error
    if wrong:
        small = shrink(scenario, lambda smaller: _fails(subject, smaller))
        raise Failed(wrong, case=str(small), seed=subject.seed)
    return ran


def _fails(subject: Subject, scenario: Scenario) -> bool:
    try:
        return bool(mistake(subject, scenario, execute(subject, scenario)))
    except Exception:  # the failure that is being made small may be one
        return True


def shrink(
    scenario: Scenario, fails: Callable[[Scenario], bool], seconds: float | None = None
) -> Scenario:
    """The smallest scenario that still fails, as far as it is found in `seconds`."""
    deadline = time.monotonic() + (SHRINK_SECONDS if seconds is None else seconds)
    shrinking = True
    while shrinking:
        shrinking = False
        for smaller in scenario.smaller():
            if time.monotonic() > deadline:
                return scenario
            if fails(smaller):
                scenario, shrinking = smaller, True
                break
    return scenario
