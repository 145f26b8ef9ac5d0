"""Compare Trimaran with its peers on this machine, interleaved in one run.

    .venv/bin/python benchmarks/run.py --shape qwen3-0.6b --rounds 5 --output results.json \\
        --peers trimaran trimaran:int8 vllm_cpu llama_cpp:bf16 llama_cpp:q8_0 openvino:bf16

A peer is ENGINE[:PRECISION][,OPTION=VALUE…] (engines: trimaran, transformers, vllm_cpu, llama_cpp,
openvino; options go to the engine as they stand). Peers other than transformers are installed by
`peers.py`. Each peer lives in a process of its own, loaded once and idle while another runs. A
round runs every workload on every peer in turn; a canary (read bandwidth, GEMM) is taken before
and after, and a round in which it moved by more than 5 % is dropped and repeated, as long as there
are fewer than `--max-rounds`.
Figures are medians with their range; ratios are taken round by round. No figure counts unless the
peers agree on what the model says (`agreement.py`). `--isa` caps the instructions of every peer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import canary
import figures
import peers as environments
import shapes
import workloads
from agreement import agreement
from fleet import Fleet, Peer, PeerSpec, Setting
from limits import Limits
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

WARM_UP_SEED = 1_000_000
# Blocks for 16 requests that share nothing of 1,072 tokens.
KV_TOKENS, MAX_LEN = 20_480, 4096
# Beyond the longest context that `growth` asks for: its decodes, and the warm-up.
GROWTH_SPARE, GROWTH_SPARE_KV = 768, 4864
console = Console(stderr=True)
Works = dict[str, Callable[..., dict[str, Any]]]


def measure(
    fleet: Fleet, vocab: int, works: Works, seed: int
) -> dict[str, dict[str, dict[str, Any]]]:
    """One round: every workload on every peer in turn."""
    results: dict[str, dict[str, Any]] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(works) * len(fleet.alive()))
        for name, work in works.items():
            for peer in fleet.alive():
                progress.update(task, description=f"{name}, {peer.name}")
                found = fleet.turn(peer, lambda peer, work=work: work(peer, vocab, seed))
                if found:
                    results.setdefault(name, {})[peer.name] = found
                else:
                    progress.console.print(fleet.failed[peer.name], style="red", markup=False)
                progress.advance(task)
    return results


def rounds(
    fleet: Fleet, vocab: int, works: Works, count: int, most: int
) -> Iterator[list[dict[str, Any]]]:
    """All rounds so far, after each of them, until `count` have held; at most `most`."""
    entries: list[dict[str, Any]] = []
    isa = fleet.peers[0].setting.isa
    while len(quiet(entries)) < count and len(entries) < most:
        before = canary.canary(isa)
        results = measure(fleet, vocab, works, seed=len(entries))
        after = canary.canary(isa)
        held = not canary.moved(before, after)
        entries.append({"before": before, "after": after, "held": held, "results": results})
        seconds = {
            name: {peer: round(result["seconds"], 2) for peer, result in found.items()}
            for name, found in results.items()
        }
        console.print(f"round {len(entries)}", "quiet" if held else "noisy", seconds)
        yield entries


def quiet(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rounds during which the machine held its speed."""
    return [entry for entry in entries if entry["held"]]


def outcome(entries: list[dict[str, Any]], args: argparse.Namespace, fleet: Fleet) -> Any:
    """The quiet rounds in figures; all rounds, where the machine did not hold for as many."""
    kept = quiet(entries)
    used = kept if len(kept) == args.rounds else entries
    sizes, specs = shapes.SHAPES[args.shape], [peer.spec for peer in fleet.peers]
    return {
        "finished": len(kept) == args.rounds or len(entries) == args.max_rounds,
        "rounds": len(used),
        "noisy_rounds_used": len(used) - len(quiet(used)),
        "noisy_rounds_dropped": len(entries) - len(used),
        "failed": fleet.failed,
        "limits": asdict(Limits(sizes, **entries[-1]["after"])),
        "memory": figures.memory(entries, specs, sizes, fleet.peers[0].setting.kv_tokens),
        "summary": figures.summarise(used, specs, sizes),
        "raw": entries,
    }


def show(report: dict[str, Any]) -> None:
    noisy = f", {report['noisy_rounds_used']} noisy" if report["noisy_rounds_used"] else ""
    for name, summary in report["summary"].items():
        by_peer = {peer: summary[peer] for peer in report["peers"] if peer in summary}
        columns = list(dict.fromkeys(key for found in by_peer.values() for key in found))
        ratios = summary.get("speed_of_ours_over", {})
        table = Table("peer", *columns, "speed of ours over it", title_justify="left")
        table.title = f"{name} ({report['shape']}, {report['rounds']} rounds{noisy})"
        for peer, found in by_peer.items():
            spreads = [found.get(column) for column in columns]
            cells = ["{median:.4g} ({min:.4g}–{max:.4g})".format(**s) if s else "" for s in spreads]
            table.add_row(peer, *cells, f"{ratios[peer]['median']:.2f}" if peer in ratios else "")
        Console().print(table)
    for peer, reason in report["failed"].items():
        console.print(f"{peer} took no part: {reason}", style="red", markup=False)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = list(workloads.WORKLOADS)
    parser.add_argument("--shape", default="qwen3-0.6b", choices=shapes.SHAPES)
    parser.add_argument(
        "--peers",
        nargs="*",
        type=PeerSpec.parse,
        default=[PeerSpec.parse("transformers")],
        help="`trimaran` comes first where none of ours is named",
    )
    parser.add_argument("--workloads", nargs="*", choices=names, default=names[:5])
    parser.add_argument("--rounds", type=int, default=5, help="that the machine held still for")
    parser.add_argument("--max-rounds", type=int, help="noisy ones among them (twice --rounds)")
    parser.add_argument("--growth-to", type=int, default=workloads.GROWTH_CONTEXTS[-1])
    parser.add_argument(
        "--growth-budget", type=float, default=workloads.GROWTH_BUDGET, metavar="SECONDS"
    )
    parser.add_argument("--threads", type=int, default=canary.torch.get_num_threads())
    parser.add_argument("--isa", choices=environments.ISAS, help="cap the instructions of all")
    parser.add_argument("--cache", type=Path, default=environments.CACHE)
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    if not any(spec.is_ours for spec in args.peers):
        args.peers = [PeerSpec.parse("trimaran"), *args.peers]
    args.max_rounds = args.max_rounds or 2 * args.rounds
    return args


def chosen(args: argparse.Namespace) -> Works:
    """The workloads that were asked for, `growth` as far and as long as it may go."""
    growth = partial(
        workloads.run_growth,
        longest=args.growth_to,
        budget=args.growth_budget,
        probe=partial(canary.read_bandwidth, args.isa),
        say=lambda text: console.print(f"growth: {text}"),
    )
    works = workloads.WORKLOADS | {"growth": growth}
    return {name: works[name] for name in args.workloads}


def open_fleet(args: argparse.Namespace) -> Fleet:
    """The peers, not started yet; ends with one line when one is not installed."""
    growth = "growth" in args.workloads
    setting = Setting(
        checkpoint=shapes.make_checkpoint(args.shape, args.cache),
        cache=args.cache,
        threads=args.threads,
        kv_tokens=max(args.growth_to + GROWTH_SPARE_KV if growth else 0, KV_TOKENS),
        max_len=max(args.growth_to + GROWTH_SPARE if growth else 0, MAX_LEN),
        isa=args.isa,
    )
    vocab = shapes.SHAPES[args.shape]["vocab_size"]
    warm_up = workloads.batch_one(vocab, WARM_UP_SEED, output=16)
    try:
        members = [Peer(spec, setting) for spec in args.peers]
    except environments.NotInstalled as error:
        raise SystemExit(str(error)) from None
    return Fleet(members, lambda peer: peer.run(warm_up))


def main() -> None:
    args = parse_args()
    canary.torch.set_num_threads(args.threads)  # as many as every peer has
    fleet = open_fleet(args)
    vocab = shapes.SHAPES[args.shape]["vocab_size"]
    report: dict[str, Any] = {
        "command": " ".join(["benchmarks/run.py", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": canary.describe_machine(),
        "isa_cap": args.isa,
        "shape": args.shape,
        "kv_tokens": fleet.peers[0].setting.kv_tokens,
        "peers": [peer.name for peer in fleet.peers],
        "versions": versions(args),
    }
    try:
        report["agreement"] = agreement(fleet, vocab)
        console.print("agreement", report["agreement"], fleet.failed or "")
        for entries in rounds(fleet, vocab, chosen(args), args.rounds, args.max_rounds):
            report["load_seconds"] = {
                peer.name: round(peer.loaded["seconds"], 2) for peer in fleet.alive()
            }
            report["flags"] = {
                peer.name: peer.loaded["flags"] | peer.variables for peer in fleet.alive()
            }
            # Rounds may take many minutes: what is measured is on disk.
            report |= outcome(entries, args, fleet)
            args.output.write_text(json.dumps(report, indent=1) + "\n")
    finally:
        fleet.close()
    show(report)


def commit() -> str:
    """The checkout that was measured, with a + when it had changes (results aside)."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[1]), *words]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    aside = [":(exclude)benchmarks/results", ":(exclude)docs/cpu.md"]
    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", *aside)
    return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")


def versions(args: argparse.Namespace) -> dict[str, str]:
    """Our own packages, and those of the peers that name them."""
    found = {name: version(name) for name in ("trimaran", "torch", "transformers")}
    for engine in {spec.engine for spec in args.peers} - set(environments.AT_HOME):
        listed = environments.installed(engine, args.isa, args.cache)
        for package in environments.RECIPES[engine].packages:
            name = package.split("==")[0]
            found[name] = next(v for k, v in listed.items() if k.replace("_", "-") == name)
    return found


if __name__ == "__main__":
    main()
