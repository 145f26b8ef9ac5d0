"""`trimaran verify MODEL --platforms A,B`: the same prompts on two platforms."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

from ..core.args import EngineArgs, flag_fields
from ..core.errors import ConfigError
from .flags import add_flags, build, check_writable, number
from .serve import add_model, take_model

SHOWN = ("dtype", "kv_cache_dtype", "max_model_len", "revision", "hf_overrides", "num_threads")
PROMPTS = (
    "The capital of France is",
    "Q: What is 17 plus 25?\nA:",
    "Once upon a time there was a small",
    "def fibonacci(n):\n",
    "List three colours:\n1.",
    "The weather today is",
)
MAX_MODEL_LEN = 2048
TOP = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--platforms",
        required=True,
        metavar="A,B",
        help="The reference and the one that is checked, by name or as module:Class.",
    )
    parser.add_argument("--prompts", metavar="FILE", help="One prompt a line (six of our own).")
    parser.add_argument(
        "--max-tokens", type=number(int, 1), default=32, metavar="N", help="Tokens a prompt (32)."
    )
    parser.add_argument(
        "--margin",
        type=number(float, 0),
        metavar="NATS",
        help="Lead of a token over the next that rounding may overturn (by dtype).",
    )
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    parser.add_argument("--report", metavar="FILE", help="Write the JSON to a file as well.")
    others = [field.name for field in flag_fields(EngineArgs) if field.name not in SHOWN]
    add_flags(parser, EngineArgs, skip=others)


def run(namespace: argparse.Namespace) -> int:
    take_model(namespace)
    if namespace.report:
        check_writable(namespace.report)
    report = build_report(
        build(EngineArgs, namespace),
        _two(namespace.platforms),
        _read_prompts(namespace.prompts),
        namespace.max_tokens,
        namespace.margin,
    )
    text = to_json(report)
    if namespace.report:
        Path(namespace.report).write_text(text + "\n", encoding="utf-8")
    if namespace.json:
        sys.stdout.write(text + "\n")
    else:
        _print(report)
    return 0 if report["agree"] else 1


def to_json(report: dict[str, Any]) -> str:
    """JSON has no infinities and no NaN, which are what broken platforms yield: null instead."""
    return json.dumps(_finite(report), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _two(text: str) -> tuple[str, str]:
    names = [name.strip() for name in text.split(",")]
    if len(names) != 2 or not all(names):
        raise ConfigError(f"--platforms is {text!r}: two are wanted, as in cpu,strict.")
    return names[0], names[1]


def _read_prompts(file: str | None) -> list[str]:
    if file is None:
        return list(PROMPTS)
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {file} cannot be read: {error}.") from None
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts {file} holds no prompt.")
    return prompts


def build_report(
    args: EngineArgs,
    platforms: tuple[str, str],
    prompts: list[str],
    max_tokens: int,
    margin: float | None = None,
) -> dict[str, Any]:
    """Tokens of whole engines and layers of their decoders, one platform after the other."""
    from ..core.verification.layers import LAYER_ERRORS, compare_layers, end_errors, first_at_fault
    from ..core.verification.tokens import MARGINS, compare_tokens

    dtype = _common_dtype(args, platforms[0])
    margin = MARGINS[dtype] if margin is None else margin
    args = dataclasses.replace(
        args, dtype=dtype, max_num_seqs=8, max_model_len=args.max_model_len or _length(args)
    )
    reference, trace = _run(args, platforms[0], prompts, max_tokens, None)
    other, found = _run(args, platforms[1], prompts, max_tokens, trace)
    pairs = enumerate(zip(reference, other, strict=True))
    agreements = [compare_tokens(index, *pair, margin) for index, pair in pairs]
    layers = compare_layers(trace, found)
    total = sum(one.tokens for one in agreements)
    return {
        "model": args.model,
        "platforms": list(platforms),
        "dtype": dtype,
        "margin": margin,
        "layer_limit": LAYER_ERRORS[dtype],
        "agree": all(one.explained for one in agreements),
        "token_agreement": sum(one.agreed for one in agreements) / total if total else 1.0,
        "max_logprob_error": max((one.logprob_error for one in agreements), default=0.0),
        "first_layer_at_fault": first_at_fault(layers, LAYER_ERRORS[dtype]),
        "prompts": [dataclasses.asdict(one) for one in agreements],
        "layers": [dataclasses.asdict(one) for one in layers],
        "ends": end_errors(trace, found),
    }


def _common_dtype(args: EngineArgs, reference: str) -> str:
    """What `auto` is on the reference: both have to compute in the same."""
    from ..core.dtypes import choose_dtype, dtype_name
    from ..core.model_files import read_hf_config, resolve_model_path
    from ..core.platform import make_platform

    config = read_hf_config(resolve_model_path(args.model, args.revision), args.hf_overrides)
    known = make_platform(reference).capabilities()
    return dtype_name(choose_dtype(args.dtype, config, known, reference))


def _length(args: EngineArgs) -> str:
    from ..core.model_files import read_hf_config, resolve_model_path
    from ..core.models.registry import decoder_spec

    config = read_hf_config(resolve_model_path(args.model, args.revision), args.hf_overrides)
    return str(min(MAX_MODEL_LEN, decoder_spec(config).max_positions))


def _run(
    args: EngineArgs, platform: str, prompts: list[str], max_tokens: int, given: Any
) -> tuple[list[Any], Any]:
    """(one completion a prompt, the trace of the first prompt's layers)."""
    from ..core.engine.inproc import InprocClient
    from ..core.executor import UniExecutor
    from ..core.llm import LLM
    from ..core.sampling_params import SamplingParams
    from ..core.verification.layers import PROBE_TOKENS, trace_layers

    client = InprocClient.from_args(dataclasses.replace(args, platform=platform))
    with LLM.from_client(client) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, logprobs=TOP)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        executor = client.engine.executor
        assert isinstance(executor, UniExecutor)
        token_ids = outputs[0].prompt_token_ids[:PROBE_TOKENS]
        trace = trace_layers(executor.model, executor.device, token_ids, given)
    return [output.outputs[0] for output in outputs], trace


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    first, second = report["platforms"]
    verdict = "agree" if report["agree"] else "DISAGREE"
    print(f"{report['model']} in {report['dtype']}: {first} and {second} {verdict}")
    print(f"  token agreement: {report['token_agreement']:.2%}")
    print(f"  largest difference of log-probabilities: {report['max_logprob_error']:.3g}")
    for one in report["prompts"]:
        if one["first"] is not None or one["error"]:
            said = "within" if one["explained"] else "beyond"
            line = (
                f"  prompt {one['prompt']}: first differs at token {one['first']}, where the "
                f"log-probabilities are {one['margin']:.3g} apart: {said} {report['margin']:g}"
            )
            print(f"{line} ({one['error']})" if one["error"] else line)
    table = Table("layer", "max error", "stream", "own", title="Layers", title_justify="left")
    for one in report["layers"]:
        row = [f"{one[name]:.3g}" for name in ("max_abs", "relative", "own")]
        table.add_row(str(one["layer"]), *row)
    console.print(table)
    ends = ", ".join(f"{name} {value:.3g}" for name, value in report["ends"].items())
    print(f"  elsewhere: {ends}")
    fault = report["first_layer_at_fault"]
    if fault is not None:
        print(f"  first layer at fault: {fault} (own error over {report['layer_limit']:g})")
