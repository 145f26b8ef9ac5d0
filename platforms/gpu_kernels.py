"""Which tuning table of the portable kernels a card gets, and whether Triton can run them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ..kernels_cuda.portable.tuning import Table, load
from .interface import (
    AttentionImpl,
    OpImpl,
    StepFn,
    StepGraph,
    WeightPacker,
)
from .user_environment import fuse_unless_told

ROOT = Path(__file__).resolve().parents[1]
GENERIC = "generic"
RELATIVES = {
    "sm_86": "sm_89",
    "sm_87": "sm_80",
    "sm_103": "sm_100",
    "sm_110": "sm_100",
    "sm_121": "sm_120",
    "gfx1101": "gfx1100",
    "gfx1102": "gfx1100",
    "gfx1103": "gfx1100",
    "gfx1150": "gfx1100",
    "gfx1151": "gfx1100",
}
"""Architectures without a table of their own -> the one whose blocks have no more shared memory
than theirs, and the same matrix units or fewer."""


@functools.cache
def table_for(architecture: str) -> Table:
    """The tuning table of an architecture: its own, a relative's, or what any GPU can run."""
    name = RELATIVES.get(architecture, architecture)
    for owner in ("kernels_cuda", "kernels_hip"):
        path = ROOT / owner / "tuning" / f"{name}.toml"
        if path.exists():
            return load(path)
    return load(ROOT / "kernels_cuda" / "tuning" / f"{GENERIC}.toml")


@functools.cache
def triton_missing() -> str:
    """Why the portable kernels cannot run; empty: they can."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported: {error}"
    return ""


def _with_triton(module: str) -> Any:
    """A neighbour that imports Triton: a second that no other platform has to wait for."""
    fuse_unless_told()
    return importlib.import_module(f".{module}", __package__)


def portable_ops(table: Table, cards: Collection[str]) -> Sequence[OpImpl]:
    """All ops of the portable kernels. Only where Triton is."""
    weights = _with_triton("gpu_weights")
    ops = _with_triton("gpu_triton").triton_ops(table)
    scaled = _with_triton("gpu_scaled_mm").ScaledMm(table, cards)
    return (*ops, scaled, weights.QuantizedLinear(table), weights.TritonMoe(table))


def portable_packers(table: Table) -> Sequence[WeightPacker]:
    packers: Sequence[WeightPacker] = _with_triton("gpu_weights").gpu_packers(table)
    return packers


def portable_attention(table: Table) -> AttentionImpl:
    attention: AttentionImpl = _with_triton("gpu_attention").TritonAttention(table)
    return attention


def build_portable_step(graph: StepGraph) -> StepFn | None:
    """The step by the portable kernels."""
    built: StepFn | None = _with_triton("gpu_step").compile_step(graph)
    return built


def describe_kernels(origin: str) -> str:
    """One line for people; `origin` says which table they are launched with."""
    if triton_missing():
        return f"torch's own; {triton_missing()}"
    version = importlib.import_module("triton").__version__
    return f"Triton {version}, {origin}"
