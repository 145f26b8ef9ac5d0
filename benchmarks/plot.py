"""Plot a result of `run.py`: one panel a workload, one bar a peer, with the range of the rounds.

.venv/bin/python benchmarks/plot.py benchmarks/results/NAME.json   # writes NAME.png beside it
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MAIN_FIGURE = {
    "batch1": ("decode_tok_s", "tokens/s, batch 1"),
    "batch1_1k": ("decode_tok_s", "tokens/s, batch 1, 1k context"),
    "mixed32": ("output_tok_s", "output tokens/s, 32 at once"),
    "prefill2048": ("prefill_tok_s", "prompt tokens/s, 2,048"),
    "shared_prefix": ("second_ttft_s", "s to first token, shared prefix"),
}


def plot(report: dict[str, Any], target: Path) -> None:
    names = [name for name in report["summary"] if name in MAIN_FIGURE]
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 3.6), squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        key, title = MAIN_FIGURE[name]
        for position, peer in enumerate(report["peers"]):
            value = report["summary"][name][peer][key]
            error = [[value["median"] - value["min"]], [value["max"] - value["median"]]]
            axis.bar(position, value["median"], yerr=error, capsize=4, width=0.7)
            axis.annotate(
                f"{value['median']:.3g}", (position, value["median"]), ha="center", va="bottom"
            )
        axis.set_xticks(range(len(report["peers"])), report["peers"], rotation=15)
        axis.set_title(title, fontsize=9)
        axis.margins(y=0.15)
    machine = report["machine"]
    figure.suptitle(
        f"{report['shape']} {report['dtype']} · {machine['cpu']}, {machine['cores']} cores · "
        f"{report['rounds']} interleaved rounds, {report['date']}",
        fontsize=9,
    )
    figure.tight_layout()
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    plot(json.loads(source.read_text()), source.with_suffix(".png"))
