"""Runs rows of ci/matrix.yaml. Called by ci/row (one row), ci/full (all without hardware) and
.ci/run (those that have a quick form, in that form).

Exit status: 0 passed, 1 failed, 2 no such row, 3 the row is planned and cannot run yet,
4 the row needs what this machine does not have.
"""

import argparse
import fnmatch
import functools
import hashlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import yaml
from sources import repository_files

ROOT = Path(__file__).resolve().parents[1]
MATRIX = ROOT / "ci" / "matrix.yaml"
PASSED = ROOT / ".ci" / "cache" / "rows"
OK, FAILED, UNKNOWN, PLANNED, NO_HARDWARE = range(5)
ANY_GPU = ("/dev/nvidiactl", "/dev/kfd")
IMAGE_BUILDER = "buildah"  # without a daemon; see ci/docker/build


@dataclass(frozen=True)
class Row:
    name: str
    about: str
    needs: str
    inputs: tuple[str, ...]
    run: str
    quick: str = ""
    cores: int = 2
    status: str = ""
    issue: str = ""

    def __post_init__(self) -> None:
        if self.needs not in ("none", "gpu", "builder"):
            raise ValueError(f"row {self.name}: needs is {self.needs!r}; none, gpu or builder")
        if self.cores not in (1, 2):
            raise ValueError(f"row {self.name}: cores is {self.cores!r}; 1 or 2")
        if self.status not in ("", "planned"):
            raise ValueError(f"row {self.name}: status is {self.status!r}; planned, or leave it")
        if bool(self.status) != bool(self.issue):
            raise ValueError(f"row {self.name}: `status: planned` and `issue` come together")

    @property
    def planned(self) -> bool:
        return self.status == "planned"


def flatten(globs: list[str | list[str]]) -> tuple[str, ...]:
    """An alias inside a list nests it: one level is taken away."""
    nested = ([entry] if isinstance(entry, str) else entry for entry in globs)
    return tuple(glob for group in nested for glob in group)


def load_rows() -> dict[str, Row]:
    rows = yaml.safe_load(MATRIX.read_text(encoding="utf-8"))["rows"]
    return {
        name: Row(name, **{**entry, "inputs": flatten(entry["inputs"])})
        for name, entry in rows.items()
    }


def missing_hardware(row: Row) -> str:
    """What the row needs and this machine lacks, or the empty string."""
    if row.needs == "gpu" and not any(Path(device).exists() for device in ANY_GPU):
        return f"no GPU: none of {', '.join(ANY_GPU)}"
    if row.needs == "builder" and not shutil.which(IMAGE_BUILDER):
        return f"no image builder: {IMAGE_BUILDER} is not installed"
    return ""


def fingerprint(row: Row, files: list[Path]) -> str:
    """A hash over the row's command, the Python that runs it, and its inputs."""
    digest = hashlib.sha256(repr((row.run, sys.version_info[:3])).encode())
    for name in files:
        if any(fnmatch.fnmatch(name.as_posix(), glob) for glob in row.inputs):
            content = hashlib.sha256((ROOT / name).read_bytes()).hexdigest()
            digest.update(f"{name}\0{content}\n".encode())
    return digest.hexdigest()


def run_row(row: Row, quick: bool = False, log: IO[str] | None = None) -> int:
    """Its exit status. `log`: where its output goes, in place of this process's own."""
    if row.planned:
        print(f"{row.name}: planned, cannot run yet; it waits for: {row.issue}", file=sys.stderr)
        return PLANNED
    missing = missing_hardware(row)
    if missing:
        print(f"{row.name}: skipped, {missing}", file=sys.stderr)
        return NO_HARDWARE
    path = f"{ROOT / '.venv' / 'bin'}:{os.environ.get('PATH', '')}"
    command = row.quick if quick else row.run
    print(f"{row.name}: {command}", flush=True)
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT if log else None,
        check=False,
    )
    return FAILED if result.returncode else OK


def run_full(again: bool) -> int:
    """All rows that need no hardware; those with unchanged inputs are not run again. Neighbours
    that keep one core busy run two at a time."""
    PASSED.mkdir(parents=True, exist_ok=True)
    table: list[tuple[str, str, float]] = []
    for cores, rows in itertools.groupby(load_rows().values(), lambda row: row.cores):
        with ThreadPoolExecutor(2 // cores) as pool:
            table += pool.map(functools.partial(_result_of, again=again), rows)
    print(f"\n{'row':22} {'result':15} seconds")
    for name, result, seconds in table:
        print(f"{name:22} {result:15} {seconds:7.1f}")
    return FAILED if any(result == "FAILED" for _, result, _ in table) else OK


def _result_of(row: Row, again: bool) -> tuple[str, str, float]:
    """Its name, what became of it, and the seconds it took. A row on one core is heard when it is
    over: another one runs beside it."""
    start = time.perf_counter()
    mark = PASSED / row.name
    inputs = fingerprint(row, repository_files(ROOT))
    if row.planned or row.needs != "none":
        result = "planned" if row.planned else f"needs a {row.needs}"
    elif not again and mark.exists() and mark.read_text() == inputs:
        result = "unchanged"
    elif (_run_aside if row.cores == 1 else run_row)(row) == OK:
        mark.write_text(inputs)
        result = "ok"
    else:
        mark.unlink(missing_ok=True)
        result = "FAILED"
    return row.name, result, time.perf_counter() - start


def _run_aside(row: Row) -> int:
    with tempfile.TemporaryFile("w+") as log:
        status = run_row(row, log=log)
        log.seek(0)
        print(f"\n--- {row.name}\n{log.read()}", flush=True)
    return status


def run_quick() -> int:
    """The quick forms; all of them, whatever fails. Two at a time: each is one thread's work."""
    rows = [row for row in load_rows().values() if row.quick]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(functools.partial(run_row, quick=True), rows)
        failed = [row.name for row, result in zip(rows, results, strict=True) if result != OK]
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return FAILED if failed else OK


def list_rows() -> int:
    for row in load_rows().values():
        state = f"planned ({row.issue})" if row.planned else f"needs {row.needs}"
        print(f"{row.name:22} {state:50} {row.about}")
    return OK


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="ci")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("row", help="run one row, or list them all")
    one.add_argument("name", nargs="?")
    commands.add_parser("quick", help="run the rows that have a quick form, in that form")
    everything = commands.add_parser("full", help="run every row that needs no hardware")
    everything.add_argument("--again", action="store_true", help="unchanged rows too")
    arguments = parser.parse_args()
    if arguments.command == "full":
        return run_full(arguments.again)
    if arguments.command == "quick":
        return run_quick()
    if arguments.name is None:
        return list_rows()
    row = load_rows().get(arguments.name)
    if row is None:
        print(f"no row {arguments.name!r} in ci/matrix.yaml; ci/row lists them", file=sys.stderr)
        return UNKNOWN
    return run_row(row)


if __name__ == "__main__":
    sys.exit(main())
