"""Weights quantized at load: on platforms that multiply by them and on those that do not, the same
tokens, those of a checkpoint that holds the codes' values already."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_harness import Harness
from helpers.engine_loop import greedy, open_loop
from helpers.quantized_platform import CALLS, ByCodes, Native, Refusing, values_of
from helpers.tiny_models import model_path, prompt
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimaran.core.args import EngineArgs
from trimaran.core.dtypes import choose_kv_dtype
from trimaran.core.errors import ConfigError, ModelLoadError
from trimaran.core.executor import UniExecutor
from trimaran.core.models.layers import VocabEmbedding
from trimaran.core.planning.model import read_model
from trimaran.core.planning.planner import plan
from trimaran.core.planning.targets import find_targets
from trimaran.core.quantization.codes import dequantize, quantize
from trimaran.core.quantization.scheme import WeightScheme
from trimaran.core.resolve import resolve
from trimaran.platforms.communicator import LocalCommunicator
from trimaran.platforms.interface import INT4, Capabilities, Platform
from trimaran.platforms.ops import OPS, activation_rounding, float8_rounding
from trimaran.platforms.strict import StrictPlatform

FILE = "model.safetensors"
NATIVE = "helpers.quantized_platform:Native"
CPU = "helpers.quantized_platform:PlainCpu"
PROMPTS = [prompt(length, 40 + length) for length in (3, 9, 24, 49)]


# -- tokens --------------------------------------------------------------------------------------


def int8_values(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


def fp8_values(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(1, keepdim=True) / 448
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


def int4_values(weight: Tensor) -> Tensor:
    shape = (weight.shape[0], weight.shape[1])
    scheme = WeightScheme(INT4, 128)
    kinds = scheme.tensors(shape)
    tensors = {name: torch.empty(kind.shape, dtype=kind.dtype) for name, kind in kinds.items()}
    quantize(weight, scheme, tensors)
    return dequantize(tensors)


@pytest.fixture
def with_values(tmp_path: Path) -> Callable[[str, str], Path]:
    """A checkpoint whose linear layers hold what codes stand for; an untied head, too."""

    def make(variant: str, quantization: str) -> Path:
        path = tmp_path / f"{variant}-{quantization}"
        shutil.copytree(model_path(variant), path)
        tensors = load_file(path / FILE)
        by_row = {"int8": int8_values, "fp8": fp8_values}
        values = by_row.get(quantization, int4_values)
        for name, tensor in tensors.items():
            if "_proj.weight" in name:
                tensors[name] = values(tensor)
        if quantization == "w4a16":  # the head is as it was
            save_file(tensors, path / FILE)
            return path
        head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
        tensors["lm_head.weight"] = int8_values(head)
        save_file(tensors, path / FILE)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
        return path

    return make


def tokens(variant: str, **options: Any) -> list[list[int]]:
    requests = [greedy(str(i), ids, 16) for i, ids in enumerate(PROMPTS)]
    with open_loop(variant, max_num_seqs=4, **options) as loop:
        found = loop.run(requests)
    return [found[str(i), 0].tokens for i in range(len(PROMPTS))]


@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("variant", ["llama3", "qwen3_tied"])
def test_tokens_are_those_of_the_codes_values(
    variant: str, quantization: str, with_values: Callable[[str, str], Path]
) -> None:
    expected = tokens(variant, platform=CPU, model=str(with_values(variant, quantization)))
    for platform in (CPU, "strict", NATIVE):
        assert tokens(variant, platform=platform, quantization=quantization) == expected
    assert expected != tokens(variant, platform=CPU), "of codes, not of the weights themselves"


@pytest.mark.parametrize("platform", ["cpu", "strict"])
@pytest.mark.parametrize("variant", ["llama3", "qwen3_tied"])
def test_tokens_under_w4a16_are_those_of_the_codes_values(
    variant: str, platform: str, with_values: Callable[[str, str], Path]
) -> None:
    """The platform's own kernel too, since it rounds no activation."""
    expected = tokens(variant, platform=CPU, model=str(with_values(variant, "w4a16")))
    assert tokens(variant, platform=platform, quantization="w4a16") == expected
    assert expected != tokens(variant, platform=CPU), "of codes, not of the weights themselves"


def test_the_platform_s_own_linear_gets_the_codes() -> None:
    CALLS.clear()
    tokens("llama3", platform=NATIVE, quantization="int4")
    linears = CALLS["kept int4"] // CALLS["kept int8"]
    assert linears == 3 * 4, "three layers of four in int4, and the head in int8"


def test_layers_that_no_linear_takes_are_dense_again(caplog: pytest.LogCaptureFixture) -> None:
    CALLS.clear()
    with caplog.at_level(logging.INFO, "trimaran.ops"):
        one = Harness(Refusing(), model_path("llama3"), length=32, quantization="int8")
    assert one.decoder.layers[0].mixer.qkv._packed is not None
    assert one.decoder.layers[0].mixer.qkv._packed.format == "kept int8"
    assert one.decoder.layers[0].mixer.out._packed is not None
    assert one.decoder.layers[0].mixer.out._packed.format == "dense"
    (told,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "'strict' does not multiply by int8" in told.message
    assert "by codes: at most 128 inputs" in told.message
    expected = Harness(Native(), model_path("llama3"), length=32, quantization="int8")
    ids = prompt(9)
    torch.testing.assert_close(one.logits(ids), expected.logits(ids))
    one.close()
    expected.close()


@pytest.mark.parametrize("platform", [CPU, "strict"])
def test_a_platform_without_packers_is_named_once(
    platform: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "trimaran.ops"):
        tokens("llama3", platform=platform, quantization="int8")
    told = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(told) == 1
    name = "strict" if platform == "strict" else "cpu"
    assert f"'{name}' does not multiply by int8" in told[0].message
    assert "no packer for int8" in told[0].message and "no memory saved" in told[0].message


def test_a_tied_table_stays_for_the_embedding() -> None:
    for platform in (StrictPlatform(), Native()):
        one = Harness(platform, model_path("qwen3_tied"), length=32, quantization="int8")
        stored = load_file(model_path("qwen3_tied") / FILE)["model.embed_tokens.weight"]
        embed, head = one.decoder.embed, one.decoder.head
        assert isinstance(embed, VocabEmbedding) and head is not None and head._packed is not None
        assert torch.equal(embed.table, stored)
        first = head._packed.tensors[0]
        assert first.dtype == (torch.int8 if isinstance(platform, Native) else torch.float32)
        torch.testing.assert_close(values_of(head._packed), int8_values(stored))
        one.close()


# -- rounded activations -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("quantization", "bound"), [("int8", activation_rounding), ("fp8", float8_rounding)]
)
def test_w8a8_is_within_what_the_contract_allows(
    quantization: str, bound: Callable[[Tensor, Tensor], Tensor]
) -> None:
    one = Harness(Native(), model_path("llama3"), length=32, quantization=quantization)
    packed = one.decoder.layers[0].feed_forward.down._packed
    assert packed is not None
    plain = values_of(packed)
    x = torch.randn(17, plain.shape[1]) * torch.rand(17, 1) * 5
    rounding = ByCodes()
    rounding.rounding = True
    error = (rounding(x, packed, None) - x @ plain.T).abs()
    tolerance = OPS["linear"].tolerance[torch.float32].atol
    assert (error <= bound(x, plain) + tolerance).all()
    assert error.max() > 100 * tolerance, "more than without rounding"
    one.close()


# -- parallel groups -----------------------------------------------------------------------------


class OneOfTwo(LocalCommunicator):
    size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("platform", [StrictPlatform, Native])
def test_shares_of_ranks_are_those_of_the_whole(
    platform: type[Platform], quantization: str, load_format: str
) -> None:
    """All values: split by outputs or by inputs, the codes stand for the same."""

    def values(**comm: Any) -> list[Tensor]:
        one = Harness(
            platform(),
            model_path("llama3"),
            length=32,
            quantization=quantization,
            load_format=load_format,
            **comm,
        )
        layer = one.decoder.layers[1]
        linears = (layer.mixer.out, layer.feed_forward.down, layer.feed_forward.gate_up)
        assert one.decoder.head is not None
        packed = [linear._packed for linear in (*linears, one.decoder.head)]
        found = [values_of(weight) for weight in packed if weight is not None]
        one.close()
        return found

    out, down, gate_up, head = values()
    first, second = (values(comm=OneOfTwo(rank)) for rank in range(2))
    assert torch.equal(torch.cat((first[0], second[0]), 1), out)
    assert torch.equal(torch.cat((first[1], second[1]), 1), down)
    gates, ups = zip(first[2].chunk(2), second[2].chunk(2), strict=True)
    assert torch.equal(torch.cat((*gates, *ups)), gate_up)
    assert torch.equal(torch.cat((first[3], second[3]))[:1031], head)


@pytest.mark.tp2
@pytest.mark.real
@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_two_ranks_draw_the_tokens_of_one(
    quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    options = {"platform": NATIVE, "quantization": quantization}
    assert tokens("llama3", tensor_parallel_size=2, **options) == tokens("llama3", **options)


# -- what is refused, and what is said ------------------------------------------------------------


def damaged(tmp_path: Path, name: str, row: int, value: float) -> Path:
    path = tmp_path / "damaged"
    shutil.copytree(model_path("llama3"), path)
    tensors = load_file(path / FILE)
    tensors[name][row, 3] = value
    save_file(tensors, path / FILE)
    return path


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("model.layers.1.self_attn.v_proj.weight", 100),
        ("model.layers.2.mlp.down_proj.weight", 5),
        ("lm_head.weight", 1030),
    ],
)
@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_a_weight_that_is_not_finite_is_named(
    quantization: str, name: str, row: int, tmp_path: Path
) -> None:
    path = damaged(tmp_path, name, row, float("nan"))
    Harness(StrictPlatform(), path, length=32).close()
    with pytest.raises(ModelLoadError, match=f"row {row} of {name} holds a NaN or an infinity"):
        Harness(StrictPlatform(), path, length=32, quantization=quantization)
    if name == "lm_head.weight":
        with pytest.raises(ModelLoadError, match=f"row {row} of {name}"):
            last = OneOfTwo(1)
            Harness(StrictPlatform(), path, length=32, quantization=quantization, comm=last)


def test_inputs_that_no_group_divides_are_kept_in_int8(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "odd"
    shutil.copytree(model_path("llama3"), path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 200}))
    with caplog.at_level(logging.INFO, "trimaran.ops"):
        one = Harness(Native(), path, length=32, quantization="int4", load_format="dummy")
    layer = one.decoder.layers[0]
    assert layer.feed_forward.down._packed is not None
    assert layer.feed_forward.down._packed.format == "kept int8"
    assert layer.feed_forward.gate_up._packed is not None
    assert layer.feed_forward.gate_up._packed.format == "kept int4"
    assert sum("200 inputs" in message for message in caplog.messages) == 1
    one.close()


# -- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", [CPU, "strict", NATIVE])
@pytest.mark.parametrize("variant", ["llama3", "qwen3_tied"])
@pytest.mark.parametrize("quantization", ["int8", "int4", "fp8"])
def test_what_is_held_is_what_was_planned(variant: str, quantization: str, platform: str) -> None:
    for dtype in ("float32", "bfloat16"):
        args = EngineArgs(
            model=str(model_path(variant)),
            platform=platform,
            dtype=dtype,
            quantization=quantization,
            max_num_seqs=2,
            max_model_len="64",
            num_threads=1,
        )
        executor = UniExecutor(resolve(args))
        memory = executor.description["memory"]
        executor.close()
        assert memory["planned"] == memory["actual"]


def test_codes_take_the_memory_of_codes() -> None:
    def matrices(quantization: str | None, platform: str = NATIVE) -> float:
        args = EngineArgs(
            model=str(model_path("llama3")),
            platform=platform,
            dtype="bfloat16",
            quantization=quantization,
        )
        found = plan(read_model(args), args, find_targets(platform, "0")[0])
        assert found.settings["quantization"] == quantization
        told = any("does not multiply by" in note for note in found.notes)
        assert told == (quantization is not None and platform != NATIVE)
        return found.value("memory", "matrices") or 0

    body, head = 3 * (512 * 128 + 128 * 256 + 512 * 128 + 128 * 256), 1031 * 128
    outputs = 3 * (512 + 128 + 512 + 128)
    assert matrices(None) == 2 * (body + head)
    assert matrices("int8") == body + head + 4 * (outputs + 1031)
    assert matrices("int4") == body + head + body // 128 * 5 + 4 * 1031
    assert matrices("fp8") == matrices("int8")
    assert matrices("int8", "strict") == matrices("fp8", "strict") == matrices(None)


# -- caches in 8 bits -----------------------------------------------------------------------------


@pytest.mark.parametrize("kept", ["int8", "fp8"])
def test_a_cache_in_8_bits_serves_and_is_refused_where_there_is_none(kept: str) -> None:
    exact = tokens("llama3", platform="strict")
    found = tokens("llama3", platform="strict", kv_cache_dtype=kept)
    same = sum(a == b for x, y in zip(exact, found, strict=True) for a, b in zip(x, y, strict=True))
    assert found != exact and same > (16 if kept == "int8" else 8), "near, and not the same"
    with open_loop("llama3", platform="strict", kv_cache_dtype=kept) as loop:
        ids = prompt(70, 3)
        first = loop.run([greedy("0", ids, 8)])["0", 0]
        again = loop.run([greedy("1", ids, 8)])["1", 0]
        assert again.num_cached >= 48 and again.tokens == first.tokens
    with pytest.raises(ConfigError, match=f"'cpu' keeps no {kept} KV cache; it keeps float32"):
        tokens("llama3", platform=CPU, kv_cache_dtype=kept)


def test_a_platform_that_names_no_cache_has_none_in_8_bits() -> None:
    class Silent(StrictPlatform):
        def capabilities(self, device: int = 0) -> Capabilities:
            return Capabilities({"float32": "native", "float16": "native"})

    known = Silent().capabilities()
    assert choose_kv_dtype("auto", torch.float16, known, "silent") == torch.float16
    for kept in ("int8", "fp8", "fp8_e5m2"):
        with pytest.raises(ConfigError, match=f"no {kept} KV cache; it keeps float32, float16"):
            choose_kv_dtype(kept, torch.float16, known, "silent")
