"""Levels L3 to L5 of the kit: `cpu` passes them, and each platform with a bug that only engines,
groups or servers meet fails the check named for it, and none of L0 to L2, which try parts alone."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from buggy_engine_platforms import BUGS

from trimaran.conformance import l3_engine, scenarios
from trimaran.conformance.base import Failed, Subject
from trimaran.conformance.levels import LEVELS, level
from trimaran.conformance.models import Case, cases, describe, oracle
from trimaran.conformance.report import FAILED, PASSED, SKIPPED, Outcome
from trimaran.conformance.runner import run_kit
from trimaran.conformance.scenarios import Scenario, judge, shrink
from trimaran.conformance.worker import Request, answers

HERE = Path(__file__).parent
WITH_PROCESSES = ("L4/", "L5/server/")
IN_PROCESS = [name for name, at in BUGS.items() if not "/".join(at).startswith(WITH_PROCESSES)]
SLOW = (
    "TablesByFirstBlockPlatform",
    "RoundsWidePlatform",
    "SmallNumbersPlatform",
    "LosesDeviceMemoryPlatform",
    "KeepsItsContextPlatform",
    "StaleTablesPlatform",
    "StaleMetadataPlatform",
    "LargestStepPlatform",
    "ThreadsStayPlatform",
    "LosesMemoryPlatform",
)
HANGING = ("LossHangsPlatform",)


def subject(name: str) -> Subject:
    return Subject(f"buggy_engine_platforms:{name}", quick=True)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(scenarios, "SHRINK_SECONDS", 2.0)
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    monkeypatch.setenv("PYTHONPATH", path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def outcomes(one: Subject, name: str, *only: str) -> list[Outcome]:
    messages = answers(Request(one, name, tuple(f"{name}/{check}" for check in only)))
    return [Outcome(**message["outcome"]) for message in messages if "outcome" in message]


# ---------------------------------------------------------------------------------------------
# Bugs
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
        for name in IN_PROCESS
        if name not in HANGING
    ],
)
def test_a_bug_that_engines_meet(name: str) -> None:
    at, check = BUGS[name]
    (found,) = outcomes(subject(name), at, check)
    assert found.status == FAILED, f"{name} passes {at}/{check}"
    if at == "L3" and check in ("models", "batches", "step_limits"):
        assert "settings:" in found.case and "expected:" in found.case
        assert found.seed == 0


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in BUGS if name not in IN_PROCESS])
def test_a_bug_that_groups_or_servers_meet(name: str) -> None:
    at, check = BUGS[name]
    (found,) = outcomes(subject(name), at, check)
    assert found.status == FAILED, f"{name} passes {at}/{check}"


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("name", HANGING)
def test_a_bug_that_hangs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kit's process is ended, and says what hung."""
    monkeypatch.setattr(sys, "path", [str(HERE), *sys.path])
    at, check = BUGS[name]
    report = run_kit(subject(name), [level(at)], (f"{at}/{check}",))
    (found,) = report.failures
    assert found.full_name == f"{at}/{check}"
    assert "did not end within" in found.detail


@pytest.mark.slow
@pytest.mark.parametrize("name", BUGS)
def test_no_level_of_parts_fails(name: str) -> None:
    """Otherwise the bug would be one of a part, and say nothing about engines and servers."""
    below = [one.name for one in LEVELS if one.name < "L3"]
    failed = [
        one.full_name for at in below for one in outcomes(subject(name), at) if one.status == FAILED
    ]
    assert not failed


# ---------------------------------------------------------------------------------------------
# The kit itself
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "cpu",
        "strict",
        "buggy_engine_platforms:CompiledPlatform",
        "buggy_engine_platforms:AnySizePlatform",
        "buggy_engine_platforms:LargeBlocksPlatform",
        "buggy_engine_platforms:AlignedPlatform",
    ],
)
def test_engines_on_our_platforms_pass(name: str) -> None:
    found = outcomes(Subject(name, quick=True), "L3")
    assert [(one.full_name, one.detail) for one in found if one.status != PASSED] == []
    assert len(found) >= 14


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize("name", ["cpu", "strict"])
@pytest.mark.parametrize("at", ["L4", "L5"])
def test_groups_and_servers_on_our_platforms_pass(at: str, name: str) -> None:
    found = outcomes(Subject(name, quick=True), at)
    assert [(one.full_name, one.detail) for one in found if one.status == FAILED] == []
    assert [one for one in found if one.status == PASSED]


def test_no_group_meets_on_a_single_device() -> None:
    """The level says why it is skipped, and required checks are none of it."""
    found = outcomes(subject("OneOfItsOwnPlatform"), "L4")
    assert found and {one.status for one in found} == {SKIPPED}
    assert all("the platform has 1" in one.detail for one in found)


def test_models_prove_something() -> None:
    """Their tokens differ, and none was close."""
    found = cases("llama", (9, 24, 49), 12, 7)
    figures = describe(found)
    assert figures["distinct tokens"] >= 0.75 * figures["tokens"]
    assert figures["smallest margin"] >= 1e-4
    assert cases("llama", (9, 24, 49), 12, 7) == found


def test_a_wrong_expectation_fails_and_is_made_small() -> None:
    """The oracle is believed, not the engine: with one token changed the same run fails."""
    first, second, third = cases("qwen3", (9, 24, 49), 12, 7)
    tokens = (*second.tokens[:3], (second.tokens[3] + 1) % 1000, *second.tokens[4:])
    wrong = dataclasses.replace(second, tokens=tokens)
    with pytest.raises(Failed, match="generated token 3: expected") as caught:
        judge(Subject("cpu"), Scenario("qwen3", (first, wrong, third)))
    assert caught.value.case.count("prompt of") == 1


def test_log_probabilities_that_are_missing_fail() -> None:
    with pytest.raises(Failed, match="here: 0 positions have log-probabilities, not 2"):
        l3_engine._compare([], torch.zeros(3, 9), [4, 5], "here", "float32")


def test_shrinking_keeps_what_fails() -> None:
    made = tuple(oracle("llama").case(range(3, 3 + length), 8) for length in (4, 9, 17))

    def fails(scenario: Scenario) -> bool:
        return any(len(case.prompt) >= 5 and len(case.tokens) >= 3 for case in scenario.cases)

    small = shrink(Scenario("llama", made), fails, seconds=20.0)
    (case,) = small.cases
    assert (len(case.prompt), len(case.tokens)) == (5, 3)
    assert isinstance(case, Case)
