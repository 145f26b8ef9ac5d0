"""`trimaran platforms`: what is here, what was chosen for each op, and why not the rest."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from ..core.args import EngineArgs, flag_fields
from ..core.errors import TrimaranError
from .flags import add_flags, build, number
from .serve import add_model, take_model

# What decides between implementations.
SHOWN = (
    "platform",
    "dtype",
    "kv_cache_dtype",
    "attention_backend",
    "quantization",
    "block_size",
    "revision",
    "hf_overrides",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    others = [field.name for field in flag_fields(EngineArgs) if field.name not in SHOWN]
    add_flags(parser, EngineArgs, skip=others)
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    parser.add_argument(
        "--rescan",
        action="store_true",
        help="Try installed platforms again that were tried before.",
    )
    parser.add_argument(
        "--trial-seconds",
        type=number(float, 1),
        metavar="S",
        help="What importing and probing an installed platform may take, the first time.",
    )


def run(namespace: argparse.Namespace) -> int:
    from ..platforms import registry
    from ..platforms.loading import TRIAL_SECONDS

    take_model(namespace)
    if namespace.rescan:
        registry.forget()
    report = build_report(build(EngineArgs, namespace), namespace.trial_seconds or TRIAL_SECONDS)
    if namespace.json:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        _print(report)
    return 0 if report["chosen"] and "error" not in report else 1


def build_report(args: EngineArgs, trial_seconds: float) -> dict[str, Any]:
    """Platforms with scores and reasons; for the chosen one, its facts and the model's ops."""
    from ..core.platform import make_platform
    from ..platforms.registry import available

    report: dict[str, Any] = {"platforms": [], "chosen": None, "facts": {}, "ops": []}
    for candidate in available(trial_seconds):
        report["platforms"].append(
            {
                "name": candidate.name,
                "usable": candidate.usable,
                "score": candidate.probe.score,
                "reason": candidate.probe.reason,
                "origin": candidate.origin,
                "devices": [dataclasses.asdict(one) for one in candidate.probe.devices],
            }
        )
    try:
        platform = make_platform(args.platform)
        report["chosen"] = platform.name
        report["facts"] = _facts(platform)
        report["ops"] = _ops(platform, args)
    except TrimaranError as error:
        report["error"] = error.message
    return report


def _facts(platform: Any) -> dict[str, str]:
    """What the platform says of itself; that it cannot is a fact, too."""
    try:
        return dict(platform.describe())
    except Exception as error:
        return {"describe": f"fails: {type(error).__name__}: {error}"}


def _ops(platform: Any, args: EngineArgs) -> list[dict[str, Any]]:
    from .bindings import bindings_of

    return [
        {
            "op": binding.op,
            "signature": _signature(binding.signature),
            "chosen": binding.chosen,
            "refused": [dataclasses.asdict(one) for one in binding.refused],
        }
        for binding in bindings_of(platform, args)
    ]


def _signature(signature: Any) -> dict[str, Any]:
    from ..platforms.interface import DENSE

    values = {field.name: getattr(signature, field.name) for field in dataclasses.fields(signature)}
    sizes = values.pop("sizes", {})
    values.pop("op", None)
    if values.get("weight_format") == DENSE:
        del values["weight_format"]
    plain = (int, float, bool, str, type(None))
    return {
        name: value if isinstance(value, plain) else str(value).removeprefix("torch.")
        for name, value in {**values, **sizes}.items()
    }


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False)
    columns = ("platform", "score", "from", "devices", "reason")
    table = Table(*columns, title="Platforms", title_justify="left")
    for one in report["platforms"]:
        chosen = one["name"] == report["chosen"]
        devices = ", ".join(str(device.get("name", "")) for device in one["devices"])
        name = escape(one["name"])
        name = f"[bold]{name}[/bold] (chosen)" if chosen else name
        origin, reason = escape(one["origin"]), escape(one["reason"])
        table.add_row(name, str(one["score"]), origin, escape(devices), reason)
    console.print(table)
    for name, value in report["facts"].items():
        console.print(f"  {name}: {value}", markup=False)
    if report["ops"]:
        ops = Table("op", "sizes", "chosen", "not chosen", title="Ops", title_justify="left")
        for one in report["ops"]:
            sizes = ", ".join(f"{key}={value}" for key, value in one["signature"].items())
            refused = "; ".join(f"{other['name']}: {other['reason']}" for other in one["refused"])
            ops.add_row(one["op"], sizes, one["chosen"], escape(refused))
        console.print(ops)
    if "error" in report:
        console.print(report["error"], style="red", markup=False)
