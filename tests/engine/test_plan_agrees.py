"""Plans against what really is allocated: the allocator's own bytes and the process's growth, on
real shapes with random weights. Each load runs in a process of its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import pytest

from trimaran.core.args import EngineArgs
from trimaran.core.planning.model import read_model
from trimaran.core.planning.planner import plan
from trimaran.core.planning.targets import Target
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.interface import MemoryInfo

TESTS = Path(__file__).parent.parent
CONFIGS = TESTS / "data" / "configs"
WITHIN = 0.02
NOISE = 8 << 20
"""Bytes by which a process grows or shrinks whatever is loaded: stacks, arenas, code."""

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(900)]


def engine_values(directory: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": str(directory),
        "platform": "cpu",
        "load_format": "dummy",
        "max_model_len": "4096",
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": "1g",
        **more,
    }


def directory_of(name: str, root: Path) -> Path:
    shutil.copy(CONFIGS / f"{name}.json", root / "config.json")
    return root


def planned(values: dict[str, Any]) -> dict[str, float]:
    """The plan's `memory` figures, from config.json alone."""
    args = EngineArgs(**values)
    platform = CpuPlatform()
    memory = MemoryInfo(64 << 30, 64 << 30, {})
    target = Target(platform, 0, "host", True, platform.capabilities(), memory, None)
    section = plan(read_model(args), args, target).sections["memory"]
    return {name: figure.value or 0 for name, figure in section.items()}


def loaded(values: dict[str, Any], prefill: int = 0) -> dict[str, Any]:
    """What a process that loads it says it holds."""
    free = psutil.virtual_memory().available
    # In 16 bits a weight and its packed form stand beside each other, and one of them in fp32.
    if free < 3 * planned(values)["weights"] + (2 << 30):
        pytest.skip(f"only {free / 2**30:.1f} GiB of memory are free")
    child = subprocess.run(
        [sys.executable, str(TESTS / "helpers" / "load_child.py")]
        + [json.dumps({**values, "prefill": prefill})],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "PYTHONPATH": str(TESTS)},
        check=False,
    )
    assert child.returncode == 0, child.stderr[-2000:]
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


def check(values: dict[str, Any], prefill: int = 0) -> tuple[dict[str, float], dict[str, Any]]:
    """The allocator by tag, then the process, against the plan."""
    wanted, found = planned(values), loaded(values, prefill)
    by_tag = found["by_tag"]
    assert by_tag["weights"] == pytest.approx(wanted["weights"], rel=WITHIN)
    assert by_tag["step"] == pytest.approx(wanted["step buffers"], rel=WITHIN)
    assert by_tag["rows"] == pytest.approx(wanted["rows"], rel=WITHIN)
    block = wanted["KV block, full"]
    assert by_tag["kv"] % block == 0, "whole blocks"
    # The cache is taken page by page as it is used: none of it is in the process yet.
    held = wanted["weights"] + wanted["step buffers"] + wanted["rows"]
    assert found["grown"] == pytest.approx(held, rel=WITHIN, abs=NOISE)
    return wanted, found


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_qwen3_06b_whole(dtype: str, tmp_path: Path) -> None:
    check(engine_values(directory_of("qwen3-0.6b", tmp_path), dtype=dtype))


@pytest.mark.parametrize(("name", "layers"), [("llama-3.1-8b", 1), ("qwen3-8b", 1)])
def test_8b_shapes_with_one_layer(name: str, layers: int, tmp_path: Path) -> None:
    over = {"num_hidden_layers": layers}
    check(engine_values(directory_of(name, tmp_path), dtype="bfloat16", hf_overrides=over))


@pytest.mark.parametrize("name", ["llama-3.1-8b", "llama-3.1-70b", "qwen3-8b"])
def test_layers_extrapolate_to_the_whole(name: str, tmp_path: Path) -> None:
    """One layer more, by the allocator, times the layers of the real model: the plan's body. The
    tables are of 1,024 words here; those of 8B models are whole in the test above."""
    directory = directory_of(name, tmp_path)
    layers = json.loads((CONFIGS / f"{name}.json").read_text())["num_hidden_layers"]

    @cache
    def allocated(count: int) -> int:
        over = {"num_hidden_layers": count, "vocab_size": 1024}
        values = engine_values(directory, dtype="bfloat16", hf_overrides=over)
        return int(loaded(values)["by_tag"]["weights"])

    whole = allocated(1) + (layers - 1) * (allocated(2) - allocated(1))
    values = engine_values(directory, dtype="bfloat16", hf_overrides={"vocab_size": 1024})
    assert planned(values)["weights"] == pytest.approx(whole, rel=WITHIN)


def test_the_peak_of_a_step_is_of_the_planned_size(tmp_path: Path) -> None:
    """Loosely: attention and libraries take memory of their own inside an op. In fp32, where no
    conversions are made; the cache's pages that the step fills are counted off."""
    over = {"num_hidden_layers": 2}
    values = engine_values(directory_of("qwen3-0.6b", tmp_path), dtype="float32", hf_overrides=over)
    wanted, found = check(values, prefill=2048)
    assert found["error"] is None
    peak = found["peak"] - 2048 * wanted["KV a token"]
    assert wanted["activations"] * 0.7 < peak < wanted["activations"] * 3
