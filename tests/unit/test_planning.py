"""`trimaran plan`: counts against published ones, formulas by hand, devices that are described."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.native import needs_native

from trimaran.cli.plan import build_report, readable_figure
from trimaran.core import resolve as resolve_module
from trimaran.core.args import EngineArgs
from trimaran.core.errors import ConfigError, ModelLoadError, PlatformError
from trimaran.core.executor import UniExecutor
from trimaran.core.planning import targets as targets_module
from trimaran.core.planning.memory import activation_bytes
from trimaran.core.planning.model import AttentionShape, Parameters, read_model
from trimaran.core.planning.planner import plan
from trimaran.core.planning.report import Plan
from trimaran.core.planning.started import describe_memory, differs
from trimaran.core.planning.targets import Target, find_targets
from trimaran.core.resolve import resolve
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.cpu_linear import CpuDensePacker, fbgemm_refusal
from trimaran.platforms.cpu_roofline import measured_roofline
from trimaran.platforms.interface import (
    Capabilities,
    DeviceSpec,
    Finding,
    MemoryInfo,
    Probe,
    Roofline,
    StepLimits,
    WeightPacker,
)
from trimaran.platforms.ops import DensePacker
from trimaran.platforms.registry import Candidate
from trimaran.platforms.strict import StrictKnobs, StrictPlatform

CONFIGS = Path(__file__).parent.parent / "data" / "configs"

PUBLISHED = {
    # The element totals of the checkpoints' safetensors, as their model cards show them.
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "qwen3-30b-a3b": 30_532_122_624,
    "mixtral-8x7b": 46_702_792_704,
    # README_WEIGHTS.md of deepseek-ai/DeepSeek-V3: "671B" without the MTP module.
    "deepseek-v3": 671_000_000_000,
}
ACTIVE = {
    # Qwen's model card: 3.3B activated; Mistral's announcement of 2023-12-11: 12.9B a token;
    # DeepSeek-V3's README_WEIGHTS.md: 36.7B.
    "qwen3-30b-a3b": 3.3e9,
    "mixtral-8x7b": 12.9e9,
    "deepseek-v3": 36.7e9,
}
KV_ELEMENTS = {
    "llama-3.1-8b": 2 * 8 * 128 * 32,
    "llama-3.1-70b": 2 * 8 * 128 * 80,
    "qwen3-0.6b": 2 * 8 * 128 * 28,
    "qwen3-8b": 2 * 8 * 128 * 36,
    "qwen3-30b-a3b": 2 * 4 * 128 * 48,
    "mixtral-8x7b": 2 * 8 * 128 * 32,
    "deepseek-v3": (512 + 64) * 61,
}
GIB = 2**30


class Described(StrictPlatform):
    """A platform that knows a device which is not here, and has something to say about plans."""

    name = "described"

    @classmethod
    def known_devices(cls) -> Sequence[DeviceSpec]:
        line = Roofline(1e12, {"bfloat16": 1e14}, "a made-up data sheet")
        dtypes = {"float32": "native", "bfloat16": "native"}
        known = Capabilities(dtypes, kv_dtypes=(*dtypes, "int8", "float8_e4m3fn"))
        return (DeviceSpec("toy", "Toy 9000", "t9", 80 * GIB, line, known),)

    def review(self, plan: Mapping[str, Any]) -> Sequence[Finding]:
        if plan["max_num_seqs"] > 100:
            return (Finding("adjust", "max_num_seqs", "it has a hundred rows", 100),)
        return ()


REFERENCE = f"{__name__}:Described"


def args_of(name: str, **more: Any) -> EngineArgs:
    return EngineArgs(model=str(CONFIGS / f"{name}.json"), **more)


def toy() -> Target:
    return Target.of_described(Described(), Described.known_devices()[0])


# ---------------------------------------------------------------------------------------------
# Counts
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name: str) -> None:
    args = args_of(name, dtype="bfloat16")
    found = plan(read_model(args), args, toy())
    counted = found.value("parameters", "parameters")
    assert counted == pytest.approx(PUBLISHED[name], rel=0.001 if "deepseek" in name else 0)
    assert found.runnable == (name != "deepseek-v3")
    assert found.value("memory", "KV a token") == 2 * KV_ELEMENTS[name]
    used = found.value("parameters", "used by a token")
    assert used is not None
    if name in ACTIVE:
        # Published ones are rounded, and count the embedding, of which a token reads one row.
        embedding = found.value("parameters", "embedding") or 0
        assert used + embedding == pytest.approx(ACTIVE[name], rel=0.025)
        assert any("not runnable" in note for note in found.notes) == (not found.runnable)


def test_a_config_with_code_of_its_own_is_planned_and_none_of_it_is_run() -> None:
    assert "auto_map" in json.loads((CONFIGS / "deepseek-v3.json").read_text())
    assert read_model(args_of("deepseek-v3")).spec is None


def test_headers_say_what_is_stored_and_a_wrong_config_is_told(tmp_path: Path) -> None:
    args = EngineArgs(dtype="bfloat16")
    facts = read_model(args)
    assert facts.stored is not None and facts.stored.dtypes == ("BF16",)
    found = plan(facts, args, toy())
    assert found.value("parameters", "checkpoint") == 2 * facts.stored.elements
    assert found.value("parameters", "parameters") == facts.stored.elements
    wrong = EngineArgs(dtype="bfloat16", hf_overrides={"intermediate_size": 768})
    notes = plan(read_model(wrong), wrong, toy()).notes
    assert any("will not load" in note for note in notes)


def test_what_cannot_be_planned_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="nothing is downloaded"):
        read_model(EngineArgs(model="nobody/nothing"))
    lone = tmp_path / "odd.json"
    lone.write_text('{"architectures": ["OddForCausalLM"], "model_type": "odd"}')
    with pytest.raises(ConfigError, match="model_type='odd'"):
        read_model(EngineArgs(model=str(lone)))
    lone.write_text('{"architectures": ["Qwen3ForCausalLM"]}')
    with pytest.raises(ConfigError, match="lacks the required key"):
        read_model(EngineArgs(model=str(lone)))


# ---------------------------------------------------------------------------------------------
# Bytes and limits, by hand
# ---------------------------------------------------------------------------------------------


def test_limits_are_those_of_the_formulas() -> None:
    args = args_of("qwen3-0.6b", dtype="bfloat16", max_num_seqs=32)
    found = plan(read_model(args), args, toy(), context=512)
    weights, kv = 2 * 596_049_920, 512 * 114_688
    one = (weights + kv) / 1e12
    assert found.value("limits", "decode, batch 1") == pytest.approx(1 / one, rel=1e-3)
    many = (weights + 32 * kv) / 1e12
    assert found.value("limits", "decode, largest batch") == pytest.approx(32 / many, rel=1e-3)
    work = 2 * 440_467_456 * 2048 + 2 * 2048**2 * 16 * 128 * 28
    assert work == pytest.approx(2.29e12, rel=0.005)  # what the design notes say of this model
    assert found.value("limits", "prefill of 2048") == pytest.approx(work / 1e14, rel=1e-6)


@pytest.mark.parametrize(("kept", "scale"), [("int8", 4), ("fp8", 0)])
def test_a_cache_in_8_bits_is_read_with_its_scales(kept: str, scale: int) -> None:
    args = args_of("qwen3-0.6b", dtype="bfloat16", kv_cache_dtype=kept)
    found = plan(read_model(args), args, toy(), context=512)
    vectors = 28 * 2 * 8  # layers, key and value, heads: each 128 codes, and int8's scale
    one = (2 * 596_049_920 + 512 * vectors * (128 + scale)) / 1e12
    assert found.value("limits", "decode, batch 1") == pytest.approx(1 / one, rel=1e-5)


@needs_native
@pytest.mark.parametrize("flops", [{"bfloat16": 1e14}, {}])
def test_experts_are_read_as_they_are_packed(flops: dict[str, float]) -> None:
    platform = CpuPlatform()  # which has packers of int8
    line = Roofline(1e12, flops, "a made-up data sheet")
    device = DeviceSpec("toy", "Toy 9000", "t9", 80 * GIB, line, platform.capabilities())
    args = args_of("mixtral-8x7b", dtype="bfloat16", quantization="int8")
    found = plan(read_model(args), args, Target.of_described(platform, device), context=512)
    active = found.value("parameters", "used by a token")  # a byte each
    tokens = found.value("limits", "decode, batch 1")
    assert active and tokens and 1e12 / (2 * active) < tokens < 1e12 / active


def test_a_context_beyond_the_model_is_refused() -> None:
    args = args_of("llama-3.1-8b")
    with pytest.raises(ConfigError, match="context is 999999, but a sequence has at most 131072"):
        plan(read_model(args), args, toy(), context=999_999)


def test_what_fits_is_what_is_left() -> None:
    args = args_of("llama-3.1-8b", dtype="bfloat16", gpu_memory_utilization=0.5)
    found = plan(read_model(args), args, toy(), context=8192)
    held = sum(
        found.value("memory", name) or 0
        for name in ("weights", "step buffers", "rows", "activations")
    )
    budget = 40 * GIB - held
    assert found.value("fits", "memory for KV") == pytest.approx(budget, rel=1e-6)
    assert found.value("fits", "largest batch") == pytest.approx(budget / (8192 * 131072), abs=1)


def test_too_large_a_model_is_said_not_to_fit() -> None:
    args = args_of("deepseek-v3", dtype="bfloat16")
    found = plan(read_model(args), args, toy())
    assert found.value("fits", "largest context") == 0
    assert any("does not fit" in note for note in found.notes)
    assert found.value("memory", "activations") is None


def test_ranks_share_what_is_split() -> None:
    def weights(ranks: int) -> float:
        args = args_of("llama-3.1-8b", dtype="bfloat16", tensor_parallel_size=ranks)
        return plan(read_model(args), args, toy()).value("memory", "matrices") or 0

    assert weights(4) == weights(1) / 4


def test_a_platforms_adjustment_is_taken() -> None:
    args = args_of("qwen3-0.6b", dtype="bfloat16")
    found = plan(read_model(args), args, dataclasses.replace(toy(), present=True))
    assert found.settings["max_num_seqs"] == 100
    assert [finding.field for finding in found.findings] == ["max_num_seqs"]


@pytest.mark.parametrize(
    "limits",
    [StepLimits(), StepLimits(max_tokens=96), StepLimits(token_buckets=(64, 8, 256, 32))],
)
@pytest.mark.parametrize(
    "more",
    [{}, {"max_num_batched_tokens": 40}, {"max_num_seqs": 5}, {"max_model_len": "auto"}],
)
def test_a_plan_is_of_what_an_engine_would_resolve(
    limits: StepLimits, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = StrictPlatform(StrictKnobs(limits=limits))
    args = EngineArgs(
        platform="strict", kv_cache_memory_bytes="2M", **({"max_model_len": 64} | more)
    )
    monkeypatch.setattr(resolve_module, "make_platform", lambda name: platform)
    config = resolve(args)
    found = plan(read_model(args), args, Target.of_present(platform, platform.probe().devices[0]))
    assert found.settings["max_num_seqs"] == config.scheduler.max_num_seqs
    assert found.settings["max_num_batched_tokens"] == config.scheduler.max_num_batched_tokens
    assert found.settings["max_model_len"] == config.model.max_model_len
    assert more.get("max_model_len") != "auto" or config.model.max_model_len < 8192


def test_auto_is_what_the_described_memory_holds() -> None:
    args = args_of("llama-3.1-70b", dtype="bfloat16", tensor_parallel_size=2, max_model_len="auto")
    found = plan(read_model(args), args, toy())
    length = found.settings["max_model_len"]
    assert isinstance(length, int) and 1024 < length < 131_072
    assert found.settings["context"] == length
    assert found.value("fits", "largest batch") == 1, "one sequence of that length fits"


def test_a_platform_is_not_asked_to_review_a_device_that_is_described() -> None:
    class Here(Described):
        def review(self, plan: Mapping[str, Any]) -> Sequence[Finding]:
            return (Finding("adjust", "max_num_seqs", "the card in this machine is small", 1),)

    args = args_of("qwen3-0.6b", dtype="bfloat16")
    target = Target.of_described(Here(), Here.known_devices()[0])
    found = plan(read_model(args), args, target)
    assert found.settings["max_num_seqs"] == 256
    (finding,) = found.findings
    assert finding.kind == "note" and "not reviewed the plan" in finding.reason


def test_unknown_memory_and_rates_are_unknown() -> None:
    target = toy()
    silent = Target(
        target.platform, 0, "silent", True, target.capabilities, MemoryInfo(0, 0, {}), None
    )
    args = args_of("qwen3-0.6b", dtype="bfloat16")
    found = plan(read_model(args), args, silent)
    assert found.value("fits", "largest batch") is None
    assert found.value("limits", "decode, batch 1") is None
    other = args_of("qwen3-0.6b", dtype="float32")  # the sheet has no rate of fp32
    assert any("rate of float32" in note for note in plan(read_model(other), other, toy()).notes)


def test_sliding_windows_bound_attention() -> None:
    full, window = AttentionShape(1, 4, 2), AttentionShape(1, 4, 2, window=10)
    assert full.prefill_flops(100) == 4 * 100 * 100 / 2
    assert window.prefill_flops(100) == 4 * (100 * 10 - 10 * 10 / 2)


def test_a_batch_touches_more_experts_than_a_token() -> None:
    one = Parameters(100, 10, 10, False, experts=64, routed=1 / 8)
    assert one.touched(1) == 1 / 8 and 0.98 < one.touched(32) < 1
    assert one.active_body == 80 - 56


def test_activations_grow_with_tokens_and_logits() -> None:
    spec = read_model(args_of("qwen3-0.6b")).spec
    assert spec is not None

    def peak(tokens: int, logits: int) -> int:
        return activation_bytes(spec, torch.float32, ranks=1, tokens=tokens, logits=logits)

    assert peak(2048, 1) == 2048 * (2 * 1024 + 3 * 3072) * 4
    assert peak(1, 64) == 1024 * 4 + 64 * 151_936 * 4


def test_recordings_have_their_room() -> None:
    """That of the largest: none where nothing is recorded, and none of it is the cache's."""
    target = toy()
    known = dataclasses.replace(target.capabilities, graph_replay=True)
    target = dataclasses.replace(target, capabilities=known)

    def planned(target: Target, **more: Any) -> Plan:
        args = args_of("qwen3-0.6b", dtype="bfloat16", max_num_seqs=40, **more)
        return plan(read_model(args), args, target)

    found, eager = planned(target), planned(target, enforce_eager=True)
    room = found.value("memory", "recordings") or 0
    assert room >= 40 * 151_936 * (4 + 2)  # scores in bfloat16, and in fp32
    for none in (eager, planned(toy()), planned(target, tensor_parallel_size=2)):
        assert none.value("memory", "recordings") == 0
    ours, theirs = (one.value("fits", "memory for KV") or 0 for one in (found, eager))
    assert theirs - ours == room


@pytest.mark.parametrize(("ranks", "width"), [(1, 768), (4, 192)])
def test_each_token_has_a_row_for_every_expert_that_it_goes_through(ranks: int, width: int) -> None:
    spec = read_model(args_of("qwen3-30b-a3b")).spec
    assert spec is not None
    found = activation_bytes(spec, torch.bfloat16, ranks=ranks, tokens=2048, logits=1)
    assert found == 2048 * (2 * 2048 + 8 * (2048 + width)) * 2


def test_the_packer_says_what_its_layout_takes() -> None:
    packer = CpuDensePacker()
    assert packer.packed_bytes(torch.float32, (64, 64)) is None
    if not fbgemm_refusal():
        assert packer.packed_bytes(torch.float16, (5000, 1000)) == 5008 * 1024 * 2
    packed = packer.pack({"weight": torch.randn(48, 96).half()}, (48, 96))
    assert packed.extra_bytes == (packer.packed_bytes(torch.float16, (48, 96)) or 0)


def test_the_host_measures_itself_quickly() -> None:
    line = measured_roofline(1)
    assert 1e8 < line.bandwidth < 1e13
    assert line.flops.keys() == {"float32", "bfloat16", "float16"}
    assert all(1e7 < rate < 1e15 for rate in line.flops.values())
    assert "measured" in line.source


# ---------------------------------------------------------------------------------------------
# Devices and the command
# ---------------------------------------------------------------------------------------------


def test_a_device_is_found_by_name_and_none_by_another() -> None:
    (found,) = find_targets(REFERENCE, "TOY")
    assert found.title == "Toy 9000" and not found.present
    with pytest.raises(PlatformError, match="Described: toy"):
        find_targets(REFERENCE, "nothing")
    assert len(find_targets("strict")) == 3
    with pytest.raises(PlatformError, match="no device 7"):
        find_targets("strict", "7")


class Unready(Described):
    """Describes a device, and cannot be made here."""

    name = "unready"

    def __init__(self) -> None:
        raise OSError("no driver")


class Forgetful(Described):
    """Knows nothing of its second device."""

    name = "forgetful"

    def capabilities(self, device: int = 0) -> Capabilities:
        if device == 1:
            raise KeyError(device)
        return super().capabilities(device)


def test_a_platform_that_fails_spoils_no_other(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    probe = StrictPlatform.probe()
    classes = (Unready, Forgetful)
    found = [Candidate(cls.name, cls, probe) for cls in classes]
    monkeypatch.setattr(targets_module, "available", lambda: found)
    assert [target.index for target in find_targets()] == [0, 2]
    assert "platform unready is not known: OSError: no driver" in caplog.text
    assert "device strict 1 is not known: KeyError" in caplog.text
    (one,) = find_targets(device="toy")
    assert one.platform.name == "forgetful"
    with pytest.raises(PlatformError, match="Nothing is known of device toy"):
        find_targets("unready", "toy")


def test_only_a_platform_whose_device_is_named_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    class Absent(Described):
        name = "absent"

        def __init__(self) -> None:
            super().__init__()
            made.append(1)

    found = [Candidate("absent", Absent, Probe(0, "no card"))]
    monkeypatch.setattr(targets_module, "available", lambda: found)
    with pytest.raises(PlatformError):
        find_targets(device="other")
    assert not made
    assert [one.title for one in find_targets(device="toy")] == ["Toy 9000"] and len(made) == 1


def test_the_report_is_json_and_one_refusal_spoils_no_other() -> None:
    report = build_report(args_of("qwen3-0.6b", dtype="bfloat16", platform=REFERENCE), "all")
    (one,) = json.loads(json.dumps(report))["plans"]
    figures = [figure for section in one["sections"].values() for figure in section.values()]
    assert all(figure["unit"] and figure["source"] for figure in figures)
    odd = build_report(args_of("qwen3-0.6b", dtype="float16", platform=REFERENCE), "toy")
    assert not odd["plans"] and "float16" in odd["refused"][0]["reason"]


def test_figures_are_readable() -> None:
    assert readable_figure(2**30, "bytes") == "1 GiB"
    assert readable_figure(None, "bytes") == "unknown"
    assert readable_figure(4.8e12, "bytes/s") == "4800 GB/s"
    assert readable_figure(596_049_920, "elements") == "596,049,920"


# ---------------------------------------------------------------------------------------------
# After start
# ---------------------------------------------------------------------------------------------


def test_off_by_more_than_a_twentieth_is_told() -> None:
    assert not differs(100 << 20, 104 << 20) and differs(100 << 20, 106 << 20)
    assert not differs(1000, 100_000), "rounding of a tiny model"
    line = describe_memory({"weights": 2**30}, {"weights": 2**30, "sampler": 1024})
    assert line == "weights 1 GiB (planned 1 GiB), sampler 1 KiB (not planned)"


class LyingPacker(DensePacker):
    """Keeps weights as they are, and says that they double."""

    def packed_bytes(self, dtype: torch.dtype, shape: tuple[int, int]) -> int | None:
        return 2 * shape[0] * shape[1] * dtype.itemsize


class Lying(StrictPlatform):
    name = "lying"

    def weight_packers(self) -> Mapping[str, WeightPacker]:
        return {"dense": LyingPacker()}


@pytest.mark.parametrize(
    ("platform", "level"),
    [("cpu", logging.INFO), ("strict", logging.INFO), (f"{__name__}:Lying", logging.WARNING)],
)
def test_an_engine_says_what_it_holds_beside_its_plan(
    platform: str, level: int, caplog: pytest.LogCaptureFixture
) -> None:
    args = EngineArgs(platform=platform, dtype="float32", max_num_seqs=2, max_model_len="64")
    with caplog.at_level(logging.INFO, "trimaran.plan"):
        executor = UniExecutor(resolve(args))
    found = executor.description["memory"]
    executor.close()
    assert [record.levelno for record in caplog.records if record.name == "trimaran.plan"] == [
        level
    ]
    assert found["actual"].keys() == {"weights", "kv", "step", "rows"}
    assert (found["planned"] == found["actual"]) == (level == logging.INFO)
