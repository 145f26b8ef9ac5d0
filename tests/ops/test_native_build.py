"""The native library as it is built: every instruction set computes, runs where it was asked for
and keeps to itself; what cannot be loaded says why."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.native import build_of, needs_native, no_compiler

import trimaran
from trimaran.kernels_cpu import library as native
from trimaran.kernels_cpu.build import LIBRARY, BuildError, compiler
from trimaran.kernels_cpu.library import ISAS, Library, NativeUnavailable

pytestmark = [
    needs_native,
    pytest.mark.timeout(900),  # the first to need a build waits for a minute of compiling
]


@pytest.fixture(scope="module")
def emulated() -> Path:
    return build_of("emulated-library")


def in_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


# ---------------------------------------------------------------------------------------------
# Every instruction set
# ---------------------------------------------------------------------------------------------


def test_every_kernel_gives_the_same_by_every_instruction_set_and_number_of_threads():
    """Where the processor lacks the wide sets, they are emulated."""
    here = native.library().detected
    wide = here != "avx2" and not native.library().emulated
    driver = build_of("driver" if wide else "emulated-driver")
    done = subprocess.run(
        [driver],
        env={**os.environ, "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr
    assert f"up to {here if wide else 'amx (emulated)'}\n" in done.stdout


def linear(library: Library, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    (rows, k), n = x.shape, len(weight)
    packed = torch.empty(-(-n // 32) * 32 * k, dtype=weight.dtype)
    pack = library.call("pack_dense", weight.dtype)
    pack.input[0], pack.output[0] = weight.data_ptr(), packed.data_ptr()
    pack.n[:3] = n, k, k
    library.run_one(pack)
    out = torch.empty(rows, n, dtype=x.dtype)
    call = library.call("linear_dense", x.dtype, rows)
    call.input[:2] = x.data_ptr(), packed.data_ptr()
    call.output[0] = out.data_ptr()
    call.n[:4] = n, k, k, n
    library.run_one(call)
    return out


@pytest.mark.parametrize("rows", [1, 4, 5, 16, 31, 200])
@pytest.mark.parametrize("isa", ISAS[1:])
def test_a_capped_library_runs_that_instruction_set(emulated: Path, isa: str, rows: int):
    library = Library(emulated, isa)
    assert (library.detected, library.isa, library.about) == ("amx", isa, f"{isa} (emulated)")
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, 544, generator=generator).bfloat16()
    weight = torch.randn(96, 544, generator=generator).bfloat16()
    before = {one: library.count("linear_dense", one) for one in ISAS[1:]}
    result = linear(library, x, weight)
    ran = {one: library.count("linear_dense", one) - before[one] for one in ISAS[1:]}
    assert ran == {one: int(one == isa) for one in ISAS[1:]}
    expected = x.double() @ weight.double().T
    torch.testing.assert_close(result.double(), expected, rtol=2**-8, atol=2e-4 * 544**0.5)


def test_a_cap_above_the_processor_takes_what_it_has():
    library = Library(Path(native.__file__).parent / native.LIBRARY, "amx")
    assert library.isa == library.detected
    with pytest.raises(NativeUnavailable, match="TRIMARAN_CPU_ISA is 'sse'; it must be one of"):
        Library(Path(native.__file__).parent / native.LIBRARY, "sse")


def test_the_environment_names_the_library_and_the_cap(emulated: Path):
    about = "from trimaran.kernels_cpu.library import about; print(about())"
    chosen = {native.OTHER: str(emulated), native.CAP: "avx512"}
    assert in_process(about, **chosen) == "avx512 (emulated)"
    assert "missing.so (TRIMARAN_CPU_LIBRARY names it)" in in_process(
        about, **{native.OTHER: "missing.so"}
    )


@pytest.mark.real
def test_the_kit_runs_with_the_instruction_set_it_is_asked_for(emulated: Path, tmp_path: Path):
    """Whole runs are rows of ci/matrix.yaml."""
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "trimaran", "conform", "--platform", "cpu", "--isa", "amx"]
    command += ["--only", "L1/add/*", "--quick", "--report", str(report)]
    environment = {name: value for name, value in os.environ.items() if name != native.OTHER}
    if native.library().detected != "amx":
        refused = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert refused.returncode == 2
        assert "--isa amx: the kernels have" in refused.stderr
    environment[native.OTHER] = str(emulated)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernels: amx (emulated)" in done.stdout
    assert json.loads(report.read_text())["facts"]["kernels"] == "amx (emulated)"


# ---------------------------------------------------------------------------------------------
# The code
# ---------------------------------------------------------------------------------------------

NEEDS_AVX512 = re.compile(r"%zmm|%[xy]mm(1[6-9]|2[0-9]|3[01])\b|%k[0-7]\b|%tmm")
WIDE_NAMESPACE = re.compile(r"\btrimaran::(avx512|avx512_bf16|amx)::")


@pytest.fixture(scope="module")
def instructions() -> list[tuple[str, str]]:
    """(function, instruction) of the package's own library."""
    if shutil.which("objdump") is None:
        pytest.skip("no objdump (Debian: binutils)")
    path = Path(native.__file__).parent / native.LIBRARY
    listing = subprocess.run(
        ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return list(_by_function(listing))


def _by_function(listing: str) -> Iterator[tuple[str, str]]:
    function = ""
    for line in listing.splitlines():
        if begins := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            function = begins[1]
        elif "\t" in line:
            yield function, line.partition("\t")[2]


def test_what_is_not_for_avx512_runs_without_it(instructions: list[tuple[str, str]]):
    """An inline function that two objects share is linked from one of them: it may bring the other
    one's instructions along."""
    leaked = {
        function
        for function, text in instructions
        if NEEDS_AVX512.search(text) and not WIDE_NAMESPACE.search(function)
    }
    assert not leaked
    names = {match[1] for name, _ in instructions if (match := WIDE_NAMESPACE.search(name))}
    assert names == {"avx512", "avx512_bf16", "amx"}
    wide = sum(bool(NEEDS_AVX512.search(text)) for _, text in instructions)
    assert wide > 1000, "the pattern finds what it looks for"


def test_tiles_are_configured_from_a_constant_and_multiplied(instructions: list[tuple[str, str]]):
    """gcc drops the stores of a configuration that is put together on the stack."""
    tiles = re.compile("ldtilecfg|tile(load|store|zero|release)|tdp")
    of_tiles = [(name, text) for name, text in instructions if tiles.match(text)]
    assert of_tiles and all("trimaran::amx::" in name for name, _ in of_tiles)
    for name in ("tdpbf16ps", "tdpbssd", "tilerelease"):
        assert any(text.startswith(name) for _, text in of_tiles), name
    configured = [text for _, text in of_tiles if text.startswith("ldtilecfg")]
    assert configured and all("trimaran::amx::TILE_CONFIGURATION" in text for text in configured)


# ---------------------------------------------------------------------------------------------
# What cannot be loaded
# ---------------------------------------------------------------------------------------------


OTHER_VERSION = """
extern "C" int trimaran_version() { return 0; }
extern "C" long trimaran_call_bytes() { return 208; }
"""


@pytest.mark.parametrize("source", ["", OTHER_VERSION])
def test_a_library_of_another_version_is_refused(tmp_path: Path, source: str):
    path = tmp_path / "native.so"
    file = tmp_path / "native.cpp"
    file.write_text(source)
    if reason := no_compiler():
        pytest.skip(reason)
    subprocess.run([*compiler(), "-shared", "-fPIC", file, "-o", path], check=True)
    with pytest.raises(NativeUnavailable, match="build it again") as refused:
        Library(path)
    assert str(path) in str(refused.value)


def test_what_is_no_library_is_refused(tmp_path: Path):
    path = tmp_path / "native.so"
    path.write_bytes(b"nothing")
    with pytest.raises(NativeUnavailable, match="do not load"):
        Library(path)


@pytest.mark.parametrize("command", ["/nonexistent", ""])
def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, command: str):
    monkeypatch.setenv("CXX", command)
    with pytest.raises(BuildError, match="no C\\+\\+ compiler"):
        compiler()


def test_what_an_earlier_build_left_is_not_installed_where_this_one_fails(tmp_path: Path):
    left = tmp_path / "lib" / "trimaran" / "kernels_cpu" / LIBRARY
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of another version")
    folders = [f"--build-lib={tmp_path / 'lib'}", f"--build-temp={tmp_path / 'temp'}"]
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", *folders],
        cwd=Path(trimaran.__file__).parent,
        env={**os.environ, "CXX": "/nonexistent"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "are left out: no C++ compiler" in done.stderr and not left.exists()
