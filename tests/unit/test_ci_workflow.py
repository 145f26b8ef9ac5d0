"""The workflow of the public CI has a place for every row of the matrix, and for no other."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yaml"
VENDORS = {"cuda": "nvidia", "rocm": "amd"}

Place = dict[str, Any]


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "ci"))
    return importlib.import_module("matrix")


def jobs() -> dict[str, Place]:
    return yaml.safe_load(WORKFLOW.read_text(encoding="utf-8"))["jobs"]


def places() -> Iterator[tuple[str, str, Place]]:
    """Each row that the workflow names, its job, and what stands beside it."""
    for name, job in jobs().items():
        chosen = job["strategy"]["matrix"]
        for row in chosen.get("row", []):
            yield row, name, {}
        for entry in chosen.get("include", []):
            yield entry["row"], name, entry


def test_the_workflow_names_the_rows_of_the_matrix(matrix: ModuleType) -> None:
    assert {row for row, _, _ in places()} == set(matrix.load_rows())


def test_a_row_runs_where_what_it_needs_is(matrix: ModuleType) -> None:
    job_for = {"none": "row", "builder": "image", "gpu": "device"}
    rows = matrix.load_rows()
    assert {row: job for row, job, _ in places()} == {
        name: job_for[row.needs] for name, row in rows.items()
    }


def test_rows_for_a_card_go_to_its_vendor() -> None:
    entries = {row: entry for row, job, entry in places() if job == "device"}
    assert set(entries) == {f"{hull}-device" for hull in VENDORS}
    for hull, vendor in VENDORS.items():
        entry = entries[f"{hull}-device"]
        assert (entry["vendor"], entry["extra"]) == (vendor, hull)
    assert jobs()["device"]["runs-on"] == ["self-hosted", "${{ matrix.vendor }}"]
    assert "pull_request" in jobs()["device"]["if"]


def test_only_rows_are_run() -> None:
    """No command of a row is repeated in the workflow."""
    for name, job in jobs().items():
        assert job["timeout-minutes"] <= 120
        assert "ci/row" in "".join(step.get("run", "") for step in job["steps"]), name


def test_the_oldest_python_runs_every_row_and_the_newer_ones_the_tests() -> None:
    chosen = jobs()["row"]["strategy"]["matrix"]
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    supported = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)
    newer = [entry["python"] for entry in chosen["include"] if entry["row"] == "cpu"]
    assert chosen["python"] + newer == supported
