"""`trimaran bench throughput|latency|serve`."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from typing import Any

KINDS = {
    "throughput": "Tokens a second over many prompts at once, in this process.",
    "latency": "Time for one batch, in this process.",
    "serve": "A running server under load: TTFT, ITL, tokens a second.",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    for name, help in KINDS.items():
        sub = kinds.add_parser(name, help=help, description=help, allow_abbrev=False)
        import_module(f".bench_{name}", __package__).add_arguments(sub)
        sub.add_argument("--json", action="store_true", help="Print JSON.")


def run(namespace: argparse.Namespace) -> int:
    result: dict[str, Any] = import_module(f".bench_{namespace.kind}", __package__).run(namespace)
    if namespace.json:
        json.dump(result, sys.stdout, indent=2)
        print()
        return 0
    width = max(map(len, result))
    for name, value in result.items():
        print(
            f"{name:<{width}}  {value:,.4g}"
            if isinstance(value, float)
            else f"{name:<{width}}  {value}"
        )
    return 0
