"""The kit fails every platform that has a bug, at the level that is named for it."""

from __future__ import annotations

from collections.abc import Iterator

import buggy_devices  # noqa: F401  (registers its platforms)
import buggy_platforms  # noqa: F401
import pytest
import torch
from seeded_bugs import FOUND_BY

from trimaran.conformance import l0_contract
from trimaran.conformance.base import Subject
from trimaran.conformance.levels import LEVELS, level
from trimaran.conformance.report import FAILED, Outcome
from trimaran.conformance.worker import Request, answers

BELOW = [one.name for one in LEVELS if one.name < "L3"]
SEEN_BY_A_PROCESS = ("buggy_platforms:ProbeStartsThread", "buggy_import:ImportPatches")
"""Bugs for which a fresh process must be asked; it takes seconds."""

ONE_OF_EACH_LEVEL = (
    "buggy_devices:MovesOneByOne",
    "buggy_platforms:Overrun",
    "buggy_platforms:AttentionForgottenRegion",
)
"""Found on every change; the others where slow tests run, too."""


def first_failure(subject: Subject) -> Outcome | None:
    """Level by level, as far as the first check that fails."""
    for name in BELOW:
        for message in answers(Request(subject, name)):
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
        for name in FOUND_BY
    ],
)
def test_the_kit_finds(name: str) -> None:
    found = first_failure(Subject(name, quick=True))
    assert found is not None, f"{name} passes"
    assert found.full_name == FOUND_BY[name], found.detail


def test_there_are_enough_of_them_at_each_level() -> None:
    found = [name.partition("/")[0] for name in FOUND_BY.values()]
    counts = {name: found.count(name) for name in BELOW}
    assert counts["L0"] >= 12 and counts["L1"] >= 12 and counts["L2"] >= 3, counts


NO_BUG_FOR = {
    "L0/device/run_ahead": "what would fail it fails order or to_device, which queue more, before",
    "L1/special of copies": "as special, of ops that are compared bit by bit without it as well",
}
"""Kinds of checks that no platform here fails first, and why not."""

COPIES = ("embed", "embed_packed", "gather_rows", "copy", "sample")


def kind(full_name: str) -> str:
    """A check's name without what multiplies it: implementation, dtype, shape."""
    level, *parts = full_name.split("/")
    if level == "L0":
        return full_name
    if level == "L2":
        return f"{level}/{parts[0]}"
    if parts[0] == "attention":
        return f"L1/attention/{parts[4]}" if len(parts) > 3 else "L1/attention"
    if parts[-1] == "product":
        return "L1/packer of codes"
    if parts[0] in ("packer", "fusion"):
        return f"L1/{parts[0]}"
    if parts[-1] == "special":
        return "L1/special of copies" if parts[0] in COPIES else "L1/special"
    return "L1/supports" if parts[-1] == "supports" else f"L1/{parts[0]}"


def test_every_kind_of_check_has_been_seen_to_fail() -> None:
    subject = Subject("strict", quick=True)
    listed = {
        kind(f"{name}/{check.name}") for name in BELOW for check in level(name).checks(subject)
    }
    seen = set(map(kind, FOUND_BY.values()))
    assert listed - seen == NO_BUG_FOR.keys()
    assert seen - listed == {"L1/fusion", "L1/packer of codes"}, "of what strict has not"
