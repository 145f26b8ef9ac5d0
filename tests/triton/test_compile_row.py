"""The row that compiles kernels without a card: what it must refuse, and its tables."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trimaran.kernels_cuda.portable import tuning
from trimaran.platforms.user_environment import FUSION

ROOT = Path(__file__).parents[2]
PLANTED = ROOT / "tests" / "helpers" / "planted_kernels.py"
BLOCKS = {"gemm_blocks", "moe_blocks"}  # they want floats of 8 bits
TABLES = sorted(ROOT.glob("kernels_*/tuning/*.toml"))


@pytest.mark.parametrize("architecture", ["sm_80", "gfx942"])
@pytest.mark.parametrize(
    "planted, told", [("spill", " spills "), ("shared", " bytes of shared memory"), ("none", "")]
)
def test_planted_kernels(planted: str, told: str, architecture: str) -> None:
    command = [sys.executable, str(PLANTED), architecture, planted]
    undecided = {name: value for name, value in os.environ.items() if name != FUSION}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=undecided
    )
    faults = [line for line in done.stdout.splitlines() if line.startswith(f"{architecture}: ")]
    assert done.returncode == bool(told), done.stdout + done.stderr
    assert bool(told) == any(told in fault for fault in faults)
    assert "FP_FUSION" not in done.stderr, "Triton 3.9 warns where nobody has decided"


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables_name_the_same_kernels(path: Path) -> None:
    generic = tuning.load(ROOT / "kernels_cuda" / "tuning" / "generic.toml")
    table = tuning.load(path)
    assert table.architecture == path.stem
    missing = set() if "float8_e4m3fn" in table.fp8 or "float8_e4m3fnuz" in table.fp8 else BLOCKS
    assert table.entries.keys() == generic.entries.keys() - missing
    assert all(entry.source for entries in table.entries.values() for entry in entries)


BROKEN = {
    "no architecture": ("[[a]]\nvalues = {}\nsource = 'x'", "which `architecture`"),
    "no source": ("architecture = 'x'\n[[a]]\nvalues = {}", "no 'source'"),
    "no last": ("architecture = 'x'\n[[a]]\nwhen = { n = 1 }\nvalues = {}\nsource = 'x'", "last"),
    "unreachable": (
        "architecture = 'x'\n" + "[[a]]\nvalues = {}\nsource = 'x'\n" * 2,
        "the last entry, and it alone",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_tables_are_named(name: str, tmp_path: Path) -> None:
    text, told = BROKEN[name]
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=told):
        tuning.load(path)
