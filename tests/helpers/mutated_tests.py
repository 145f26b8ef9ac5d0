"""Tests of the portable kernels, run with errors planted in a copy of them.

To start torch and Triton takes longer than a test of a kernel. So one process (this file as a
program) has them and everything but the kernels imported, and forks for every run: what is planted
is imported after the fork, under the names that the kernels always have.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TextIO

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels_cuda"
PORTABLE = "trimaran.kernels_cuda.portable"
BEFORE = (
    *("torch", "torch.distributed.tensor", "triton", "helpers.interpreter"),
    *(f"trimaran.platforms.{name}" for name in ("draw", "philox", "ops", "compute")),
    *("trimaran.platforms.attention_reference", "trimaran.core.sampler.penalties"),
)
"""What tests and kernels import besides the kernels."""
SECONDS = 100
"""For one test, before it counts as stuck."""


class Edit(NamedTuple):
    """`old`, which stands once in the function of that name, becomes `new`."""

    function: str
    old: str
    new: str


def plant(path: Path, edits: Sequence[Edit]) -> None:
    """Edit a file in place. ValueError for a text that is not there exactly once."""
    for function, old, new in edits:
        text = path.read_text(encoding="utf-8")
        body = source_of(text, function)
        if body.count(old) != 1 or text.count(body) != 1:
            raise ValueError(
                f"{path.name}: {old!r} stands {body.count(old)} times in {function}, not once"
            )
        path.write_text(text.replace(body, body.replace(old, new)), encoding="utf-8")


def source_of(text: str, function: str) -> str:
    """ValueError where there is no such function."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            lines = text.splitlines(keepends=True)
            return "".join(lines[node.lineno - 1 : node.end_lineno])
    raise ValueError(f"there is no function {function}")


@dataclass(frozen=True)
class Result:
    """`status`: pytest's exit status, or minus the signal that ended the run. `failures`: of each
    test that failed its name, the phase and the exception."""

    status: int
    failures: list[list[str]]
    output: str

    @property
    def caught(self) -> bool:
        """Did a test say that a result is wrong? (One that could not run says nothing.)"""
        said = [(phase, error) for _, phase, error in self.failures]
        return self.status == 1 and said == [("call", "AssertionError")]


class MutatedTests:
    """The process that forks, as seen by who asks it."""

    def __init__(self) -> None:
        own = ("PYTEST_", "COV_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        env |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=ROOT,
            env=env,
            text=True,
        )

    def __enter__(self) -> MutatedTests:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait()

    def run(self, tests: Sequence[str], file: str = "", edits: Sequence[Edit] = ()) -> Result:
        """Run tests, given by their pytest ids, until one fails; with `edits` in a `file` of the
        kernels. RuntimeError where the process that forks has ended."""
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder) / KERNELS.name
            shutil.copytree(KERNELS, package, ignore=shutil.ignore_patterns("__pycache__"))
            if edits:
                plant(package / "portable" / file, edits)
            asked, answers = self._process.stdin, self._process.stdout
            assert asked is not None and answers is not None
            print(json.dumps({"package": str(package), "tests": tests}), file=asked, flush=True)
            answer = answers.readline()
        if not answer:
            raise RuntimeError(f"the process that forks ended: {self._process.wait()}")
        return Result(**json.loads(answer))


# ---------------------------------------------------------------------------------------------
# The process that forks
# ---------------------------------------------------------------------------------------------


class Recorder:
    """A plugin of pytest's that remembers what failed, and how."""

    def __init__(self) -> None:
        self.failures: list[list[str]] = []

    def pytest_exception_interact(self, node: Any, call: Any, report: Any) -> None:
        when = getattr(report, "when", "collect")
        self.failures.append([report.nodeid, when, call.excinfo.type.__name__])


def run_tests(package: str, tests: list[str]) -> tuple[int, list[list[str]]]:
    """In the fork."""
    importlib.import_module("trimaran.kernels_cuda").__path__[:] = [package]
    found = importlib.import_module(PORTABLE).__file__
    assert found is not None and Path(found).is_relative_to(package), found
    recorder = Recorder()
    options = ["-x", "-q", "--tb=native", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    return int(
        pytest.main([*options, f"--timeout={SECONDS}", *tests], plugins=[recorder])
    ), recorder.failures


def fork(package: str, tests: list[str]) -> Result:
    """The answer to one question."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as answer:
        child = os.fork()
        if not child:
            _run_and_exit(package, tests, output, answer)
        _, waited = os.waitpid(child, 0)
        for file in (output, answer):
            file.seek(0)
        status, failures = json.loads(answer.read() or "[null, []]")
        if status is None:
            status = os.waitstatus_to_exitcode(waited)
        return Result(status, failures, output.read()[-4000:])


def _run_and_exit(package: str, tests: list[str], output: TextIO, answer: TextIO) -> None:
    """What goes wrong before pytest runs has exit status 70."""
    code = 70
    try:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        json.dump(run_tests(package, tests), answer)
        answer.flush()
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    pytest.main(["--version"])  # imports its plugins
    sys.path.insert(0, str(ROOT / "tests"))
    for name in BEFORE:
        importlib.import_module(name)
    assert not any(name.startswith(PORTABLE) for name in sys.modules), "kernels before the fork"
    for line in sys.stdin:
        result = fork(**json.loads(line))
        print(json.dumps(result.__dict__), file=answers, flush=True)


if __name__ == "__main__":
    main()
