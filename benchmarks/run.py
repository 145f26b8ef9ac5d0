"""Compare Trimaran with its peers on this machine, interleaved in one run.

    .venv/bin/python benchmarks/run.py --shape qwen3-0.6b --rounds 5 --output results.json

Each peer lives in a process of its own, loaded once and idle while another runs. A round runs
every workload on every peer in turn; a canary (read bandwidth, GEMM) is taken before and after,
and a round in which it moved by more than 5 % is dropped and repeated, within bounds. Figures are
medians with their range; ratios are taken round by round. No figure counts unless the peers
agree on what the model says (the next token of each prompt and its log-probability).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import canary
import shapes
import workloads
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

WORKERS = Path(__file__).parent / "workers"
OURS = "trimaran"
console = Console(stderr=True)


class Peer:
    """One engine in its own process; speaks `workers/protocol.py`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, str(WORKERS / f"{name}_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=open(f"/tmp/trimaran-bench-{name}.log", "w"),  # noqa: SIM115 (lives with it)
            text=True,
            bufsize=1,
        )

    def ask(self, op: str, **arguments: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps({"op": op, **arguments}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended; see /tmp/trimaran-bench-{self.name}.log")
        return json.loads(line)

    def run(self, work: workloads.Workload, keep_prefix: bool = False) -> dict[str, Any]:
        return self.ask("run", prompts=work.prompts, outputs=work.outputs, keep_prefix=keep_prefix)

    def close(self) -> None:
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait(timeout=30)


@dataclass(frozen=True)
class Limits:
    """What the machine and the model's shape allow (formulas: docs/performance.md)."""

    sizes: dict[str, int]
    read_gb_s: float
    gemm_gflop_s: float

    def decode_tokens_per_second(self, batch: int, context: float) -> float:
        """Every step reads the weights once and each sequence's KV cache."""
        kv = shapes.kv_bytes_per_token(self.sizes) * context * batch
        seconds = (shapes.weight_bytes(self.sizes) + kv) / (self.read_gb_s * 1e9)
        return batch / seconds

    def prefill_tokens_per_second(self, length: int) -> float:
        attention = 2 * length * self.sizes["num_attention_heads"] * self.sizes["head_dim"]
        flops = 2 * shapes.num_body_parameters(self.sizes)
        flops += attention * self.sizes["num_hidden_layers"]
        return self.gemm_gflop_s * 1e9 / flops


def agreement(peers: list[Peer], vocab: int) -> dict[str, Any]:
    """Do the peers say the same of the same prompts? bf16 rounding may swap near-ties."""
    prompts = workloads.mixed(vocab, count=8, seed=9).prompts
    scores = {peer.name: peer.ask("score", prompts=prompts) for peer in peers}
    ours = scores[OURS]
    report = {}
    for name, theirs in scores.items():
        same = sum(a["token"] == b["token"] for a, b in zip(ours, theirs, strict=True))
        gap = max(abs(a["logprob"] - b["logprob"]) for a, b in zip(ours, theirs, strict=True))
        report[name] = {"same_token": f"{same}/{len(prompts)}", "max_logprob_gap": round(gap, 4)}
        if gap > 0.1:
            raise SystemExit(f"{OURS} and {name} disagree by {gap:.3f} in log-probability.")
    return report


def measure(peers: list[Peer], vocab: int, names: list[str]) -> dict[str, dict[str, Any]]:
    """One round: every workload on every peer in turn."""
    makers: dict[str, Callable[[], workloads.Workload]] = {
        "batch1": lambda: workloads.batch_one(vocab),
        "batch1_1k": lambda: workloads.batch_one(vocab, prompt=1024),
        "mixed32": lambda: workloads.mixed(vocab),
        "prefill2048": lambda: workloads.prefill(vocab),
    }
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        if name == "shared_prefix":
            first, second = workloads.shared_prefix(vocab)
            for peer in peers:
                a, b = peer.run(first), peer.run(second, keep_prefix=True)
                results.setdefault(name, {})[peer.name] = {
                    "first_ttft": a["ttft"],
                    "second_ttft": b["ttft"],
                    "cached_tokens": b["cached_tokens"],
                    "seconds": a["seconds"] + b["seconds"],
                    "output_tokens": a["output_tokens"] + b["output_tokens"],
                }
            continue
        work = makers[name]()
        for peer in peers:
            results.setdefault(name, {})[peer.name] = peer.run(work)
    return results


def rounds(
    peers: list[Peer], vocab: int, names: list[str], count: int
) -> Iterator[list[dict[str, Any]]]:
    """All rounds so far, after each of them, until `count` have held; at most twice as many."""
    entries: list[dict[str, Any]] = []
    with Progress(console=console) as progress:
        task = progress.add_task("rounds", total=count)
        while len(quiet(entries)) < count and len(entries) < 2 * count:
            before = canary.canary()
            results = measure(peers, vocab, names)
            after = canary.canary()
            held = not canary.moved(before, after)
            entries.append({"before": before, "after": after, "held": held, "results": results})
            seconds = {
                name: {peer: round(result["seconds"], 2) for peer, result in found.items()}
                for name, found in results.items()
            }
            progress.console.print("quiet" if held else "noisy", seconds)
            progress.update(task, advance=int(held))
            yield entries


def quiet(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rounds during which the machine held its speed."""
    return [entry for entry in entries if entry["held"]]


def summarise(kept: list[dict[str, Any]], sizes: dict[str, int]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for name in kept[0]["results"]:
        for peer in kept[0]["results"][name]:
            values = [_figures(name, entry, peer, sizes) for entry in kept]
            summary.setdefault(name, {})[peer] = {
                key: _spread([value[key] for value in values]) for key in values[0]
            }
        ratios: dict[str, list[float]] = {}
        for entry in kept:
            seconds = {peer: r["seconds"] for peer, r in entry["results"][name].items()}
            for peer, value in seconds.items():
                ratios.setdefault(peer, []).append(value / seconds[OURS])
        summary[name]["speed_of_ours_over"] = {
            peer: _spread(values) for peer, values in ratios.items() if peer != OURS
        }
    return summary


def _figures(
    name: str, entry: dict[str, Any], peer: str, sizes: dict[str, int]
) -> dict[str, float]:
    result = entry["results"][name][peer]
    limits = Limits(
        sizes,
        max(entry["before"]["read_gb_s"], entry["after"]["read_gb_s"]),
        max(entry["before"]["gemm_gflop_s"], entry["after"]["gemm_gflop_s"]),
    )
    rate = result["output_tokens"] / result["seconds"]
    if name == "shared_prefix":
        return {
            "first_ttft_s": result["first_ttft"],
            "second_ttft_s": result["second_ttft"],
            "cached_tokens": result["cached_tokens"],
        }
    if name.startswith("batch1"):
        prompt = 1024 if name.endswith("1k") else 128
        decode = (result["output_tokens"] - 1) / result["decode_seconds"]
        limit = limits.decode_tokens_per_second(1, prompt + result["output_tokens"] / 2)
        return {
            "decode_tok_s": decode,
            "ttft_s": result["ttft"],
            "percent_of_limit": 100 * decode / limit,
        }
    if name.startswith("prefill"):
        length = int(name.removeprefix("prefill"))
        rate = length / result["ttft"]
        limit = limits.prefill_tokens_per_second(length)
        return {"prefill_tok_s": rate, "percent_of_limit": 100 * rate / limit}
    limit = limits.decode_tokens_per_second(32, 208)
    return {
        "output_tok_s": rate,
        "percent_of_decode_limit": 100 * rate / limit,
        "peak_rss_gib": result["peak_rss_gib"],
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def show(report: dict[str, Any]) -> None:
    noisy = report["noisy_rounds_used"]
    title = f"{report['shape']} {report['dtype']}, {report['rounds']} rounds"
    table = Table(title=title + (f", {noisy} of them noisy" if noisy else ""))
    for column in ("workload", "figure", *report["peers"], "ratio"):
        table.add_column(column)
    for name, summary in report["summary"].items():
        ratios = summary["speed_of_ours_over"]
        for figure in summary[OURS]:
            cells = [
                "{median:.4g} ({min:.4g}–{max:.4g})".format(**summary[peer][figure])
                for peer in report["peers"]
            ]
            ratio = " ".join(f"{value['median']:.2f}× {peer}" for peer, value in ratios.items())
            table.add_row(name, figure, *cells, ratio)
            name, ratios = "", {}
    Console().print(table)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", default="qwen3-0.6b", choices=shapes.SHAPES)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peers", nargs="*", default=["transformers"])
    parser.add_argument(
        "--workloads",
        nargs="*",
        default=["batch1", "mixed32", "prefill2048", "shared_prefix"],
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=canary.torch.get_num_threads())
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "trimaran-bench")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    sizes = shapes.SHAPES[args.shape]
    dtype = getattr(canary.torch, args.dtype)
    model = shapes.make_checkpoint(args.shape, args.cache, dtype)
    peers = [Peer(name) for name in (OURS, *args.peers)]
    report: dict[str, Any] = {
        "command": " ".join(["benchmarks/run.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": canary.describe_machine(),
        "shape": args.shape,
        "dtype": args.dtype,
        "peers": [peer.name for peer in peers],
        "versions": _versions(),
    }
    try:
        load = {
            peer.name: peer.ask("load", model=str(model), dtype=args.dtype, threads=args.threads)
            for peer in peers
        }
        report["load_seconds"] = {name: round(value["seconds"], 2) for name, value in load.items()}
        report["agreement"] = agreement(peers, sizes["vocab_size"])
        console.print("agreement", report["agreement"])
        measure(peers, sizes["vocab_size"], ["batch1"])  # warm-up, not counted
        for entries in rounds(peers, sizes["vocab_size"], args.workloads, args.rounds):
            # Rounds may take many minutes: what is measured is on disk.
            report |= outcome(entries, args.rounds, sizes)
            args.output.write_text(json.dumps(report, indent=1) + "\n")
    finally:
        for peer in peers:
            peer.close()
    show(report)


def outcome(entries: list[dict[str, Any]], count: int, sizes: dict[str, int]) -> dict[str, Any]:
    """The quiet rounds in figures; all rounds, where the machine did not hold for `count`."""
    kept = quiet(entries)
    used = kept if len(kept) == count else entries
    return {
        "finished": len(kept) == count or len(entries) == 2 * count,
        "rounds": len(used),
        "noisy_rounds_used": len(used) - len(kept),
        "noisy_rounds_dropped": len(entries) - len(used),
        "limits": asdict(Limits(sizes, **entries[-1]["after"])),
        "summary": summarise(used, sizes),
        "raw": entries,
    }


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("trimaran", "torch", "transformers")}


if __name__ == "__main__":
    main()
