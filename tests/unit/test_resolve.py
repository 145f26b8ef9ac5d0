"""Resolution: every default decided once, every impossible wish refused with what to change."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from trimaran.core import resolve as resolve_module
from trimaran.core.args import EngineArgs, parse_size
from trimaran.core.config import EngineConfig
from trimaran.core.engine.wire import Launch, decode_launch, encode_line
from trimaran.core.errors import ConfigError, KVMemoryError, ModelLoadError, PlatformError
from trimaran.core.log_lines import LogStyle
from trimaran.core.model_files import resolve_model_path
from trimaran.core.resolve import resolve
from trimaran.core.sizing import default_budget
from trimaran.platforms.interface import Finding, MemoryInfo, Platform, StepLimits
from trimaran.platforms.strict import StrictKnobs, StrictPlatform

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
MISTRAL = CONFIG | {"architectures": ["MistralForCausalLM"], "sliding_window": 100}
TOKEN_BYTES = 2 * 2 * 2 * 16  # layers, key and value, heads, head size: elements a token


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., str]:
    """Writes a model directory without weights."""

    def write(config: Mapping[str, Any] | str = CONFIG, **files: Any) -> str:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(text)
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return str(tmp_path)

    return write


def make(path: str, **args: Any) -> EngineConfig:
    return resolve(EngineArgs(model=path, **({"platform": "cpu"} | args)))


def use_platform(monkeypatch: pytest.MonkeyPatch, platform: Platform) -> None:
    monkeypatch.setattr(resolve_module, "make_platform", lambda name: platform)


# ---------------------------------------------------------------------------------------------
# The model's files
# ---------------------------------------------------------------------------------------------


def test_the_plain_case(model: Callable[..., str]) -> None:
    path = model()
    config = make(path, dtype="float32")
    assert config.model.path == Path(path)
    assert config.model.name == path
    assert config.model.max_model_len == 1024 == config.scheduler.max_model_len
    assert config.model.vocab_size == 100
    assert config.model.eos_token_ids == (2,)
    assert config.cache.dtype == torch.float32
    (group,) = config.cache.groups
    assert group.layers == (0, 1) and group.block_size == 32
    # Never more than all sequences can use, scratch included.
    assert group.num_blocks == 64 * 32 + 1


@pytest.mark.parametrize(
    "config, words",
    [
        ("{", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ({"vocab_size": 3}, "no `architectures`"),
        (CONFIG | {"architectures": []}, "no `architectures`"),
    ],
)
def test_a_bad_config_is_named(model: Callable[..., str], config: Any, words: str) -> None:
    with pytest.raises(ModelLoadError, match=words):
        make(model(config))


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"has no config\.json"):
        make(str(tmp_path))


def test_an_unknown_architecture_lists_the_known(model: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM"):
        make(model(CONFIG | {"architectures": ["Strange"]}))


def test_overrides_are_merged(model: Callable[..., str]) -> None:
    path = model(CONFIG | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}})
    over = {"max_position_embeddings": 2048, "rope_scaling": {"factor": 4.0}}
    config = make(path, hf_overrides=over)
    assert config.model.max_model_len == 2048
    assert config.model.hf_config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize("nested", [False, True])
def test_a_model_that_brings_code_is_refused(model: Callable[..., str], nested: bool) -> None:
    code = {"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    path = model(CONFIG | ({"text_config": code} if nested else code))
    with pytest.raises(ModelLoadError, match=r"config\.json .*modeling_own\.Own.*never run"):
        make(path)
    none: dict[str, Any] = {"auto_map": None}
    make(path, hf_overrides={"text_config": none} if nested else none)
    with pytest.raises(ConfigError, match="never run"):
        make(path, trust_remote_code=True)


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "no-such-model"])
def test_an_unknown_path(name: str) -> None:
    with pytest.raises(ModelLoadError, match="There is no directory"):
        resolve_model_path(name)


def test_an_unknown_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **options: Any) -> str:
        raise OSError(f"no {name} here\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ModelLoadError, match=r"no some/model here\)"):
        resolve_model_path("some/model")


def test_a_hub_id_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append((name, options["revision"], options["local_files_only"]))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model_path("some/model", "v2") == tmp_path
    assert asked == [("some/model", "v2", True)]


def test_generation_defaults(model: Callable[..., str]) -> None:
    own = {"temperature": 0.6, "top_k": 20, "max_new_tokens": 64, "eos_token_id": [7, 8], "x": 1}
    path = model(generation_config=own)
    assert make(path).model.generation == {"temperature": 0.6, "top_k": 20, "max_tokens": 64}
    assert make(path).model.eos_token_ids == (7, 8, 2)
    neutral = make(path, generation_config="none").model
    assert neutral.generation == {} and neutral.eos_token_ids == (7, 8, 2)
    over = make(path, override_generation_config={"top_p": 0.5, "temperature": 1.0}).model
    assert over.generation == {"temperature": 1.0, "top_k": 20, "max_tokens": 64, "top_p": 0.5}
    with pytest.raises(ModelLoadError, match=r"has no generation_config\.json"):
        make(path, generation_config="/")


# ---------------------------------------------------------------------------------------------
# Element types
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "native, asked, checkpoint, expected",
    [
        (("float32", "bfloat16"), "auto", "bfloat16", torch.bfloat16),
        (("float32",), "auto", "bfloat16", torch.float32),
        (("float32", "float16"), "auto", "bfloat16", torch.float16),
        (("float32", "float16"), "auto", "float32", torch.float32),
        (("float32", "bfloat16"), "auto", "float16", torch.bfloat16),
        (("float32",), "auto", None, torch.float32),
        (("float32", "bfloat16"), "auto", "float64", torch.float32),
        (("float32",), "float16", "bfloat16", torch.float16),
    ],
)
def test_dtype(
    model: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    native: Sequence[str],
    asked: str,
    checkpoint: str | None,
    expected: torch.dtype,
) -> None:
    names = ("float32", "bfloat16", "float16")
    dtypes: Any = {name: "native" if name in native else "emulated" for name in names}
    use_platform(monkeypatch, StrictPlatform(StrictKnobs(dtypes=dtypes)))
    with caplog.at_level(logging.INFO, "trimaran.resolve"):
        config = make(model(CONFIG | {"torch_dtype": checkpoint}), dtype=asked)
    assert config.model.dtype == config.cache.dtype == expected
    took_another = asked == "auto" and str(expected) != f"torch.{checkpoint or 'float32'}"
    assert ("the checkpoint's" in caplog.text) == took_another


def test_a_dtype_the_platform_lacks(
    model: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_platform(monkeypatch, StrictPlatform(StrictKnobs(dtypes={"float32": "native"})))
    with pytest.raises(ConfigError, match="it has float32"):
        make(model(), dtype="bfloat16")
    with pytest.raises(ConfigError, match="it keeps float32"):
        make(model(), kv_cache_dtype="bfloat16")


# ---------------------------------------------------------------------------------------------
# Lengths, limits, memory
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [("17", 17), (17, 17), ("16k", 16_000), ("16K", 16_384), ("1.5m", 1_500_000), ("2G", 2**31)],
)
def test_sizes(text: str | int, value: int) -> None:
    assert parse_size(text, "x") == value


@pytest.mark.parametrize("text", ["", "0", "-3", "k", "3x", "1e9", "nan", "0.0001"])
def test_bad_sizes_name_the_flag(text: str) -> None:
    with pytest.raises(ConfigError, match="max_model_len is"):
        parse_size(text, "max_model_len")


def test_sizes_may_be_numbers_and_cross_to_the_engine_process() -> None:
    sizes: dict[str, Any] = {"max_model_len": 8192, "kv_cache_memory_bytes": 2**30}
    args = EngineArgs(**sizes)
    assert args == EngineArgs(max_model_len="8192", kv_cache_memory_bytes="1073741824")
    assert EngineArgs().max_model_len is None
    assert EngineArgs(max_model_len="auto").max_model_len == "auto"
    launch = Launch(args, 1, 2, "directory", "to", "from", LogStyle(20, json=True))
    assert decode_launch(encode_line(launch)) == launch


def test_context_length(model: Callable[..., str]) -> None:
    assert make(model(), max_model_len="0.5k").model.max_model_len == 500
    with pytest.raises(ConfigError, match="1024 positions"):
        make(model(), max_model_len="2k")


def test_blocks_fill_the_memory_given(model: Callable[..., str]) -> None:
    config = make(model(), dtype="float32", kv_cache_memory_bytes="1M", block_size=16)
    (group,) = config.cache.groups
    block_bytes = 16 * TOKEN_BYTES * 4
    assert group.num_blocks == 2**20 // block_bytes == 128


def test_memory_that_holds_no_sequence(model: Callable[..., str]) -> None:
    with pytest.raises(KVMemoryError) as caught:
        make(model(), dtype="float32", kv_cache_memory_bytes="100K", block_size=32)
    message = str(caught.value)
    needed = (32 + 1) * 32 * TOKEN_BYTES * 4  # 1,024 tokens and the scratch block
    assert str(needed) in message
    assert "--max-model-len" in message and "--kv-cache-memory-bytes" in message
    fits = int(message.split("about ")[1].split()[0])
    make(
        model(),
        dtype="float32",
        kv_cache_memory_bytes="100K",
        block_size=32,
        max_model_len=str(fits),
    )


def test_auto_length_is_what_fits(model: Callable[..., str]) -> None:
    args = {"dtype": "float32", "kv_cache_memory_bytes": "100K", "block_size": 32}
    config = make(model(), max_model_len="auto", **args)
    assert 0 < config.model.max_model_len < 1024
    with pytest.raises(KVMemoryError):
        make(model(), max_model_len=str(config.model.max_model_len + 1), **args)


@pytest.mark.parametrize(
    ("free", "share", "expected"),
    [
        (100, 0.9, 90 - 20),  # nobody else is there: the share
        (97, 0.9, 87 - 20),  # the process's own context is none of the headroom
        (50, 0.9, 40 - 20),  # others hold half: a tenth of the whole stays free
        (55, 0.45, 45 - 20),  # the second engine of two that share a device
        (50, 0.99, 49 - 20),
        (15, 0.9, 5 - 20),
    ],
)
def test_a_device_that_others_use_is_not_filled(free: int, share: float, expected: int) -> None:
    memory = MemoryInfo(100 << 20, free << 20, {})
    found = default_budget(memory, 40 << 20, share=share, on_host=False, ranks=2)
    assert found == pytest.approx(expected * 2**20, abs=2)


def test_more_than_the_machine_has(model: Callable[..., str]) -> None:
    with pytest.raises(KVMemoryError, match="of memory are free"):
        make(model(), kv_cache_memory_bytes="100000G")


def test_windows_take_blocks_in_proportion(model: Callable[..., str]) -> None:
    layers = ["sliding_attention", "full_attention"]
    qwen = CONFIG | {
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 100,
        "layer_types": layers,
        "max_window_layers": 1,
    }
    config = make(model(qwen), max_num_batched_tokens=64, max_num_seqs=8, block_size=16)
    blocks = {group.name: group.num_blocks for group in config.cache.groups}
    # 8 x 1,024 tokens; 8 x (100 tokens touch 8 blocks), and 64 tokens of one step; scratch.
    assert blocks == {"full": 8 * 64 + 1, "window_100": 8 * 8 + 4 + 1}


def test_a_windowed_model_needs_little(model: Callable[..., str]) -> None:
    config = make(model(MISTRAL), num_gpu_blocks_override=9, block_size=16)
    assert [group.num_blocks for group in config.cache.groups] == [9]
    with pytest.raises(KVMemoryError, match="--num-gpu-blocks-override"):
        make(model(MISTRAL), num_gpu_blocks_override=8, block_size=16)


def test_block_size_by_the_platform(model: Callable[..., str]) -> None:
    assert make(model(), platform="strict").cache.groups[0].block_size == 24
    assert make(model(), platform="strict", block_size=48).cache.groups[0].block_size == 48
    with pytest.raises(ConfigError, match="multiple of 24"):
        make(model(), platform="strict", block_size=32)


def test_step_limits(model: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert make(model(), max_num_batched_tokens=16).scheduler.max_num_seqs == 16
    with pytest.raises(ConfigError, match="max_num_seqs=32"):
        make(model(), max_num_batched_tokens=16, max_num_seqs=32)
    with pytest.raises(ConfigError, match="Without chunked prefill"):
        make(model(), max_num_batched_tokens=100, enable_chunked_prefill=False)
    whole = make(model(CONFIG | {"max_position_embeddings": 9000}), enable_chunked_prefill=False)
    assert whole.scheduler.max_num_batched_tokens == 9000
    assert make(model()).scheduler.mixed_batches
    knobs = StrictKnobs(limits=StepLimits(max_tokens=512, mixed_batches=False))
    use_platform(monkeypatch, StrictPlatform(knobs))
    limited = make(model()).scheduler
    assert (limited.max_num_batched_tokens, limited.mixed_batches) == (512, False)


def test_run_ahead(model: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    assert make(model(), platform="strict").scheduler.run_ahead == 1
    assert make(model(), platform="strict", async_scheduling="off").scheduler.run_ahead == 0
    assert make(model(), async_scheduling="on").scheduler.run_ahead == 0
    assert "async_scheduling=on has no effect" in caplog.text


@pytest.mark.parametrize(
    "name",
    [
        "max_num_seqs",
        "max_num_batched_tokens",
        "num_threads",
        "step_timeout",
        "tensor_parallel_size",
    ],
)
def test_numbers_below_one(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} is 0"):
        EngineArgs(**{name: 0})  # without a model


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_model_len", "abc"),
        ("max_model_len", "0"),
        ("kv_cache_memory_bytes", "auto"),
        ("gpu_memory_utilization", 0.0),
        ("gpu_memory_utilization", 3.0),
        ("gpu_memory_utilization", float("nan")),
    ],
)
def test_values_that_fit_no_model(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} is .*{value}"):
        EngineArgs(**{name: value})


def test_devices(model: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match="device 1"):
        make(model(), device=1)
    with pytest.raises(ConfigError, match="has 3 devices"):
        make(model(), platform="strict", tensor_parallel_size=4)
    with pytest.raises(PlatformError, match="Known platforms"):
        make(model(), platform="quantum")


class Opinionated(StrictPlatform):
    findings: tuple[Finding, ...] = ()

    def review(self, plan: Mapping[str, Any]) -> Sequence[Finding]:
        self.seen = plan
        return self.findings


def test_findings_are_applied_and_logged(
    model: Callable[..., str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    platform = Opinionated()
    use_platform(monkeypatch, platform)
    platform.findings = (
        Finding("adjust", "max_num_seqs", "registers are few", 7),
        Finding("note", "dtype", "fine by me"),
    )
    with caplog.at_level(logging.INFO, "trimaran.resolve"):
        config = make(model(), block_size=48)
    assert config.scheduler.max_num_seqs == 7
    assert platform.seen["block_size"] == 48 and platform.seen["max_model_len"] == 1024
    assert "max_num_seqs=7: registers are few" in caplog.text
    levels = {record.getMessage(): record.levelname for record in caplog.records}
    assert levels["dtype: fine by me"] == "WARNING"
    platform.findings = (Finding("reject", "dtype", "not today"),)
    with pytest.raises(ConfigError, match="rejects dtype: not today"):
        make(model())
    platform.findings = (Finding("adjust", "voltage", "it is warm in here", 7),)
    with pytest.raises(PlatformError, match="adjusts 'voltage', which is no argument"):
        make(model())


def test_the_result_is_frozen(model: Callable[..., str]) -> None:
    config = make(model())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.scheduler.max_num_seqs = 3  # type: ignore[misc]


def test_recordings_are_not_the_caches(
    model: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their memory is set aside before the cache is sized, where steps are recorded."""
    held: dict[tuple[str, bool], int] = {}
    for platform in ("strict", "helpers.recording_platform:RecordingPlatform"):
        for eager in (False, True):

            def budget(memory: Any, taken: int, key: Any = (platform, eager), **more: Any) -> int:
                held[key] = taken
                return default_budget(memory, taken, **more)

            monkeypatch.setattr(resolve_module, "default_budget", budget)
            make(model(), platform=platform, enforce_eager=eager, max_num_seqs=40)
    with_recordings = held.pop(("helpers.recording_platform:RecordingPlatform", False))
    (plain,) = set(held.values())
    assert with_recordings >= plain + 40 * CONFIG["vocab_size"] * 4
