"""A box with a card in one command: what it has, whether all is right on it, and how fast it is.

    python3 benchmarks/gpu_row.py --platform cuda [--part NAME …] [--total SECONDS] [--out DIR]
    python3 benchmarks/gpu_row.py --platform cuda --page     # the last run's figures as markdown

Wants torch, triton, transformers, pytest and what they bring; no network, and nothing installed of
ours. Parts run one after the other, each in a process of its own, for `--total` seconds together
and a part for as long as PARTS says. What was found is in OUT/PART.json piece by piece, so the same
command, given again, goes on where the last one was stopped, and does nothing once all is done;
`--again` begins anew what failed. Another checkout has another OUT. At the end: a table, and
OUT/report.json, which is ready to be copied to benchmarks/results/cuda_CARD.json.

`--tiny` is the same in small: parts can be tried without a card (`--platform cpu --tiny`).
Exit status 0: all done and right; 1: something failed; 2: time was over before all was done.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "workers"))
sys.path.insert(0, str(Path(__file__).parent))

from gpu import report
from gpu.part import BROKEN, CARDS, DONE, FAILED, UNFINISHED, Bench, Record, run_pieces

CHECKOUT = Path(__file__).resolve().parent.parent
PACKAGE = ("core", "platforms", "kernels_*", "conformance", "benchmarks", "tests")
PARTS: dict[str, tuple[str, float]] = {
    "facts": ("facts.facts", 120),
    "canary": ("timing.canary", 120),
    "parity": ("parity.parity", 300),
    "device": ("checks.device_tests", 300),
    "throughput": ("engine.throughput", 300),
    "batch1": ("engine.batch_one", 180),
    "kernels": ("kernels.kernels", 420),
    "steady": ("steady.steady", 240),
    "start": ("start.start", 240),
    "sweep": ("engine.sweep", 300),
    "long": ("engine.long_context", 300),
    "peer": ("peer.peer", 420),
    "kernel-tests": ("checks.kernel_tests", 500),
    "conform": ("checks.conform", 500),
}
"""Part → what yields its pieces, and the longest it may take, in seconds. All percentages want the
canary; the tests that compile most come last."""
GRACE = 20.0
"""Seconds between a part's own end of time and that of its process."""
LEAST = 20.0
"""Seconds without which no part is begun."""
MOST_PROCESSES = 12


def run_part(part: str, args: argparse.Namespace, link: Path, seconds: float) -> None:
    """The part's process, and another one as long as the device takes them with it."""
    end = time.monotonic() + seconds
    for _ in range(MOST_PROCESSES):
        left = end - time.monotonic()
        if left <= 0 or run_process(part, args, link, left) not in (BROKEN, None):
            return


def run_process(part: str, args: argparse.Namespace, link: Path, seconds: float) -> int | None:
    """Its exit status; None: a signal ended it. Everything it started ends with it."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", part]
    command += ["--platform", args.platform, "--out", str(args.out), "--seconds", str(seconds)]
    command += ["--tiny"] * args.tiny
    with (args.out / f"{part}.log").open("a") as log:
        process = subprocess.Popen(
            command,
            cwd=CHECKOUT,
            env=environment(args.platform, link),
            stderr=log,
            start_new_session=True,
        )
        try:
            status = process.wait(seconds + GRACE)
        except subprocess.TimeoutExpired:
            print(f"  {part}: ended after {seconds + GRACE:.0f} s", flush=True)
            return UNFINISHED
        finally:
            end_group(process)
    if status not in (DONE, FAILED, UNFINISHED, BROKEN):
        print(f"  {part}: its process ended with {status}; see {args.out / part}.log", flush=True)
    return None if status < 0 else status


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Its process and those that it started (its group bears its id)."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        process.wait()


def environment(platform: str, link: Path) -> dict[str, str]:
    """`link` holds `trimaran`, this checkout under the package's name; tests bring helpers. On a
    card kernels are compiled whatever the tests' own default is."""
    paths = [str(link), str(CHECKOUT / "tests"), os.environ.get("PYTHONPATH", "")]
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    found |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    return found | ({"TRITON_INTERPRET": "0"} if platform in CARDS else {})


def child(args: argparse.Namespace) -> int:
    """One part, in this process."""
    module, function = PARTS[args.child][0].split(".")
    record = Record(args.out, args.child)
    deadline = time.monotonic() + args.seconds
    bench = Bench(args.platform, args.out, args.tiny, deadline)
    try:
        pieces = getattr(importlib.import_module(f"gpu.{module}"), function)(bench)
        return run_pieces(bench, record, pieces)
    except Exception as error:  # of the part itself, no piece of it
        record.faults["the part"] = "".join(traceback.format_exception(error))[-6000:]
        record.done = True
        record.save()
        print(f"  {args.child}: FAILED: {error}", flush=True)
        return FAILED


def run(args: argparse.Namespace) -> int:
    """All parts that are not done, and the report; the exit status."""
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.total
    parts = args.part or list(PARTS)
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder)
        (link / "trimaran").symlink_to(CHECKOUT)
        for part in parts:
            record = Record(args.out, part)
            if args.again:
                record.forget_faults()
            left = min(PARTS[part][1], end - time.monotonic() - GRACE)
            if not record.done and left >= LEAST:
                print(f"{part} (at most {left:.0f} s)", flush=True)
                run_part(part, args, link, left)
    found = report.collect(args.platform, args.out, list(PARTS), args.tiny)
    report.show(found)
    return exit_status([Record(args.out, part) for part in parts])


def exit_status(records: list[Record]) -> int:
    if any(record.faults for record in records):
        return FAILED
    if all(record.done for record in records):
        return DONE
    print("Not all is done: the same command goes on from here.", flush=True)
    return UNFINISHED


def default_out(platform: str, tiny: bool) -> Path:
    """A folder for this platform and what is checked out, changes included."""
    digest = hashlib.sha256()
    files = (file for folder in PACKAGE for file in CHECKOUT.glob(f"{folder}/**/*"))
    for file in sorted(file for file in files if file.suffix in (".py", ".toml", ".h", ".cpp")):
        digest.update(file.read_bytes())
    name = f"{platform}{'-tiny' * tiny}-{digest.hexdigest()[:12]}"
    return CHECKOUT / ".ci" / "cache" / "gpu_row" / name


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--platform", default="cuda")
    parser.add_argument("--out", type=Path, help="where results are (.ci/cache/gpu_row/…)")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this (repeatable)")
    parser.add_argument("--total", type=float, default=1500.0, help="seconds for all parts")
    parser.add_argument("--again", action="store_true", help="what failed is tried again")
    parser.add_argument("--tiny", action="store_true", help="small models, few rounds")
    parser.add_argument("--page", action="store_true", help="print the report as markdown")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=500.0, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.out = (args.out or default_out(args.platform, args.tiny)).resolve()
    if args.child:
        return child(args)
    if args.page:
        print(report.page(report.collect(args.platform, args.out, list(PARTS), args.tiny)))
        return DONE
    return run(args)


if __name__ == "__main__":
    sys.exit(main())
