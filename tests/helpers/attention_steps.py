"""Steps of paged attention: layers and batches that every implementation is tried with."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from trimaran.conformance.paged import TOLERANCE, Program
from trimaran.platforms.host_device import HostDevice
from trimaran.platforms.interface import AttentionImpl, AttentionSpec

BASE = AttentionSpec(
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    scale=0.125,
    dtype=torch.float32,
    kv_dtype=torch.float32,
    block_size=16,
)
SLOPES = (0.25, -0.01, 0.0, 2**-8)
"""As trained models have them and as none has: rising with the distance, and none."""
SPECS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_kv_heads": 4},
    "mqa": {"num_kv_heads": 1},
    "odd block": {"block_size": 7},
    "block 24": {"block_size": 24},
    "block of one": {"block_size": 1},
    "head 80": {"head_dim": 80},
    "head 256": {"head_dim": 256, "num_heads": 2, "num_kv_heads": 1},
    "window": {"sliding_window": 20},
    "window of one": {"sliding_window": 1},
    "window odd block": {"sliding_window": 9, "block_size": 7},
    "softcap": {"softcap": 3.0},
    "softcap window": {"softcap": 3.0, "sliding_window": 20},
    "not causal": {"causal": False},
    "alibi": {"alibi_slopes": SLOPES},
    "alibi mqa": {"alibi_slopes": SLOPES, "num_kv_heads": 1},
    "alibi softcap window": {"alibi_slopes": SLOPES, "softcap": 3.0, "sliding_window": 20},
    "alibi not causal": {"alibi_slopes": SLOPES, "causal": False},
    "alibi bfloat16": {
        "alibi_slopes": SLOPES,
        "dtype": torch.bfloat16,
        "kv_dtype": torch.bfloat16,
    },
    "bfloat16": {"dtype": torch.bfloat16, "kv_dtype": torch.bfloat16},
    "bfloat16 window": {
        "dtype": torch.bfloat16,
        "kv_dtype": torch.bfloat16,
        "sliding_window": 20,
    },
    "float16": {"dtype": torch.float16, "kv_dtype": torch.float16},
    "float16 softcap": {"dtype": torch.float16, "kv_dtype": torch.float16, "softcap": 3.0},
    "narrow cache": {"kv_dtype": torch.bfloat16},
}

# (queries, length) of each sequence in a step.
STEPS: dict[str, list[tuple[int, int]]] = {
    "one token": [(1, 1)],
    "one decode": [(1, 45)],
    "equal decodes": [(1, 33)] * 4,
    "decodes": [(1, 3), (1, 50), (1, 17), (1, 16), (1, 49)],
    "very different decodes": [(1, 2), (1, 400), (1, 5), (1, 390), (1, 7)],
    "one prefill": [(70, 70)],
    "prefills": [(40, 40), (39, 39), (8, 8), (40, 40)],
    "chunk": [(40, 90)],
    "few": [(3, 50), (2, 48), (4, 51)],
    "mixed": [(1, 60), (30, 30), (5, 64), (1, 1), (90, 120), (1, 61), (1, 300)],
}


def spec_of(name: str) -> AttentionSpec:
    return dataclasses.replace(BASE, **SPECS[name])


def run_step(
    spec: AttentionSpec, impl: AttentionImpl, step: list[tuple[int, int]], seed: int = 0
) -> tuple[Tensor, Tensor]:
    program = Program(spec, impl, HostDevice(), seed)
    for sequence, (queries, length) in enumerate(step):
        if length > queries:
            program.extend(sequence, length - queries)
    return outcome(program, [(sequence, queries) for sequence, (queries, _) in enumerate(step)])


def outcome(program: Program, work: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    step = program.step(work)
    assert not step.touched
    return step.found, step.expected


def check(spec: AttentionSpec, found: Tensor, expected: Tensor) -> None:
    assert found.dtype == spec.dtype and found.shape == expected.shape
    tolerance = TOLERANCE[spec.dtype]
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
