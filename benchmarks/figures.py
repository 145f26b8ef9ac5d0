"""From what was measured to figures: per workload and peer, medians with their range over rounds.

`percent_of_limit` is against the bound of the peer's own precision (`limits.py`) at the rates that
the canary found in the same round; the slope of `growth` is against the bandwidth that was probed
beside each pass over the contexts.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

import workloads
from fleet import PeerSpec
from limits import Limits

# The figure that stands for a workload, and what it is called.
MAIN_FIGURE = {
    "batch1": ("decode_tok_s", "tokens/s, batch 1"),
    "batch1_1k": ("decode_tok_s", "tokens/s, batch 1, 1k context"),
    "mixed32": ("output_tok_s", "output tokens/s, 32 at once"),
    "prefill2048": ("prefill_tok_s", "prompt tokens/s, 2,048"),
    "shared_prefix": ("total_s", "s, 16 sharing 1,024 tokens"),
    "prefix_reuse": ("second_ttft_s", "s to first token, cached prefix"),
    "growth": ("slope_over_limit", "slope of ITL over the KV limit"),
    "start": ("start_s", "s from start to first token"),
}
SMALLER_IS_BETTER = frozenset({"shared_prefix", "prefix_reuse", "growth", "start"})


def limits_of(entry: dict[str, Any], spec: PeerSpec, sizes: dict[str, int]) -> Limits:
    return Limits(
        sizes,
        max(entry["before"]["read_gb_s"], entry["after"]["read_gb_s"]),
        max(entry["before"]["gemm_gflop_s"], entry["after"]["gemm_gflop_s"]),
        spec.precision,
        spec.kv,
    )


def figures(name: str, result: dict[str, Any], limits: Limits) -> dict[str, float]:
    """The figures of one peer in one round."""
    rate = result["output_tokens"] / result["seconds"]
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
    if name == "shared_prefix":
        return {"total_s": result["seconds"], "ttft_s": result["ttft"]}
    if name == "prefix_reuse":
        return {"first_ttft_s": result["first_ttft"], "second_ttft_s": result["second_ttft"]}
    if name == "start":
        return {"start_s": result["seconds"], "peak_rss_gib": result["peak_rss_gib"]}
    limit = limits.decode_tokens_per_second(32, 208)
    return {"output_tok_s": rate, "percent_of_limit": 100 * rate / limit}


def measurements(name: str, result: dict[str, Any], limits: Limits) -> list[dict[str, float]]:
    """The figures of one peer in one round: one of each, or one for each pass of `growth`."""
    if name != "growth":
        return [figures(name, result, limits)]
    return [
        growth_figures(each["points"], replace(limits, read_gb_s=each["read_gb_s"]))
        for each in result["passes"]
    ]


def growth_figures(points: list[list[float]], limits: Limits) -> dict[str, float]:
    """ITL = slope · context + intercept, by least squares; the slope over what reading the KV
    cache alone takes. Nothing can be fitted to fewer than two points."""
    reached = {"longest_context": points[-1][0], "itl_at_longest_ms": 1e3 * points[-1][1]}
    if len(points) < 2:
        return reached
    contexts, seconds = zip(*points, strict=True)
    slope, intercept = statistics.linear_regression(contexts, seconds)
    return reached | {
        "slope_us_per_token": 1e6 * slope,
        "intercept_ms": 1e3 * intercept,
        "slope_over_limit": slope / limits.seconds_per_context_token(),
        "read_gb_s": limits.read_gb_s,
    }


def summarise(
    kept: list[dict[str, Any]], specs: list[PeerSpec], sizes: dict[str, int]
) -> dict[str, Any]:
    """By workload: figures by peer, the ratio of each peer's seconds to our first one's."""
    by_name = {spec.name: spec for spec in specs}
    ours = next(spec.name for spec in specs if spec.is_ours)
    summary: dict[str, Any] = {}
    for name in (name for name in workloads.WORKLOADS if name in kept[0]["results"]):
        # Peers that failed on the way have no figures.
        present = set.intersection(*(set(entry["results"].get(name, ())) for entry in kept))
        for peer in (spec.name for spec in specs if spec.name in present):
            values = []
            for entry in kept:
                limits = limits_of(entry, by_name[peer], sizes)
                values += measurements(name, entry["results"][name][peer], limits)
            keys = [key for key in values[0] if all(key in value for value in values)]
            summary.setdefault(name, {})[peer] = {
                key: spread([value[key] for value in values]) for key in keys
            }
        if ours in present:
            summary[name]["speed_of_ours_over"] = {
                peer: spread([_ratio(entry["results"][name], peer, ours) for entry in kept])
                for peer in summary[name]
                if peer != ours
            }
    return summary


def _ratio(results: dict[str, dict[str, Any]], peer: str, ours: str) -> float:
    """How much longer the peer took for the same tokens."""
    return results[peer]["seconds"] / results[ours]["seconds"]


def memory(
    entries: list[dict[str, Any]], specs: list[PeerSpec], sizes: dict[str, int], kv_tokens: int
) -> dict[str, dict[str, float]]:
    """Peak resident memory of each peer over the run, beside its weights and KV cache."""
    found = {}
    for spec in specs:
        peaks = [
            results[spec.name]["peak_rss_gib"]
            for entry in entries
            for results in entry["results"].values()
            if spec.name in results
        ]
        if peaks:
            needed = limits_of(entries[-1], spec, sizes).memory_gib(kv_tokens)
            found[spec.name] = {
                "peak_rss_gib": round(max(peaks), 3),
                "weights_and_kv_gib": round(needed, 3),
                "ratio": round(max(peaks) / needed, 3),
            }
    return found


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }
