"""The target matrix and its runner."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]

TARGETS = [
    "check",
    "golden-api",
    "strict",
    *(f"cpu-{isa}" for isa in ("avx2", "avx512", "amx")),
    *(f"cuda-compile-sm_{arch}" for arch in (80, 89, 90, 100, 120)),
    *(f"rocm-compile-{arch}" for arch in ("gfx90a", "gfx942", "gfx950", "gfx1100")),
    "triton-numerics",
    "triton-planted",
    "cuda-device",
    "rocm-device",
    "tp2",
    "image-cpu",
    "image-lint",
]


@pytest.fixture
def matrix(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "ci"))
    return importlib.import_module("matrix")


def make_row(matrix: ModuleType, **changes: object):
    fields = {"about": "", "needs": "none", "inputs": ("core/**",), "run": "true"}
    return matrix.Row("row", **{**fields, **changes})


def test_every_target_has_a_row(matrix: ModuleType) -> None:
    assert set(TARGETS) <= set(matrix.load_rows())


def test_inputs_are_flat_and_match_something_where_the_row_exists(matrix: ModuleType) -> None:
    for row in matrix.load_rows().values():
        assert all(isinstance(glob, str) for glob in row.inputs), row.name
        unknown = matrix.fingerprint(row, [])
        if not row.planned:
            files = matrix.repository_files(ROOT)
            assert matrix.fingerprint(row, files) != unknown, row.name


@pytest.mark.parametrize(("run", "status"), [("true", 0), ("false; true", 1), ("false | true", 1)])
def test_a_row_reports_its_command(matrix: ModuleType, run: str, status: int) -> None:
    assert matrix.run_row(make_row(matrix, run=run)) == status


def test_a_planned_row_says_so_and_exits_3(
    matrix: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert matrix.run_row(make_row(matrix, status="planned", issue="that one")) == 3
    assert "planned" in capsys.readouterr().err


def test_a_row_without_its_hardware_exits_4(
    matrix: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(matrix, "ANY_GPU", (str(tmp_path / "none"),))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert matrix.run_row(make_row(matrix, needs="gpu")) == 4
    assert matrix.run_row(make_row(matrix, needs="builder")) == 4


def test_planned_wants_an_issue(matrix: ModuleType) -> None:
    with pytest.raises(ValueError, match="come together"):
        make_row(matrix, status="planned")


def test_the_fingerprint_follows_inputs_only(
    matrix: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    (tmp_path / "core").mkdir()
    names = [Path("core/a.py"), Path("README.md")]
    for name in names:
        (tmp_path / name).write_text("1")
    row = make_row(matrix)
    before = matrix.fingerprint(row, names)
    (tmp_path / "README.md").write_text("2")
    assert matrix.fingerprint(row, names) == before
    (tmp_path / "core/a.py").write_text("2")
    assert matrix.fingerprint(row, names) != before


def test_rows_on_one_core_run_two_at_a_time(
    matrix: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each of two waits for the other; the third, which waits for nobody, starts when they end."""
    meet = "touch {}; for _ in $(seq 200); do [ -e {} ] && exit; sleep 0.05; done; exit 1"
    rows = {
        "a": make_row(matrix, run=meet.format("a", "b"), cores=1),
        "b": make_row(matrix, run=meet.format("b", "a"), cores=1),
        "c": make_row(matrix, run="[ -e a ] && [ -e b ]"),
    }
    monkeypatch.setattr(matrix, "load_rows", lambda: rows)
    monkeypatch.setattr(matrix, "ROOT", tmp_path)
    monkeypatch.setattr(matrix, "PASSED", tmp_path / "passed")
    monkeypatch.setattr(matrix, "repository_files", lambda root: [])
    assert matrix.run_full(again=True) == 0
