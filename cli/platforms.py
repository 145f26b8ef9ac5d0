"""`trimaran platforms`: what is here, what was chosen for each op, and why not the rest."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Any

from ..core.args import EngineArgs
from ..core.errors import TrimaranError
from .serve import add_model, take_model

if TYPE_CHECKING:
    import torch

    from ..core.models.spec import DecoderSpec
    from ..core.ops import OpBinder

BLOCK_SIZE = 32
DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--platform", default="auto", help="Show the ops of this platform.")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def run(namespace: argparse.Namespace) -> int:
    take_model(namespace)
    report = build_report(
        getattr(namespace, "model", EngineArgs().model), namespace.platform, namespace.dtype
    )
    if namespace.json:
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        _print(report)
    return 0 if report["chosen"] else 1


def build_report(model: str, platform_name: str, dtype: str) -> dict[str, Any]:
    """Platforms with scores and reasons; for the chosen one, its facts and its ops for `model`."""
    from ..core.platform import make_platform
    from ..platforms.registry import available

    report: dict[str, Any] = {"platforms": [], "chosen": None, "facts": {}, "ops": []}
    for candidate in available():
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
        platform = make_platform(platform_name)
        report["chosen"] = platform.name
        report["facts"] = dict(platform.describe())
        report["ops"] = _ops(platform, model, dtype)
    except TrimaranError as error:
        report["error"] = error.message
    return report


def _ops(platform: Any, model: str, dtype_name: str) -> list[dict[str, Any]]:
    import torch

    from ..core.model_files import read_hf_config, resolve_model_path
    from ..core.models.registry import decoder_spec
    from ..core.ops import OpBinder

    spec = decoder_spec(read_hf_config(resolve_model_path(model), {}))
    binder = OpBinder(platform)
    bind_model(binder, spec, getattr(torch, dtype_name))
    return [
        {
            "op": binding.op,
            "signature": _signature(binding.signature),
            "chosen": binding.chosen,
            "refused": [dataclasses.asdict(one) for one in binding.refused],
        }
        for binding in binder.report()
    ]


def bind_model(binder: OpBinder, spec: DecoderSpec, dtype: torch.dtype) -> None:
    """Binds what a model of this shape binds when it is built."""
    hidden, width = spec.hidden_size, spec.intermediate_size
    heads = spec.num_heads * spec.head_dim
    merged = heads + 2 * spec.num_kv_heads * spec.head_dim
    binder.bind("embed", dtype, vocab=spec.vocab_size, hidden=hidden)
    for size in {hidden, spec.head_dim} if spec.qk_norm else {hidden}:
        binder.bind("rms_norm", dtype, size=size)
    binder.bind("add_rms_norm", dtype, size=hidden)
    for fan_in, fan_out in (
        (hidden, merged),
        (heads, hidden),
        (hidden, 2 * width),
        (width, hidden),
        (hidden, spec.vocab_size),
    ):
        binder.bind("linear", dtype, in_features=fan_in, out_features=fan_out)
    binder.bind("rope", dtype, head_dim=spec.head_dim, rope_dim=spec.rope.dim)
    binder.bind(spec.activation, dtype, size=width)
    binder.bind("add", dtype, size=hidden)
    for group in spec.cache_groups():
        binder.attention(
            spec.attention_spec(group, dtype=dtype, kv_dtype=dtype, block_size=BLOCK_SIZE)
        )


def _signature(signature: Any) -> dict[str, Any]:
    values = {field.name: getattr(signature, field.name) for field in dataclasses.fields(signature)}
    sizes = values.pop("sizes", {})
    values.pop("op", None)
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
    table = Table("platform", "score", "devices", "reason", title="Platforms", title_justify="left")
    for one in report["platforms"]:
        chosen = one["name"] == report["chosen"]
        devices = ", ".join(str(device.get("name", "")) for device in one["devices"])
        name = f"[bold]{one['name']}[/bold] (chosen)" if chosen else one["name"]
        table.add_row(name, str(one["score"]), escape(devices), escape(one["reason"]))
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
