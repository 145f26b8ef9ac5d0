"""The kit fails every platform that has a bug, at the level that is named for it."""

from __future__ import annotations

from collections.abc import Iterator

import buggy_platforms
import pytest
import torch

from trimaran.conformance import l0_contract
from trimaran.conformance.base import Subject
from trimaran.conformance.levels import LEVELS
from trimaran.conformance.report import FAILED, Outcome
from trimaran.conformance.worker import Request, answers

BELOW = [level.name for level in LEVELS if level.name < "L3"]
SEEN_BY_A_PROCESS = ("ProbeStartsThread", "buggy_import:ImportPatches")
"""Bugs for which a fresh process must be asked; it takes seconds."""

ONE_OF_EACH_LEVEL = ("MovesOneByOne", "Overrun", "AttentionForgottenRegion")
"""Found on every change; the others where slow tests run, too."""


def reference(name: str) -> str:
    return name if ":" in name else f"{buggy_platforms.__name__}:{name}"


def first_failure(subject: Subject) -> Outcome | None:
    """Level by level, as far as the first check that fails."""
    for level in BELOW:
        for message in answers(Request(subject, level)):
            if "outcome" in message:
                outcome = Outcome(**message["outcome"])
                if outcome.status == FAILED:
                    return outcome
    return None


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.getfixturevalue("name") not in SEEN_BY_A_PROCESS:
        nothing: dict[str, list[str]] = {"import": [], "probe": []}
        monkeypatch.setattr(l0_contract, "purity", lambda reference: nothing)


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in ONE_OF_EACH_LEVEL else pytest.mark.slow)
        for name in buggy_platforms.FOUND_BY
    ],
)
def test_the_kit_finds(name: str) -> None:
    found = first_failure(Subject(reference(name), quick=True))
    assert found is not None, f"{name} passes"
    expected = buggy_platforms.FOUND_BY[name]
    assert found.full_name.startswith(expected), f"{found.full_name}: {found.detail}"


def test_there_are_enough_of_them_at_each_level() -> None:
    found = [name.partition("/")[0] for name in buggy_platforms.FOUND_BY.values()]
    counts = {level: found.count(level) for level in BELOW}
    assert counts["L0"] >= 12 and counts["L1"] >= 12 and counts["L2"] >= 3, counts
