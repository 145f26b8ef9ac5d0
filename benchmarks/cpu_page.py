"""Measure all that docs/cpu.md says, in parts, and write its plots and the page.

    .venv/bin/python benchmarks/cpu_page.py --list           # the parts, their minutes and commands
    .venv/bin/python benchmarks/cpu_page.py decode mixed32   # these parts, or none: every one

Each part writes one file. One that was finished at this commit with this command is not measured
again (`--again`), so that what was interrupted goes on where it stopped. The machine should have
nothing else to do. `--page` measures nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import canary
import page
import plot
import run
from rich.console import Console

RESULTS = page.HERE / "results"
ROOT = page.HERE.parent
OURS = "trimaran trimaran:int8 trimaran:int4"
LLAMA = "llama_cpp:bf16 llama_cpp:q8_0 llama_cpp:q4_0"
OPENVINO = "openvino:bf16"
console = Console(stderr=True)


@dataclass(frozen=True)
class Part:
    """One run of a script of this folder. `minutes`: about what 2 cores with AVX2 take."""

    name: str
    minutes: float
    file: str
    words: tuple[str, ...]

    @property
    def output(self) -> Path:
        return RESULTS / self.file

    @property
    def command(self) -> list[str]:
        """As it is run in the root of the checkout."""
        return [*self.words, "--output", str(self.output.relative_to(ROOT))]

    def is_done(self, commit: str) -> bool:
        if not self.output.exists():
            return False
        found = json.loads(self.output.read_text())
        return (
            bool(commit)
            and not commit.endswith("+")  # other changes may have been measured
            and found.get("finished", False)
            and found.get("commit") == commit
            and found["command"] == " ".join(self.command)
        )


def parts(flags: list[str]) -> list[Part]:
    """What is measured on a processor with these instructions (`canary.describe_machine`)."""
    names = {"amx": "amx_bf16", "avx512": "avx512f", "avx2": "avx2"}
    widest = next((name for name, flag in names.items() if flag in flags), None)
    if widest is None:
        sys.exit("The page is about processors with AVX2 and more; this one has none.")

    def compare(name: str, minutes: float, rounds: tuple[int, int], peers: str, *more: str) -> Part:
        least, most = map(str, rounds)
        words = ["benchmarks/run.py", "--rounds", least, "--max-rounds", most, *more]
        words += ["--peers", *peers.split()]
        return Part(name, minutes, f"cpu_{widest}_{name}.json", tuple(words))

    alone = ("--workloads", *page.CAPPED_WORKLOADS)
    # A cap that takes nothing from the processor: the run decides the goals with and without it.
    capped = page.takes_nothing(widest, flags)
    decode = [*alone, "--isa", widest] if capped else alone
    found = [compare("decode", 9, (2, 3), f"{OURS} {LLAMA} {OPENVINO} openvino:int8", *decode)]
    for cap in ("avx2", "avx512"):
        if names[cap] in flags and not (capped and cap == widest):
            under = (*alone, "--isa", cap)
            found.append(compare(f"cap_{cap}", 8, (2, 3), f"{OURS} {LLAMA}", *under))
    int8 = "trimaran:int8,kv_cache_dtype=int8"
    peers = f"llama_cpp:bf16 {OPENVINO}"
    return [
        *found,
        compare("mixed32", 14, (3, 3), f"trimaran {int8} {peers}", "--workloads", "mixed32"),
        compare("start", 2, (2, 3), f"trimaran trimaran:int8 {peers}", "--workloads", "start"),
        compare("shared_prefix", 4, (1, 1), f"trimaran {peers}", "--workloads", "shared_prefix"),
        # In runs of their own: they take minutes for what others do in seconds, or to load.
        compare("transformers", 3, (1, 1), "trimaran transformers", "--workloads", "batch1"),
        compare("vllm_cpu", 10, (1, 1), "trimaran vllm_cpu", "--workloads", "batch1"),
        Part("host_time", 0.5, "scheduler_overhead.json", ("benchmarks/scheduler_overhead.py",)),
        compare("growth", 22, (1, 1), "trimaran", "--workloads", "growth"),
    ]


def measure(chosen: list[Part], again: bool) -> int:
    """Run what is not done yet, one after the other; how many failed."""
    failed, commit = 0, run.commit()
    for part in chosen:
        if not again and part.is_done(commit):
            console.print(f"{part.name}: {part.file} is of this commit already")
            continue
        console.print(f"{part.name}: up to {part.minutes:g} minutes", style="bold")
        begin = time.monotonic()
        done = subprocess.run([sys.executable, *part.command], cwd=ROOT)
        took = f"{(time.monotonic() - begin) / 60:.1f} minutes"
        console.print(f"{part.name}: {f'FAILED after {took}' if done.returncode else took}")
        failed += bool(done.returncode)
    return failed


def write(every: list[Part]) -> None:
    """Plots of the comparisons, and the page of all files that are there."""
    files = [part.output for part in every if part.output.exists()]
    for file in files:
        report = json.loads(file.read_text())
        if "summary" in report:
            plot.plot(report, file.with_suffix(".png"))
    page.write(files)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    every = parts(canary.describe_machine()["isa"])
    names = [part.name for part in every]
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(names))
    parser.add_argument("--list", action="store_true", help="say what would run")
    parser.add_argument("--again", action="store_true", help="also what is done at this commit")
    parser.add_argument("--page", action="store_true", help="only write the plots and the page")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(names):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    chosen = [part for part in every if part.name in (args.parts or names)]
    if args.list:
        for part in chosen:
            print(f"{part.name}, up to {part.minutes:g} minutes:\n  {' '.join(part.command)}")
        return 0
    failed = 0 if args.page else measure(chosen, args.again)
    write(every)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
