"""Write docs/cpu.md from result files: goal, figure, % of limit, ratio to the best peer, verdict.

    .venv/bin/python benchmarks/page.py benchmarks/results/cpu_*.json

Every figure names its file. `benchmarks/cpu_notes.md` is written by hand: a heading `## KEY` for a
goal's key below, and under it why the goal is missed; it is put in where a run missed that goal.
Result files of `scheduler_overhead.py` may be among them. `cpu_page.py` measures all that is
missing and then calls this.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import MAIN_FIGURE, SMALLER_IS_BETTER
from fleet import PRECISIONS, PeerSpec

HERE = Path(__file__).resolve().parent
NOTES = HERE / "cpu_notes.md"
PAGE = HERE.parent / "docs" / "cpu.md"

# Instructions, as a result file names them, that a run under a cap does without.
BEYOND = {
    "avx2": ("avx512", "amx"),
    "avx512": ("avx512_bf16", "avx512_vnni", "amx"),
}
MIXED_TOKENS = 32 * (160 + 96)
"""Of a round of `mixed32`: its requests by the means of their lengths (workloads.py)."""
CAPPED_WORKLOADS = ("batch1", "prefill2048")
LONGEST_CONTEXT = 32_000

Report = dict[str, Any]


@dataclass(frozen=True)
class Criterion:
    """What one part of a goal asks for, and what was measured of it."""

    value: float
    wanted: float
    unit: str = ""
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.wanted if self.at_most else self.value >= self.wanted

    def __str__(self) -> str:
        if self.at_most:
            return f"{self.value:.4g} instead of {self.wanted:g}{self.unit}"
        return f"{self.value:.4g} of {self.wanted:g}{self.unit}"


@dataclass(frozen=True)
class Row:
    """One goal in one result file: the criteria that the file decides, and what is `lacking`
    where these are not all."""

    figure: str
    criteria: tuple[Criterion, ...]
    percent: str = ""
    against: str = ""
    lacking: str = ""

    @property
    def met(self) -> bool | None:
        """None: what was measured is met, but more is asked for."""
        if not all(part.met for part in self.criteria):
            return False
        return None if self.lacking else True

    @property
    def verdict(self) -> str:
        missed = ", ".join(str(part) for part in self.criteria if not part.met)
        if missed:
            return f"**missed**: {missed}"
        return f"open: {self.lacking}" if self.lacking else "met"


@dataclass(frozen=True)
class Goal:
    """A line of the page; `judge` gives its row for a report, or None where that does not hold
    what is needed. `cap`: the instructions that the goal is bound to."""

    key: str
    title: str
    target: str
    judge: Callable[[Report], Row | None]
    cap: str | None = None


def takes_nothing(cap: str, flags: Sequence[str]) -> bool:
    """Does a processor with these instructions have none beyond the cap?"""
    return cap in BEYOND and not any(flag.startswith(BEYOND[cap]) for flag in flags)


def caps_of(report: Report) -> set[str | None]:
    """The caps that a run speaks for. One that takes nothing from the processor is none."""
    cap, flags = report.get("isa_cap"), report.get("machine", {}).get("isa", ())
    return {cap, None} if cap and flags and takes_nothing(cap, flags) else {cap}


def main_figure(report: Report, workload: str, peer: str) -> dict[str, float] | None:
    found = report.get("summary", {}).get(workload, {}).get(peer, {})
    return found.get(MAIN_FIGURE[workload][0])


def ours(report: Report, precision: str, kv: str = "bf16") -> str | None:
    """Our peer in that precision, as the run called it."""
    for name in report.get("peers", ()):
        spec = PeerSpec.parse(name)
        if spec.is_ours and spec.precision == precision and spec.kv == kv:
            return name
    return None


def rivals(report: Report, bits: int, engine: str | None = None) -> list[str]:
    specs = [PeerSpec.parse(name) for name in report.get("peers", ())]
    return [
        spec.name
        for spec in specs
        if not spec.is_ours and spec.bits == bits and engine in (None, spec.engine)
    ]


def best(report: Report, workload: str, names: list[str]) -> tuple[str, float] | None:
    """The peer that is ahead of the others, and its figure."""
    found = {name: main_figure(report, workload, name) for name in names}
    medians = {name: value["median"] for name, value in found.items() if value}
    if not medians:
        return None
    choose = min if workload in SMALLER_IS_BETTER else max
    name = choose(medians, key=lambda name: medians[name])
    return name, medians[name]


def advantage(workload: str, figure: float, other: float) -> float:
    """How many times better `figure` is than `other`."""
    return other / figure if workload in SMALLER_IS_BETTER else figure / other


def race(
    workload: str,
    precision: str,
    *,
    ratio: float = 1.0,
    percent: float | None = None,
    engine: str | None = None,
    cap: str | None = None,
) -> Callable[[Report], Row | None]:
    """Ours against the best peer of the same width, and against the limit where `percent` says."""

    def judge(report: Report) -> Row | None:
        name = ours(report, precision)
        figure = name and main_figure(report, workload, name)
        if not figure or cap not in caps_of(report):
            return None
        assert name
        criteria: list[Criterion] = []
        of_limit = report["summary"][workload][name].get("percent_of_limit")
        if percent is not None:
            criteria.append(Criterion(of_limit["median"], percent, " %"))
        rival = best(report, workload, rivals(report, PeerSpec.parse(name).bits, engine))
        if rival:
            criteria.append(Criterion(advantage(workload, figure["median"], rival[1]), ratio, "×"))
        return Row(
            spread(figure),
            tuple(criteria),
            f"{of_limit['median']:.0f} %" if of_limit else "",
            f"{criteria[-1].value:.2f}× {rival[0]}" if rival else "",
            lacking="" if rival else "no peer of this width",
        )

    return judge


def ours_against_bf16(
    workload: str, precision: str, kv: str, ratio: float
) -> Callable[[Report], Row | None]:
    """Our own lower precision over our own bf16 in the same run."""

    def judge(report: Report) -> Row | None:
        name, wide = ours(report, precision, kv), ours(report, "bf16")
        figure = name and main_figure(report, workload, name)
        base = wide and main_figure(report, workload, wide)
        if not figure or not base or None not in caps_of(report):
            return None
        times = Criterion(advantage(workload, figure["median"], base["median"]), ratio, "×")
        return Row(spread(figure), (times,), against=f"{times.value:.2f}× {wide}")

    return judge


def start(report: Report) -> Row | None:
    name = ours(report, "bf16")
    figure = name and main_figure(report, "start", name)
    if not figure or None not in caps_of(report):
        return None
    against = ""
    if rival := best(report, "start", rivals(report, 16)):
        against = f"{advantage('start', figure['median'], rival[1]):.2f}× {rival[0]}"
    seconds = Criterion(figure["median"], 3.0, " s", at_most=True)
    return Row(spread(figure), (seconds,), against=against)


def growth(report: Report) -> Row | None:
    name = ours(report, "bf16")
    figure = name and main_figure(report, "growth", name)
    if not figure or None not in caps_of(report):
        return None
    found = report["summary"]["growth"][name]
    longest, slowest = found["longest_context"]["median"], found["itl_at_longest_ms"]["median"]
    return Row(
        f"{spread(figure)}; {slowest:.0f} ms at {longest:.0f}",
        (Criterion(figure["median"], 1.15, "", at_most=True),),
        lacking="" if longest >= LONGEST_CONTEXT else f"{longest:.0f} of {LONGEST_CONTEXT} tokens",
    )


def peak_memory(report: Report) -> Row | None:
    """Of runs with many requests, whose rounds, of other prompts each, fill the KV cache that is
    counted: what is not used yet takes no memory."""
    name = ours(report, "bf16")
    if not name or name not in report.get("memory", {}) or None not in caps_of(report):
        return None
    if "mixed32" not in report["summary"]:
        return None
    found = report["memory"][name]
    text = f"{found['peak_rss_gib']:.2f} of {found['weights_and_kv_gib']:.2f} GiB"
    percent = Criterion(100 * found["ratio"], 110, " %", at_most=True)
    others = [report["memory"][other] for other in rivals(report, 16) if other in report["memory"]]
    least = min((other["ratio"] for other in others), default=None)
    beside = f"best peer {100 * least:.0f} %" if least is not None else ""
    used = len(report["raw"]) * MIXED_TOKENS
    filled = used >= report["kv_tokens"]
    lacking = "" if filled else f"about {used:,} of {report['kv_tokens']:,} KV tokens were used"
    return Row(text, (percent,), f"{percent.value:.0f} %", beside, lacking)


def host_time(report: Report) -> Row | None:
    if report.get("benchmark") != "scheduler_overhead":
        return None
    steps = [r["total_us"] * r["running"] / 1e3 for r in report["results"] if r["running"] == 256]
    if not steps:
        return None
    return Row(f"{max(steps):.3f} ms", (Criterion(max(steps), 1.0, " ms", at_most=True),))


def capped(cap: str) -> Iterator[Goal]:
    """The goals of a run under a cap: llama.cpp, built for the same cap, in each workload."""
    for workload in CAPPED_WORKLOADS:
        for precision, rival in (("bf16", "BF16"), ("int8", "Q8_0"), ("int4", "Q4_0")):
            yield Goal(
                f"{cap}_{workload}_{precision}",
                f"{cap} only, {MAIN_FIGURE[workload][1]}, {precision}",
                f"≥ llama.cpp {rival} capped alike",
                race(workload, precision, engine="llama_cpp", cap=cap),
                cap,
            )


GOALS = [
    Goal(
        "batch1_bf16",
        "batch 1 decode, bf16, tokens/s",
        "≥ 92 % of the limit, ahead of every peer",
        race("batch1", "bf16", percent=92),
    ),
    Goal(
        "batch1_int8",
        "batch 1 decode, int8, tokens/s",
        "≥ 85 % of the limit, ahead of Q8_0",
        race("batch1", "int8", percent=85),
    ),
    Goal(
        "batch1_int4",
        "batch 1 decode, int4, tokens/s",
        "≥ 75 % of the limit, ahead of Q4_0",
        race("batch1", "int4", percent=75),
    ),
    Goal(
        "mixed32_bf16",
        "32 at once, bf16, output tokens/s",
        "≥ 1.5× the best peer",
        race("mixed32", "bf16", ratio=1.5),
    ),
    Goal(
        "mixed32_int8",
        "32 at once, int8 weights and KV, output tokens/s",
        "≥ 1.6× our bf16",
        ours_against_bf16("mixed32", "int8", "int8", 1.6),
    ),
    Goal(
        "prefill_bf16",
        "prefill 2,048, bf16, tokens/s",
        "≥ 60 % of the GEMM peak, ≥ 2.3× the best peer",
        race("prefill2048", "bf16", percent=60, ratio=2.3),
    ),
    Goal(
        "prefill_int8",
        "prefill 2,048, int8, tokens/s",
        "faster than our bf16",
        ours_against_bf16("prefill2048", "int8", "bf16", 1.0),
    ),
    Goal(
        "shared_prefix",
        "16 sharing a 1,024-token prefix, bf16, s",
        "≥ 1.5× the best peer",
        race("shared_prefix", "bf16", ratio=1.5),
    ),
    Goal("start", "start to first token, s", "≤ 3 s", start),
    Goal("memory", "peak memory", "≤ weights + KV + 10 %", peak_memory),
    Goal(
        "growth",
        "slope of ITL over context, by the KV bandwidth limit",
        "≤ 1.15, fitted to 32k",
        growth,
    ),
    Goal("host_time", "scheduler time a step, 256 running", "≤ 1 ms", host_time),
    *capped("avx2"),
    *capped("avx512"),
]


def spread(value: dict[str, float]) -> str:
    return "{median:.4g} ({min:.4g}–{max:.4g})".format(**value)


def notes() -> dict[str, str]:
    """The hand-written reasons by goal's key."""
    if not NOTES.exists():
        return {}
    parts = NOTES.read_text().split("\n## ")[1:]
    return {head.strip(): body.strip() for head, _, body in (p.partition("\n") for p in parts)}


def table(reports: dict[Path, Report]) -> Iterator[str]:
    yield "| goal | wanted | measured | of the limit | against | verdict | file |"
    yield "|---|---|---|---|---|---|---|"
    written, decided = notes(), set()
    for goal in GOALS:
        rows = [(file, row) for file, report in reports.items() if (row := goal.judge(report))]
        if rows:
            decided.add(goal.cap)
        elif goal.cap is None:
            yield f"| {goal.title} | {goal.target} | | | | not measured | |"
        for file, row in rows:
            verdict = row.verdict
            if row.met is False and goal.key in written:
                verdict += f" ([why](#{goal.key}))"
            cells = (goal.title, goal.target, row.figure, row.percent, row.against, verdict)
            yield f"| {' | '.join(cells)} | {link(file)} |"
    for cap in (cap for cap in BEYOND if cap not in decided):
        wanted = f"{cap} only: batch 1 decode and prefill | ≥ llama.cpp capped alike"
        yield f"| {wanted} | | | | not measured{no_processor(cap, reports)} | |"


def no_processor(cap: str, reports: dict[Path, Report]) -> str:
    """Why nothing was measured under a cap, where no processor has what it allows."""
    machines = [report["machine"] for report in reports.values() if "machine" in report]
    if any(flag.startswith(cap) for machine in machines for flag in machine["isa"]):
        return ""
    return f": the processor has no {cap}"


def absent(reports: dict[Path, Report]) -> Iterator[str]:
    """The engines that no goal was held against, though run.py knows them."""
    seen = {PeerSpec.parse(name).engine for r in reports.values() for name in r.get("peers", ())}
    if missing := [engine for engine in PRECISIONS if engine not in seen]:
        yield f"\nEngines that took part in none of these runs: {', '.join(missing)}."


def link(file: Path) -> str:
    return f"[{file.stem}]({os.path.relpath(file, PAGE.parent)})"


def reasons(reports: dict[Path, Report]) -> Iterator[str]:
    missed = {
        goal.key: goal
        for goal in GOALS
        for report in reports.values()
        if (row := goal.judge(report)) and row.met is False
    }
    written = notes()
    for key, goal in missed.items():
        if key in written:
            yield f'<a id="{key}"></a>**{goal.title}.** {written[key]}\n'
        else:
            print(f"{NOTES.name} does not say why {key} is missed.", file=sys.stderr)


def about(file: Path, report: Report) -> Iterator[str]:
    """One run: machine, command, who took part with what, who did not and why."""
    machine = report["machine"]
    yield f"\n### {link(file)}\n"
    cap = f", capped at {report['isa_cap']}" if report.get("isa_cap") else ""
    isa = ", ".join(machine["isa"])
    yield (
        f"{machine['cpu']}, {machine['cores']} cores ({isa}){cap}, {report['shape']}, "
        f"{report['rounds']} rounds ({report['noisy_rounds_used']} noisy), {report['date']}, "
        f"commit {report.get('commit', 'not recorded')}; "
        f"read {report['limits']['read_gb_s']:.1f} GB/s, "
        f"GEMM {report['limits']['gemm_gflop_s']:.0f} GFLOP/s.\n"
    )
    yield f"```\n{report['command']}\n```\n"
    picture = file.with_suffix(".png")
    if picture.exists():
        yield f"![{file.stem}]({os.path.relpath(picture, PAGE.parent)})\n"
    columns = [name for name in MAIN_FIGURE if name in report["summary"]]
    yield "| peer | " + " | ".join(MAIN_FIGURE[name][1] for name in columns) + " | peak GiB |"
    yield "|---" * (len(columns) + 2) + "|"
    for peer in report["peers"]:
        found = [main_figure(report, name, peer) for name in columns]
        cells = [spread(value) if value else "" for value in found]
        peak = report.get("memory", {}).get(peer, {}).get("peak_rss_gib", "")
        yield f"| {peer} | {' | '.join(cells)} | {peak} |"
    yield (
        "\nAgreement with ours (RMS over the prompts' log-probabilities, next token): "
        + "; ".join(
            f"{peer} {found['rms']}, {found['same_token']}"
            for peer, found in report["agreement"].items()
            if "rms" in found
        )
        + ".\n"
    )
    for peer, reason in report.get("failed", {}).items():
        yield f"- {peer} took no part: {reason.splitlines()[0]}"
    yield "\nVersions: " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()) + "."


INTRODUCTION = """\
# The x86 CPU: goals, figures, peers

Written by `benchmarks/page.py` from the files it names; do not edit. How it is measured, what the
limits are and what the workloads ask stands in [performance.md](performance.md); the flags that
each peer ran with are in each file (`flags`). Every engine ran in the same interleaved run on the
same random weights, and none has figures that did not agree with ours on what the model says.
Figures are medians over the rounds, with their range. A goal counts as met when every part of it
was measured and holds; "open" means that a part was not measured in that file. The goals are those
of a processor with AMX; the processor of each run stands above its command. Under a cap of the
instructions llama.cpp is built for that cap, and what counts is batch 1 decode and prefill in three
precisions; where the processor has nothing beyond the cap, the same run decides the goals without
one too.
"""


def write(files: list[Path]) -> None:
    reports = {file.resolve(): json.loads(file.read_text()) for file in files}
    runs = {file: report for file, report in reports.items() if "summary" in report}
    lines = [INTRODUCTION, "## Goals\n", *table(reports), *absent(reports)]
    if why := list(reasons(reports)):
        lines += ["\n## Why goals are missed\n", *why]
    lines.append("## The runs" if why else "\n## The runs")
    for file, report in runs.items():
        lines += about(file, report)
    PAGE.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    write(parser.parse_args().files)
