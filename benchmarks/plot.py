"""Plot a result of `run.py`: one panel a workload, one bar a peer, with the range of the rounds.

    .venv/bin/python benchmarks/plot.py benchmarks/results/NAME.json   # writes NAME.png beside it

Where the cost of growth was measured, a panel shows seconds a token over the context.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from figures import MAIN_FIGURE


def plot(report: dict[str, Any], target: Path) -> None:
    panels = [
        name
        for name, found in report["summary"].items()
        if name in MAIN_FIGURE and any(MAIN_FIGURE[name][0] in found[peer] for peer in found)
    ]
    if not panels:
        raise SystemExit(f"{target.stem}: none of its workloads is known here, nothing to plot.")
    width = max(3.2, 0.55 * len(report["peers"]))
    size = (max(width * len(panels), 7.0), 3.8)  # the heading needs so much
    figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False)
    for axis, name in zip(axes[0], panels, strict=True):
        if name == "growth":
            _growth(axis, report)
        else:
            _bars(axis, report, name)
        title = "ITL over context" if name == "growth" else MAIN_FIGURE[name][1]
        axis.set_title(title, fontsize=9)
    machine, cap = report["machine"], report.get("isa_cap")
    figure.suptitle(
        f"{report['shape']} · {machine['cpu']}, {machine['cores']} cores"
        f"{f', capped at {cap}' if cap else ''} · "
        f"{report['rounds']} interleaved rounds, {report['date']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(target, dpi=130)
    plt.close(figure)


def _bars(axis: Any, report: dict[str, Any], name: str) -> None:
    key, found = MAIN_FIGURE[name][0], report["summary"][name]
    names = [peer for peer in report["peers"] if key in found.get(peer, {})]
    for position, peer in enumerate(names):
        value = found[peer][key]
        error = [[value["median"] - value["min"]], [value["max"] - value["median"]]]
        ours = peer.startswith("trimaran")
        axis.bar(
            position,
            value["median"],
            yerr=error,
            capsize=4,
            width=0.7,
            color="tab:blue" if ours else "tab:gray",
        )
        text = f"{value['median']:{',.0f' if value['median'] >= 100 else '.3g'}}"
        axis.annotate(text, (position, value["median"]), ha="center", va="bottom", fontsize=8)
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=7)
    axis.margins(y=0.15)


def _growth(axis: Any, report: dict[str, Any]) -> None:
    for peer in report["peers"]:
        points = [
            point
            for entry in report["raw"]
            for each in entry["results"].get("growth", {}).get(peer, {}).get("passes", ())
            for point in each["points"]
        ]
        if points:
            contexts, seconds = zip(*points, strict=True)
            (dots,) = axis.plot(contexts, [1e3 * x for x in seconds], "o", ms=3, label=peer)
            fit, last = report["summary"]["growth"][peer], max(contexts)
            if "intercept_ms" in fit:
                start, slope = fit["intercept_ms"]["median"], fit["slope_us_per_token"]["median"]
                line = [start, start + slope * last / 1e3]
                axis.plot([0, last], line, color=dots.get_color(), lw=1)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("context", fontsize=8)
    axis.set_ylabel("ms a token", fontsize=8)
    axis.legend(fontsize=7)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    plot(json.loads(source.read_text()), source.with_suffix(".png"))
