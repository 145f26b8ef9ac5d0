"""What all parts found, in one table beside what is wanted, one JSON and one page of markdown."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .part import Found, Record

CHECKOUT = Path(__file__).resolve().parents[2]
LONG_TOKENS = 262_144
Results = dict[str, dict[str, Found]]
Judged = tuple[float, float | None]
"""A figure, and its percentage of the limit."""


@dataclass(frozen=True)
class Goal:
    """A figure that is wanted; `find` gives it, or None where it was not measured."""

    title: str
    unit: str
    wanted: float | None
    find: Callable[[Results], Judged | None]
    at_most: bool = False

    def row(self, results: Results) -> Found:
        found = self.find(results)
        row: Found = {"figure": self.title, "unit": self.unit, "wanted": self.wanted}
        if found is None:
            return row | {"measured": None, "percent_of_limit": None, "verdict": "not measured"}
        value, percent = found
        verdict = ""
        if self.wanted is not None:
            met = value <= self.wanted if self.at_most else value >= self.wanted
            verdict = "met" if met else "missed"
        return row | {"measured": value, "percent_of_limit": percent, "verdict": verdict}


def one(part: str, key: str, name: str) -> Callable[[Results], Judged | None]:
    def find(results: Results) -> Judged | None:
        found = results.get(part, {}).get(key, {})
        return (found[name], found.get("percent_of_limit")) if name in found else None

    return find


def worst(name: str, *words: str, least: int = 0) -> Callable[[Results], Judged | None]:
    """The lowest `name` of the kernels whose keys begin with one of `words`; where `least` is
    given, of those with at least so many tokens of context in the batch."""

    def find(results: Results) -> Judged | None:
        rows = [
            found
            for key, found in results.get("kernels", {}).items()
            if key.startswith(words) and name in found and _tokens(key) >= least
        ]
        if not rows:
            return None
        lowest = min(rows, key=lambda row: float(row[name]))
        return lowest[name], lowest.get("percent_of_limit")

    return find


def _tokens(key: str) -> int:
    """Of `… 8x32768`: batch times context."""
    batch, _, context = key.rsplit(" ", 1)[-1].partition("x")
    return int(batch) * int(context) if batch.isdigit() and context.isdigit() else 0


def warm_throughput(results: Results) -> Judged | None:
    rounds = [
        found
        for key, found in results.get("throughput", {}).items()
        if key != "round 0" and "output_tok_s" in found
    ]
    if not rounds:
        return None
    limits = [row["percent_of_limit"] for row in rounds if "percent_of_limit" in row]
    rate = statistics.median(row["output_tok_s"] for row in rounds)
    return rate, statistics.median(limits) if limits else None


def warm_start(results: Results) -> Judged | None:
    found = results.get("start", {})
    warm = [row["start_s"] for key, row in found.items() if key.startswith("warm")]
    return (statistics.median(warm), None) if warm else None


def host_time(results: Results) -> Judged | None:
    found = results.get("steady", {}).get("host", {})
    return None if found.get("computes_on_host", True) else (found["host_ms"], None)


GOALS = (
    Goal("bandwidth, as the canary measures it", "GB/s", None, one("canary", "rates", "read_gb_s")),
    Goal("bf16 product, likewise", "GFLOP/s", None, one("canary", "rates", "gemm_gflop_s")),
    Goal(
        "decode attention from 256k tokens on, lowest",
        "% of bandwidth",
        85,
        worst("percent_of_bandwidth", "decode attention", least=LONG_TOKENS),
    ),
    Goal(
        "prefill attention, lowest",
        "% of bf16 rate",
        55,
        worst("percent_of_bf16_rate", "prefill attention"),
    ),
    Goal(
        "fused norms and activations, lowest",
        "% of bandwidth",
        85,
        worst("percent_of_bandwidth", "rms_norm", "add_rms_norm", "silu_mul"),
    ),
    Goal("batch 1, 128/128", "tok/s", 1000, one("batch1", "128/128", "decode_tok_s")),
    Goal("batch 1, 1k/128", "tok/s", None, one("batch1", "1024/128", "decode_tok_s")),
    Goal("nano-vllm's benchmark", "tok/s", 25_000, warm_throughput),
    Goal("the same, the further goal", "tok/s", 31_000, warm_throughput),
    Goal("512 at once, 128/128", "tok/s", None, one("sweep", "512 at once", "decode_tok_s")),
    Goal("host time a step, 256 running", "ms", 0.5, host_time, at_most=True),
    Goal(
        "device idle, 256 running",
        "share",
        0.05,
        one("steady", "trace", "idle_share"),
        at_most=True,
    ),
    Goal("launches a step, 256 running", "", None, one("steady", "trace", "launches_a_step")),
    Goal(
        "bytes moved at most, over bytes needed",
        "×",
        None,
        one("steady", "trace", "bytes_moved_at_most"),
    ),
    Goal("start to first token, warm", "s", 10, warm_start, at_most=True),
    Goal("slope of ITL over that of the bytes", "×", None, one("long", "fit", "slope_over_limit")),
    *(
        Goal(
            f"{count} at once, speed over {peer}",
            "×",
            None,
            one("peer", f"{count} at once, {peer}", "speed_of_ours_over"),
        )
        for count in (1, 32)
        for peer in ("transformers", "transformers, static cache")
    ),
)
"""Of Qwen3-0.6B's shape, on an H200; of other cards the limit's percentages say more."""


def collect(platform: str, out: Path, parts: list[str], tiny: bool) -> Found:
    """The report; also OUT/report.json."""
    records = {part: Record(out, part) for part in parts}
    results = {part: record.results for part, record in records.items()}
    report = {
        "benchmark": "gpu_row",
        "platform": platform,
        "tiny": tiny,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": results.get("facts", {}).get("machine"),
        "verdicts": {part: record.verdict() for part, record in records.items()},
        "seconds": {part: record.seconds for part, record in records.items()},
        "table": [goal.row(results) for goal in GOALS],
        "faults": {part: record.faults for part, record in records.items() if record.faults},
        "results": results,
    }
    if out.is_dir():
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def commit() -> str | None:
    """The checkout; a + says that it has changes. None where there is no git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(CHECKOUT), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def show(report: Found) -> None:
    for part, verdict in report["verdicts"].items():
        found = report["results"][part]
        skipped = sum("skipped" in row for row in found.values())
        faults = ", ".join(report["faults"].get(part, ()))
        print(
            f"{part:13} {verdict:11} {report['seconds'][part]:6.0f} s  {len(found)} found"
            + (f", {skipped} of them skipped" if skipped else "")
            + (f"; failed: {faults}" if faults else "")
        )
    print(f"\n{'figure':48} {'measured':>12} {'wanted':>9} {'% of limit':>10}")
    for row in report["table"]:
        cells = [number(row[name]) for name in ("measured", "wanted", "percent_of_limit")]
        title = f"{row['figure']} ({row['unit']})" if row["unit"] else row["figure"]
        print(f"{title:62} {cells[0]:>12} {cells[1]:>9} {cells[2]:>10}  {row['verdict']}")


def page(report: Found) -> str:
    """Markdown: the table, then every figure of every part."""
    machine = report["machine"] or {}
    devices = "; ".join(machine.get("devices", ())) or "a machine of which nothing is known"
    lines = [
        f"# {devices}",
        "",
        f"Platform `{report['platform']}`, {report['date']}, commit `{report['commit']}`, "
        + ", ".join(f"{k} {v}" for k, v in machine.get("packages", {}).items())
        + ". Written by `benchmarks/gpu_row.py --page`.",
        "",
        "| figure | measured | wanted | % of limit | |",
        "|---|---|---|---|---|",
    ]
    for row in report["table"]:
        cells = [number(row[name]) for name in ("measured", "wanted", "percent_of_limit")]
        unit = f", {row['unit']}" if row["unit"] else ""
        lines.append(f"| {row['figure']}{unit} | {' | '.join(cells)} | {row['verdict']} |")
    for part, found in report["results"].items():
        if part not in ("facts", "conform", "kernel-tests", "device") and found:
            lines += ["", f"## {part}", ""]
            lines += [f"- {key}: {_words(row)}" for key, row in found.items()]
    for part, faults in report["faults"].items():
        lines += ["", f"## {part}: what failed", ""]
        lines += [f"- {key}: {text.strip().splitlines()[-1]}" for key, text in faults.items()]
    return "\n".join(lines)


def _words(row: dict[str, Any]) -> str:
    plain = {k: v for k, v in row.items() if not isinstance(v, dict | list)}
    return ", ".join(f"{k} {number(v) if isinstance(v, float) else v}" for k, v in plain.items())
