"""`trimaran verify`: two honest platforms agree; one with a seeded bug is caught, layer and all."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from trimaran.cli import main, verify
from trimaran.core.errors import ConfigError
from trimaran.core.types import CompletionOutput, Logprob
from trimaran.core.verification.layers import LayerError, first_at_fault
from trimaran.core.verification.tokens import compare_tokens
from trimaran.platforms.attention_reference import ReferenceAttention
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.interface import AttentionImpl, AttentionSpec, Device, LayerKV

BAD_LAYER = 3
PROMPTS = ["What is the capital of", "Count: one two", "A red"]


class SwappedHeads(ReferenceAttention):
    """In one layer, the first of the query's heads gets what belongs to the second."""

    name = "swapped"

    def __init__(self) -> None:
        self._caches: list[LayerKV] = []

    def alloc(self, device: Device, spec: AttentionSpec, num_blocks: int) -> LayerKV:
        self._caches.append(super().alloc(device, spec, num_blocks))
        return self._caches[-1]

    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Any) -> Tensor:
        found = super().run(query, kv, spec, metadata)
        if kv is self._caches[BAD_LAYER]:
            found = found.clone()
            found[:, [0, 1]] = found[:, [1, 0]]
        return found


class Buggy(CpuPlatform):
    name = "buggy"

    def __init__(self) -> None:
        self._attention = SwappedHeads()

    def attention(self, spec: AttentionSpec) -> Sequence[AttentionImpl]:
        return (self._attention,)


def run_cli(*arguments: str, tmp_path: Path) -> tuple[int, dict[str, Any]]:
    prompts, report = tmp_path / "prompts.txt", tmp_path / "report.json"
    prompts.write_text("\n".join(PROMPTS))
    status = main.main(
        ["verify", "--prompts", str(prompts), "--max-tokens", "8", "--report", str(report)]
        + ["--dtype", "float32", *arguments]
    )
    return status, json.loads(report.read_text())


def test_cpu_and_strict_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, report = run_cli("--platforms", "cpu,strict", tmp_path=tmp_path)
    assert status == 0 and report["agree"] and report["token_agreement"] == 1.0
    assert report["first_layer_at_fault"] is None and len(report["layers"]) == 5
    assert 0 < report["max_logprob_error"] < 1e-3, "two implementations, not one twice"
    assert all(0 <= one["own"] < 1e-3 for one in report["layers"])
    assert "agree" in capsys.readouterr().out


def test_a_seeded_bug_is_caught_at_its_layer(tmp_path: Path) -> None:
    status, report = run_cli("--json", "--platforms", f"cpu,{__name__}:Buggy", tmp_path=tmp_path)
    assert status == 1 and not report["agree"] and report["token_agreement"] < 1
    assert report["first_layer_at_fault"] == BAD_LAYER
    own = [one["own"] for one in report["layers"]]
    assert own[BAD_LAYER] > 1e-3 and max(own[:BAD_LAYER] + own[BAD_LAYER + 1 :]) < 1e-3
    assert report["layers"][-1]["relative"] > 1e-3, "the error stays in the stream"


def completion(tokens: list[int], *tops: dict[int, float]) -> CompletionOutput:
    entries = [{t: Logprob(v, 1) for t, v in top.items()} for top in tops]
    return CompletionOutput(0, "", tokens, logprobs=entries, finish_reason="length")


def test_a_close_call_is_explained_and_a_sure_one_is_not() -> None:
    sure, close = {1: -0.1, 2: -3.0}, {1: -0.70, 2: -0.6999}
    left = completion([1, 1], sure, {1: -0.6999, 2: -0.70})
    right = completion([1, 2], {1: -0.15, 2: -3.0}, close)
    found = compare_tokens(0, left, right, margin=1e-3)
    assert found.explained and (found.first, found.agreed) == (1, 1)
    assert found.margin == pytest.approx(1e-4) and found.logprob_error == pytest.approx(0.05)
    wrong = completion([1, 2], sure, {1: -2.0, 2: -0.1})
    assert not compare_tokens(0, left, wrong, margin=1e-3).explained
    assert not compare_tokens(0, left, completion([1], sure), margin=1e-3).explained
    failed = CompletionOutput(0, "", [], finish_reason="error", stop_reason="NaN")
    assert compare_tokens(0, failed, failed, margin=1e-3).error == "failed: NaN"


def test_nan_is_a_fault() -> None:
    errors = [LayerError(0, 0.0, 0.0, 0.0), LayerError(1, math.nan, math.nan, math.nan)]
    assert first_at_fault(errors, 1.0) == 1


def test_a_report_of_nonsense_is_json() -> None:
    found = compare_tokens(0, completion([1], {1: -0.1}), completion([2], {2: -0.1}), margin=1.0)
    assert found.margin == math.inf, "neither has a second choice"
    report = {"prompts": [dataclasses.asdict(found)], "ends": {"embed": math.nan}, "agree": False}

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(verify.to_json(report), parse_constant=refuse)
    assert read["prompts"][0]["margin"] is None and read["ends"] == {"embed": None}
    assert read["prompts"][0]["first"] == 0 and read["agree"] is False


def test_what_is_asked_wrongly_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two are wanted"):
        verify._two("cpu")
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    with pytest.raises(ConfigError, match="no prompt"):
        verify._read_prompts(str(empty))
    with pytest.raises(ConfigError, match="cannot be read"):
        verify._read_prompts(str(tmp_path / "nothing"))
