"""The support matrix: rests on whole reports of today's contract, and on nothing of the machine."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trimaran.platforms.facts import Capabilities, DeviceSpec, Roofline

PATH = Path(__file__).parents[2] / "ci" / "support_matrix.py"
H200 = DeviceSpec(
    name="h200",
    title="NVIDIA H200",
    architecture="sm_90",
    memory=1 << 37,
    roofline=Roofline(4.8e12, {}, "data sheet"),
    capabilities=Capabilities(dtypes={"bfloat16": "native"}, fp8="ocp", graph_replay=True),
)
H100 = replace(H200, name="h100", title="NVIDIA H100 SXM")


@pytest.fixture
def matrix() -> ModuleType:
    spec = importlib.util.spec_from_file_location("support_matrix", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def outcome(
    level: str, status: str, detail: str = "", seconds: float = 1.0, name: str = "some/check"
) -> dict[str, Any]:
    return {
        "level": level,
        "name": name,
        "status": status,
        "detail": detail,
        "case": "",
        "seed": None,
        "seconds": seconds,
        "measured": {"us": seconds},
    }


def report(**changes: Any) -> dict[str, Any]:
    """A report as `trimaran conform` writes it."""
    values = {
        "ok": True,
        "totals": {
            "L0": {"passed": 4, "failed": 0, "skipped": 0},
            "L1": {"passed": 7, "failed": 0, "skipped": 2},
        },
        "reference": "acme",
        "device": 0,
        "seed": 0,
        "quick": False,
        "partial": False,
        "skip_budget": 0.25,
        "platform": "acme",
        "vendor": "Acme",
        "origin": "trimaran-acme 0.1.0",
        "platform_api": "0.2",
        "engine_api": "0.2",
        "engine": "0.1.0",
        "torch": "2.13.0",
        "host": "Linux x86_64",
        "devices": [{"index": 0, "name": "Acme One", "memory": 1 << 30, "architecture": ""}],
        "capabilities": {
            "dtypes": {"float32": "native", "bfloat16": "emulated"},
            "kv_dtypes": ["float32"],
            "fp8": None,
            "weight_formats": ["dense"],
            "isa": "one",
            "graph_replay": False,
            "run_ahead": 1,
        },
        "facts": {"processor": "some processor"},
        "bindings": {"linear": {"float32": "acme", "float16": "reference"}},
        "outcomes": [outcome("L1", "skipped", "no such fusion")] * 2,
        "seconds": 10.0,
    }
    return {**values, **changes}


def written(folder: Path, *reports: dict[str, Any]) -> Path:
    for one in reports:
        (folder / f"{one['platform']}.json").write_text(json.dumps(one))
    return folder


def test_levels_skips_devices_and_ops_are_shown(matrix: ModuleType, tmp_path: Path) -> None:
    text = matrix.render(matrix.read_reports(written(tmp_path, report()), "0.2"), [("cuda", H200)])
    assert "| 4 passed | 7 passed, 2 skipped | not run |" in text and "| conforms |" in text
    assert "0.1.0, API 0.2" in text
    assert "| `cuda` | trimaran | - | not run |" in text and "no report yet" in text
    assert "- `acme` L1, 2 skipped: no such fusion" in text
    assert "| one | float32, bfloat16 (emulated) | float32 | - | dense | no | 1 | [report]" in text
    assert "| sm_90 | bfloat16 | - | ocp | dense | yes | 0 | described only" in text
    assert "| `linear` | acme (float32), reference (float16) |" in text


def test_a_failure_shows(matrix: ModuleType) -> None:
    failed = {"L0": {"passed": 1, "failed": 2, "skipped": 1}}
    text = matrix.render([report(ok=False, totals=failed) | {"file": "acme.json"}], [])
    assert "| **2 of 4 failed** | not run |" in text and "**does not conform**" in text


def test_attention_and_fusions_are_those_that_pass(matrix: ModuleType) -> None:
    outcomes = [
        outcome("L1", "passed", name="attention/gqa/float32/paged/programs"),
        outcome("L1", "skipped", name="attention/gqa/float32 over bfloat16/paged/blocks"),
        outcome("L1", "passed", name="attention/gqa/float32/broken/write"),
        outcome("L1", "failed", name="attention/window/float32/broken/programs"),
        outcome("L1", "passed", name="attention/gqa/float32"),
        outcome("L1", "passed", name="fusion/acme-mlp/bfloat16"),
    ]
    text = matrix.render([report(outcomes=outcomes) | {"file": "acme.json"}], [])
    assert "| attention (all that pass) | paged |" in text
    assert "| own fusions (all that pass) | acme-mlp |" in text


def test_times_and_the_machine_change_nothing(matrix: ModuleType) -> None:
    other = report(
        seconds=99.0,
        host="Linux aarch64",
        torch="2.14.0",
        facts={"processor": "another"},
        devices=[{"index": 0, "name": "Acme Two", "memory": 1, "architecture": ""}],
        outcomes=[outcome("L1", "skipped", "no such fusion", seconds=9.0)] * 2,
    )
    first, second = (matrix.render([one | {"file": "acme.json"}], []) for one in (report(), other))
    assert first == second


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine_api": "0.1"}, "is of platform API 0.1, not 0.2"),
        ({"quick": True}, "of a part of the kit"),
        ({"partial": True}, "of a part of the kit"),
    ],
)
def test_a_report_of_another_contract_or_of_a_part_is_refused(
    matrix: ModuleType, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(matrix.Unfit, match=said) as caught:
        matrix.read_reports(written(tmp_path, report(**changes)), "0.2")
    assert "trimaran conform --platform acme --report docs/conformance/acme.json" in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("name", "architecture", "platform", "described", "run"),
    [
        ("NVIDIA H200", "sm_90", "cuda", H200, True),
        ("NVIDIA H100 80GB HBM3", "sm_90", "cuda", H200, False),
        ("NVIDIA H2000", "sm_90", "cuda", H200, False),
        ("NVIDIA H200", "sm_90", "other", H200, False),
        ("NVIDIA H200", "sm_100", "cuda", H200, False),
        ("NVIDIA H100 80GB HBM3", "sm_90", "cuda", H100, True),
        ("NVIDIA H100 PCIe", "sm_90", "cuda", H100, False),  # half of its bandwidth
    ],
)
def test_a_described_device_counts_as_run_by_a_report_of_it_alone(
    matrix: ModuleType,
    name: str,
    architecture: str,
    platform: str,
    described: DeviceSpec,
    run: bool,
) -> None:
    device = {"index": 0, "name": name, "memory": 1, "architecture": architecture}
    one = report(platform=platform, devices=[device]) | {"file": "cuda.json"}
    assert matrix.was_run("cuda", described, [one]) is run
    assert (matrix.DESCRIBED in matrix.render([one], [("cuda", described)])) is not run


def test_it_is_written_and_a_change_makes_it_stale(
    matrix: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    api = importlib.import_module("trimaran.platforms.api")
    here = api.version_text(api.PLATFORM_API)
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "REPORTS", written(tmp_path, report(engine_api=here)))
    monkeypatch.setattr(matrix, "MATRIX", tmp_path / "support.md")
    assert matrix.main(check=True) == 1, "there is none yet"
    assert matrix.main(check=False) == matrix.main(check=True) == 0
    capsys.readouterr()
    written(tmp_path, report(engine_api=here, bindings={"linear": {"float32": "other"}}))
    assert matrix.main(check=True) == 1
    captured = capsys.readouterr()
    assert "+| `linear` | other |" in captured.out and "stale" in captured.err
    written(tmp_path, report(engine_api="0.0"))
    assert matrix.main(check=True) == 1
    assert "platform API 0.0" in capsys.readouterr().err


def test_the_matrix_in_docs_is_current(matrix: ModuleType) -> None:
    assert matrix.main(check=True) == 0
