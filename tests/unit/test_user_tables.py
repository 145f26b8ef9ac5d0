"""A tuning table of the user's own: written, found by the hulls, refused where it is another's."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import gpu_answers as answers
from helpers.gpu_answers import fake_pynvml

from trimaran.cli import tune
from trimaran.cli.main import main
from trimaran.core.errors import PlatformError
from trimaran.kernels_cuda.portable import tuning
from trimaran.kernels_cuda.portable.spaces import SPACES, axes_of
from trimaran.kernels_cuda.portable.tuning import Entry, Table, dump, fingerprint, load
from trimaran.platforms.cuda import CudaPlatform
from trimaran.platforms.gpu_cards import Card, Survey
from trimaran.platforms.gpu_kernels import table_for
from trimaran.platforms.gpu_user_table import table_in_use, user_table_path

ROOT = Path(tuning.__file__).parents[2]
BOXED = sorted(ROOT.glob("kernels_*/tuning/*.toml"))
OWN = {"ROWS": 2, "BLOCK": 512, "num_warps": 8}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


class OneH200(CudaPlatform):
    @classmethod
    def survey(cls) -> Survey:
        return Survey((Card("GPU-1", "NVIDIA H200", 1 << 37, "sm_90"),))


def own_table(architecture: str = "sm_90") -> Table:
    """As `trimaran tune` makes one: of the box's with other values in an entry."""
    box = dataclasses.replace(
        table_for(architecture), architecture=architecture, kernels=fingerprint()
    )
    return box.with_entry("add", 0, Entry({}, OWN, 'measured: "1.5 us" \\ µ'))


def write(table: Table, architecture: str = "sm_90") -> Path:
    path = user_table_path(architecture)
    assert path is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump(table), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", BOXED, ids=lambda path: path.stem)
def test_every_table_is_written_as_it_was_read(path: Path, tmp_path: Path) -> None:
    table = dataclasses.replace(load(path), kernels="0123")
    again = tmp_path / "again.toml"
    again.write_text(dump(table), encoding="utf-8")
    assert load(again) == table


@pytest.mark.parametrize("path", BOXED, ids=lambda path: path.stem)
def test_the_spaces_are_of_the_tables_kernels(path: Path) -> None:
    table = load(path)
    assert set(SPACES) >= table.entries.keys()
    for kernel, entries in table.entries.items():
        for entry in entries:
            axes = axes_of(kernel, entry.values, {})
            assert axes and all(entry.values[name] in axes[name] for name in axes)
            left = {name for name in entry.values if name.isupper()} - axes.keys()
            assert left <= {"BF16_ADD", "SPLIT_K"}, "a constant that nothing would tune"


def test_a_users_table_is_taken_by_the_hull(caplog: pytest.LogCaptureFixture) -> None:
    assert OneH200().kernel_table.path is None
    path = write(own_table())
    hull = OneH200()
    assert hull.kernel_table.path == path
    assert hull.kernel_table.table == load(path)
    assert hull.kernel_table.table.pick("add", size=4096, rows=1) == OWN
    assert str(path) in hull.describe()["kernels"]
    assert not caplog.records


def test_a_relatives_table_can_be_made_ones_own() -> None:
    path = write(own_table("sm_86"), "sm_86")
    assert table_for("sm_86").architecture == "sm_89"
    assert table_in_use("sm_86").path == path


def _other(**changes: object) -> Callable[[Table], Table]:
    return lambda table: dataclasses.replace(table, **changes)  # type: ignore[arg-type]


def _without_add(table: Table) -> Table:
    entries = {kernel: found for kernel, found in table.entries.items() if kernel != "add"}
    return dataclasses.replace(table, entries=entries)


STALE: dict[str, tuple[Callable[[Table], Table], str]] = {
    "other kernels": (_other(kernels="0123456789abcdef"), "other kernels (0123456789abcdef)"),
    "no kernels": (_other(kernels=""), "it does not say which"),
    "other architecture": (_other(architecture="sm_80"), "it is for sm_80, and the card is sm_90"),
    "other floats": (_other(fp8=()), "`fp8`"),
    "missing kernel": (_without_add, "differ in their kernels: add"),
    "other sizes": (
        lambda table: table.with_entry(
            "rope", 0, dataclasses.replace(table.entries["rope"][0], when={"dim": 64})
        ),
        "[[rope]] is for other sizes",
    ),
    "missing constant": (
        lambda table: table.with_entry("add", 0, Entry({}, {"ROWS": 1, "num_warps": 4}, "x")),
        "[[add]] is for other sizes, or sets other constants",
    ),
}


@pytest.mark.parametrize("name", STALE)
def test_a_stale_table_is_refused_in_a_line(name: str, caplog: pytest.LogCaptureFixture) -> None:
    change, told = STALE[name]
    path = write(change(own_table()))
    with caplog.at_level(logging.WARNING):
        hull = OneH200()
        used = hull.kernel_table
    assert used.path is None and used.table is table_for("sm_90")
    (line,) = [record.getMessage() for record in caplog.records]
    assert str(path) in line and told in line and "trimaran tune" in line
    assert told in hull.describe()["kernels"]


@pytest.mark.parametrize(
    "text", ["architecture = ", "architecture = 'x'\nadd = 3", "architecture = 'x'\n[[add]]"]
)
def test_a_broken_table_is_refused_in_a_line(text: str) -> None:
    path = write(own_table())
    path.write_text(text)
    used = table_in_use("sm_90")
    assert used.path is None and str(path) in used.refused


def test_the_fingerprint_is_of_the_kernels_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found() -> str:
        return fingerprint.__wrapped__()

    for name in ("norm.py", "cases.py", "spaces.py"):
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(tuning, "__file__", str(tmp_path / "tuning.py"))
    first = found()
    (tmp_path / "cases.py").write_text("2")
    (tmp_path / "spaces.py").write_text("2")
    assert found() == first
    (tmp_path / "norm.py").write_text("2")
    assert found() != first


def test_the_table_in_use_is_listed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(own_table())
    monkeypatch.setattr(tune, "find_hull", lambda name: OneH200())
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["tune", "--list", "--kernel", "add"]) == 0
    shown = capsys.readouterr().out
    assert "ROWS 2, BLOCK 512, num_warps 8" in shown and "on this machine" in shown
    assert "rms_norm" not in shown


@pytest.mark.parametrize(
    "name, told",
    [(None, "cuda: "), ("rocm", "rocm: "), ("cpu", "cpu is no platform with Triton kernels")],
)
def test_without_a_card_there_is_one_line(
    name: str | None, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    monkeypatch.setitem(__import__("sys").modules, "amdsmi", None)
    with pytest.raises(PlatformError, match="no card to tune for") as caught:
        tune.find_hull(name)
    assert told in caught.value.message and "\n" not in caught.value.message


def test_a_card_that_cannot_be_opened_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pynvml", fake_pynvml([answers.H200]))
    monkeypatch.setattr(tune, "find_hull", lambda name: CudaPlatform())
    assert main(["tune", "--device", "3"]) == 1
    assert "--device: cuda has 1 devices" in capsys.readouterr().err
    assert main(["tune"]) == 1
    assert "NVIDIA H200 cannot be opened" in capsys.readouterr().err
