"""Trying a vendor's package in a process of its own, before it is let into this one.

`python -m trimaran.platforms.trial module:Class` imports and probes it under a watchdog, and looks
for what an import has no business to do. Whether the package is any good is not asked here: what
raises, or gives an answer that cannot be true, does so harmlessly in every process.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .loading import TRIAL_SECONDS, ask, load, one_line, reason_of
from .surroundings import Surroundings

_START_SECONDS = 120.0
"""For Python and torch alone, on a busy machine with a cold disk."""


class TrialError(RuntimeError):
    """The trial itself could not be made: nothing is known about the package."""


class HarmfulPackage(RuntimeError):
    """A package whose trial went so that it is not imported again."""


def try_out(reference: str, name: str, seconds: float) -> str:
    """Why the platform `reference` must not be imported into this process; empty if it may.

    Its import and probe have `seconds`. Raises `TrialError`.
    """
    with tempfile.TemporaryDirectory(prefix="trimaran-trial-") as folder:
        records = _Records(Path(folder))
        command = [sys.executable, "-P", "-m", __name__, reference, "--name", name]
        command += ["--seconds", str(seconds), "--records", folder, "--path", json.dumps(sys.path)]
        status = _run(command, records, seconds + _START_SECONDS)
        return records.verdict(status, seconds)


def _run(command: Sequence[str], records: _Records, seconds: float) -> int:
    """The exit status. Whatever the package has started in its session ends with it."""
    with records.stdout.open("wb") as out, records.stderr.open("wb") as err:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class _Records:
    """The files by which a trial tells how it went, even when it ends by a signal."""

    def __init__(self, folder: Path) -> None:
        self.stage = folder / "stage"  # what it is at
        self.findings = folder / "findings"  # JSON, written at the end
        self.hang = folder / "hang"  # where the watchdog found it
        self.stdout = folder / "stdout"
        self.stderr = folder / "stderr"

    def verdict(self, status: int, seconds: float) -> str:
        if not self.stage.exists():
            raise TrialError(f"could not be tried: {_last_line(self.stderr)}")
        stage = self.stage.read_text()
        if self.hang.read_text():
            return f"hangs while it is {stage}: not done in {seconds:g} s{self._place()}"
        if not self.findings.exists():
            return f"{_ending(status)} while it is {stage}{_after(_last_line(self.stderr))}"
        findings: list[str] = json.loads(self.findings.read_text())
        if printed := self.stdout.read_bytes():
            shown = printed[:80].decode(errors="replace")
            findings.append(f"prints on stdout while it is imported or probed: {shown}")
        return one_line("; ".join(findings))

    def _place(self) -> str:
        """The innermost place of the main thread, from the watchdog's traceback."""
        lines = [line.strip() for line in self.hang.read_text(errors="replace").splitlines()]
        places = [line for line in lines if line.startswith("File ")]
        theirs = [line for line in places if "importlib" not in line]
        return _after((theirs or places or [""])[0].removeprefix("File "))


def _ending(status: int) -> str:
    if status >= 0:
        return f"ends the process with status {status}"
    with contextlib.suppress(ValueError):
        return f"dies of {signal.Signals(-status).name}"
    return f"dies of signal {-status}"


def _after(detail: str) -> str:
    return f" ({one_line(detail)})" if detail else ""


def _last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def main() -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("reference", help="module:Class")
    parser.add_argument("--name", default="", help="what the entry point calls it")
    parser.add_argument("--seconds", type=float, default=TRIAL_SECONDS)
    parser.add_argument("--path", type=json.loads, default=sys.path, help="sys.path, as JSON")
    parser.add_argument("--records", type=Path, help="folder for the findings; default: stdout")
    given = parser.parse_args()
    sys.path[:] = given.path
    if given.records is None:
        faulthandler.dump_traceback_later(given.seconds, exit=True)
        findings, error = _try(given.reference, given.name, None)
        print("\n".join(findings) or error or "nothing found")
        sys.stdout.flush()
        os._exit(1 if findings or error else 0)
    records = _Records(given.records)
    with records.hang.open("w") as hang:  # a thread without the GIL: it ends any hang
        faulthandler.dump_traceback_later(given.seconds, exit=True, file=hang)
        findings, _ = _try(given.reference, given.name, records.stage)
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError, ValueError):  # a package may have closed it
            sys.stdout.flush()
        records.findings.write_text(json.dumps(findings))
    os._exit(0)  # threads that it left do not hold us


def _try(reference: str, name: str, stage: Path | None) -> tuple[list[str], str]:
    """What harm an import and a probe do, and the error they end with, if any."""
    surroundings = Surroundings()
    error = ""
    findings = []
    try:
        _enter(stage, "imported")
        cls = load(reference, name)
        _enter(stage, "probed")
        ask(cls)
    except (Exception, SystemExit) as raised:  # harmless: see the top
        error = reason_of(raised)
    except BaseException as raised:  # KeyboardInterrupt and the like, which nobody would catch
        findings.append(f"raises {type(raised).__name__} while it is imported or probed")
    findings += surroundings.changes(reference.partition(":")[0].partition(".")[0])
    return findings, error


def _enter(stage: Path | None, name: str) -> None:
    if stage is not None:
        stage.write_text(name)


if __name__ == "__main__":
    main()
