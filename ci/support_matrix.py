"""The support matrix, docs/support.md, from the reports in docs/conformance/ and what the hulls
describe of devices.

    python ci/support_matrix.py           write it
    python ci/support_matrix.py --check   exit status 1 and a diff where it is stale

A report is what `trimaran conform --platform NAME --report docs/conformance/NAME.json` wrote, whole
(not `--quick`, all levels), for the PLATFORM_API of today. Nothing of the matrix depends on the
machine that it is made on, on its name, or on how long anything took.
"""

import argparse
import difflib
import importlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
REPORTS = ROOT / "docs" / "conformance"
MATRIX = ROOT / "docs" / "support.md"
HULLS = ("cpu:CpuPlatform", "cuda:CudaPlatform", "rocm:RocmPlatform", "strict:StrictPlatform")
LEVELS = ("L0", "L1", "L2", "L3", "L4", "L5")
DESCRIBED = "described only, never run here"

Values = Mapping[str, Any]

HEAD = """\
# What is supported

Written by `ci/support_matrix.py`; CI fails when it is stale. Two kinds of lines stand here, and
only the first is a proof: what a conformance report found (`trimaran conform --report`, kept in
`docs/conformance/`), and what is described of devices that no report was made on.
"""


class Unfit(Exception):
    """A report that no line of the matrix may rest on, and what to do."""


def read_reports(folder: Path, api: str) -> list[Values]:
    """All reports of `folder`, by platform. Raises `Unfit` for one that is partial or stale."""
    reports: list[Values] = []
    for path in sorted(folder.glob("*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        again = (
            f"run: trimaran conform --platform {path.stem} --report docs/conformance/{path.name}"
        )
        if report["engine_api"] != api:
            raise Unfit(
                f"{path.name} is of platform API {report['engine_api']}, not {api}; {again}"
            )
        if report["quick"] or report["partial"]:
            raise Unfit(f"{path.name} is of a part of the kit only; {again}")
        reports.append({**report, "file": path.name})
    return reports


def described_devices() -> list[tuple[str, Any]]:
    """(platform, DeviceSpec) of every device that a hull in the box describes."""
    found = []
    for hull in HULLS:
        module, _, name = hull.partition(":")
        cls = getattr(importlib.import_module(f"trimaran.platforms.{module}"), name)
        found += [(cls.name, spec) for spec in cls.known_devices()]
    return found


def was_run(platform: str, spec: Any, reports: Iterable[Values]) -> bool:
    """Is one of the reports of such a device, by the name that the hull's own table knows it by?"""
    tables = importlib.import_module("trimaran.platforms.gpu_tables")
    cards = tables.NVIDIA_CARDS + tables.AMD_CARDS

    def name_of(reported: str) -> str:
        model = tables.model_of(reported, cards)
        return "" if model is None else str(model.name)

    return any(
        report["platform"] == platform
        and device["architecture"] == spec.architecture
        and name_of(device["name"]) == spec.name
        for report in reports
        for device in report["devices"][report["device"] : report["device"] + 1]
    )


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"


def level_cell(counts: Mapping[str, int] | None) -> str:
    if counts is None:
        return "not run"
    total = sum(counts.values())
    if counts["failed"]:
        return f"**{counts['failed']} of {total} failed**"
    skipped = f", {counts['skipped']} skipped" if counts["skipped"] else ""
    return f"{counts['passed']} passed{skipped}"


def proved(reports: Sequence[Values]) -> Iterator[str]:
    rows: list[list[str]] = [
        [
            f"[`{one['platform']}`](conformance/{one['file']})",
            one["origin"],
            f"{one['engine']}, API {one['engine_api']}",
            *(level_cell(one["totals"].get(level)) for level in LEVELS),
            "conforms" if one["ok"] else "**does not conform**",
        ]
        for one in reports
    ]
    known = {one["platform"] for one in reports}
    for name in (hull.partition(":")[0] for hull in HULLS):
        if name not in known:
            rows.append([f"`{name}`", "trimaran", "-", *["not run"] * len(LEVELS), "no report yet"])
    yield from table(("platform", "from", "engine", *LEVELS, "result"), rows)


def skips(reports: Sequence[Values]) -> Iterator[str]:
    """Why checks were skipped, each reason once."""
    for one in reports:
        reasons = Counter(
            (outcome["level"], outcome["detail"].partition("\n")[0])
            for outcome in one["outcomes"]
            if outcome["status"] == "skipped"
        )
        for (level, reason), count in sorted(reasons.items()):
            yield f"- `{one['platform']}` {level}, {count} skipped: {reason}"


def facts(values: Values) -> list[str]:
    """A device's capabilities, in the order of CAPABILITIES."""
    dtypes = values["dtypes"]
    emulated = [name for name, precision in dtypes.items() if precision == "emulated"]
    return [
        ", ".join(f"{name} (emulated)" if name in emulated else name for name in dtypes),
        ", ".join(values["kv_dtypes"]) or "-",
        values["fp8"] or "-",
        ", ".join(values["weight_formats"]),
        "yes" if values["graph_replay"] else "no",
        str(values["run_ahead"]),
    ]


# Of graphs the contract says what a device can: no step of the engine is captured yet.
CAPABILITIES = ("dtypes", "KV cache", "FP8", "weights", "graph replay (device can)", "steps ahead")


def devices(reports: Sequence[Values], described: Sequence[tuple[str, Any]]) -> Iterator[str]:
    rows = [
        [
            f"`{one['platform']}`",
            one["capabilities"]["isa"] or "any",
            *facts(one["capabilities"]),
            f"[report](conformance/{one['file']})",
        ]
        for one in reports
    ]
    for platform, spec in described:
        known = "a report is above" if was_run(platform, spec, reports) else DESCRIBED
        values = {name: getattr(spec.capabilities, name) for name in spec.capabilities.__slots__}
        label = f"`{platform}` {spec.title} (`{spec.name}`)"
        rows.append([label, spec.architecture, *facts(values), known])
    yield from table(("device", "architecture", *CAPABILITIES, "known by"), rows)


def op_cell(by_dtype: Mapping[str, str]) -> str:
    """`acme` where all dtypes agree, else `acme (float32), reference (float16)`."""
    chosen: dict[str, list[str]] = {}
    for dtype, name in by_dtype.items():
        chosen.setdefault(name, []).append(dtype)
    if len(chosen) == 1:
        return next(iter(chosen))
    return ", ".join(f"{name} ({', '.join(dtypes)})" for name, dtypes in chosen.items())


def passed(report: Values, pattern: str) -> str:
    """The names that `pattern`'s group finds in the checks of L1, those with no failed check."""
    found: dict[str, bool] = {}
    for one in report["outcomes"]:
        if one["level"] == "L1" and (match := re.fullmatch(pattern, one["name"])):
            found[match[1]] = found.get(match[1], True) and one["status"] != "failed"
    return ", ".join(name for name, ok in found.items() if ok) or "-"


# What the kit runs every implementation of, and its report does not say which one is chosen.
BESIDE_OPS = {
    "attention (all that pass)": r"attention/[^/]+/[^/]+/([^/]+)/\w+",
    "own fusions (all that pass)": r"fusion/([^/]+)/\w+",
}


def ops(reports: Sequence[Values]) -> Iterator[str]:
    names = dict.fromkeys(name for one in reports for name in one["bindings"])
    rows = [
        [f"`{name}`", *(op_cell(one["bindings"].get(name, {"": "-"})) for one in reports)]
        for name in names
    ]
    rows += [[label, *(passed(one, of) for one in reports)] for label, of in BESIDE_OPS.items()]
    yield from table(("op", *(f"`{one['platform']}`" for one in reports)), rows)


def render(reports: Sequence[Values], described: Sequence[tuple[str, Any]]) -> str:
    lines = [HEAD, "## Platforms and their reports", "", *proved(reports)]
    if reasons := list(skips(reports)):
        lines += ["", *reasons]
    lines += ["", "## Devices", "", *devices(reports, described)]
    lines += ["", "## Ops: the implementation that is chosen at the sizes of a common layer", ""]
    return "\n".join([*lines, *ops(reports)]) + "\n"


def main(check: bool) -> int:
    api = importlib.import_module("trimaran.platforms.api")
    try:
        reports = read_reports(REPORTS, api.version_text(api.PLATFORM_API))
    except Unfit as error:
        print(f"support_matrix: {error}", file=sys.stderr)
        return 1
    wanted = render(reports, described_devices())
    if not check:
        MATRIX.write_text(wanted, encoding="utf-8")
        return 0
    found = MATRIX.read_text(encoding="utf-8") if MATRIX.exists() else ""
    name = MATRIX.relative_to(ROOT).as_posix()
    diff = difflib.unified_diff(
        found.splitlines(), wanted.splitlines(), name, "as it should be", lineterm=""
    )
    for line in diff:
        print(line)
    if found != wanted:
        print(f"{name} is stale: run python ci/support_matrix.py", file=sys.stderr)
    return int(found != wanted)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    sys.exit(main(parser.parse_args().check))
