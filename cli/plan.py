"""`trimaran plan MODEL`: what a model needs and how fast it can be, before anything is loaded."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from ..core.args import EngineArgs, flag_fields
from ..core.errors import TrimaranError
from .flags import add_flags, build, number
from .serve import take_model

# What decides about bytes and speed.
SHOWN = (
    "platform",
    "dtype",
    "kv_cache_dtype",
    "attention_backend",
    "quantization",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "enable_chunked_prefill",
    "tensor_parallel_size",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "block_size",
    "revision",
    "hf_overrides",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    help = "Directory, config.json, hub id in the local cache, or `default` (the model in the box)."
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help=help)
    parser.add_argument("--model", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--device",
        dest="planned_device",
        metavar="NAME",
        help="Index of a device here, or a name that a platform describes (`h200`; `all` of them). "
        "Left out: every device here.",
    )
    parser.add_argument(
        "--context",
        type=number(int, 1),
        metavar="TOKENS",
        help="Length of the sequences that batches are planned for (--max-model-len, or 4096).",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    others = [field.name for field in flag_fields(EngineArgs) if field.name not in SHOWN]
    add_flags(parser, EngineArgs, skip=others)


def run(namespace: argparse.Namespace) -> int:
    take_model(namespace)
    report = build_report(build(EngineArgs, namespace), namespace.planned_device, namespace.context)
    if namespace.json:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        _print(report)
    return 0 if report["plans"] else 1


def build_report(
    args: EngineArgs, device: str | None = None, context: int | None = None
) -> dict[str, Any]:
    """A plan for each device, and the reason against each that has none."""
    from ..core.planning.model import read_model
    from ..core.planning.planner import plan
    from ..core.planning.targets import find_targets

    facts = read_model(args)
    report: dict[str, Any] = {"model": args.model, "plans": [], "refused": []}
    for target in find_targets(args.platform, device):
        own = dataclasses.replace(args, device=target.index)
        try:
            report["plans"].append(plan(facts, own, target, context).to_json())
        except Exception as error:  # a vendor's may be any: one device must not spoil the others
            reason = error.message if isinstance(error, TrimaranError) else repr(error)
            refusal = {"platform": target.platform.name, "device": target.title}
            report["refused"].append(refusal | {"reason": reason})
    return report


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    for one in report["plans"]:
        _print_plan(console, one)
    for one in report["refused"]:
        title = f"{report['model']} on {one['platform']}, {one['device']}: no plan."
        console.print(f"{title} {one['reason']}", style="red", markup=False)


def _print_plan(console: Any, one: dict[str, Any]) -> None:
    here = "" if one["present"] else " (described, not here)"
    title = f"{one['model']} ({one['architecture']}) on {one['platform']}: {one['device']}{here}"
    console.print(title, style="bold", markup=False)
    settings = ", ".join(f"{k}={v}" for k, v in one["settings"].items() if v is not None)
    console.print(f"  {settings}", markup=False)
    for section, figures in one["sections"].items():
        console.print(f"  {section}", markup=False)
        for name, figure in figures.items():
            value = readable_figure(figure["value"], figure["unit"])
            console.print(f"    {name:<24}{value:>20}  {figure['source']}", markup=False)
    for finding in one["findings"]:
        value = "" if finding["value"] is None else f"={finding['value']}"
        text = f"  {finding['kind']}: {finding['field']}{value}: {finding['reason']}"
        console.print(text, style="red" if finding["kind"] == "reject" else None, markup=False)
    for note in one["notes"]:
        console.print(f"  note: {note}", markup=False)
    console.print()


def readable_figure(value: float | None, unit: str) -> str:
    """`1.109 GiB`, `596,049,920`, `24.6 tokens/s`; `unknown` for None."""
    from ..core.sizing import readable

    if value is None:
        return "unknown"
    if unit == "bytes":
        return readable(value)
    if unit == "bytes/s":
        return f"{value / 1e9:.4g} GB/s"
    if unit == "flop/s":
        return f"{value / 1e12:.4g} Tflop/s"
    if unit == "elements":
        return f"{value:,.0f}"
    shown = f"{value:,.0f}" if float(value).is_integer() else f"{value:,.4g}"
    return f"{shown} {unit}"
