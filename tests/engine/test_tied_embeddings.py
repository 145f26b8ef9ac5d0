"""Where the embedding is the head too, a platform that packs the head and looks rows up in it holds
the matrix once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_harness import Harness
from helpers.engine_loop import greedy, open_loop
from helpers.native import needs_native
from helpers.tiny_models import model_path
from safetensors.torch import load_file, save_file

from trimaran.core.args import EngineArgs
from trimaran.core.models.checkpoint import Checkpoint
from trimaran.core.models.layers import PackedEmbedding, VocabEmbedding
from trimaran.core.ops import OpBinder
from trimaran.core.planning.memory import planned_tags
from trimaran.core.planning.model import read_model
from trimaran.core.planning.planner import plan
from trimaran.core.planning.targets import Target
from trimaran.core.resolve import resolve
from trimaran.kernels_cpu.library import library
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.cpu_dense import NativeDensePacker
from trimaran.platforms.strict import StrictPlatform

pytestmark = needs_native
TIED = model_path("qwen3_tied")
TABLE = "model.embed_tokens.weight"
OPTIONS: dict[str, Any] = {"platform": "cpu", "block_size": 16, "max_model_len": "128"}
PROMPT = list(range(5, 25))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_matrix_is_held_once_and_in_panels(dtype: torch.dtype) -> None:
    """1031 ids: the last panel has 7."""
    one = Harness(CpuPlatform(), TIED, length=32, dtype=dtype)
    assert isinstance(one.decoder.embed, PackedEmbedding) and one.decoder.head is not None
    assert one.decoder.embed.weight is one.decoder.head.packed
    stored = load_file(TIED / "model.safetensors")
    shapes = [tensor.shape for name, tensor in stored.items() if name != TABLE]
    panels = NativeDensePacker().packed_bytes(dtype, (1031, 128))
    rope = one.buffers.max_positions * one.decoder.spec.rope.dim * 4
    others = sum(shape.numel() for shape in shapes) * dtype.itemsize
    assert one.device.memory().by_tag["weights"] == panels + others + rope
    ids = torch.tensor([0, 31, 32, 1030])
    assert torch.equal(one.decoder.embed(ids), stored[TABLE][ids].to(dtype))


def test_the_logits_are_those_of_a_table_of_its_own(tmp_path: Path) -> None:
    config = json.loads((TIED / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = load_file(TIED / "model.safetensors")
    whole = {**stored, "lm_head.weight": stored[TABLE].clone()}
    save_file(whole, tmp_path / "model.safetensors")
    tied, untied = (Harness(CpuPlatform(), path, length=32) for path in (TIED, tmp_path))
    assert isinstance(untied.decoder.embed, VocabEmbedding)
    assert torch.equal(tied.logits(PROMPT), untied.logits(PROMPT))


@pytest.mark.parametrize(
    "quantization, packed", [("int8", False), ("int4", False), ("w4a16", True)]
)
def test_a_quantized_head_leaves_the_table_as_it_is(quantization: str, packed: bool) -> None:
    """W4A16 keeps the head in its own type."""
    one = Harness(CpuPlatform(), TIED, length=32, quantization=quantization)
    assert isinstance(one.decoder.embed, PackedEmbedding if packed else VocabEmbedding)
    ids = torch.arange(1031)
    assert torch.equal(one.decoder.embed(ids), load_file(TIED / "model.safetensors")[TABLE])


def test_a_platform_that_packs_nothing_shares_the_plain_table() -> None:
    one = Harness(StrictPlatform(), TIED, length=32)
    assert isinstance(one.decoder.embed, VocabEmbedding) and one.decoder.head is not None
    assert one.decoder.head.packed.tensors[0] is one.decoder.embed.table


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_plans_know_it(dtype: str, quantization: str | None) -> None:
    args = EngineArgs(model=str(TIED), dtype=dtype, quantization=quantization, **OPTIONS)
    platform = CpuPlatform()
    with open_loop("qwen3_tied", dtype=dtype, quantization=quantization, **OPTIONS) as loop:
        held = loop.executor.device.memory().by_tag["weights"]
    binder = OpBinder(platform, quantization=quantization)
    assert planned_tags(resolve(args), binder)["weights"] == held
    found = plan(read_model(args), args, Target.of_present(platform, platform.probe().devices[0]))
    table = 1031 * 128 * getattr(torch, dtype).itemsize
    assert found.value("memory", "embedding") == (table if quantization else 0)


def test_compiled_steps_look_rows_up_in_the_head() -> None:
    native = library()
    with open_loop("qwen3_tied", **OPTIONS) as loop:
        model = loop.executor.model  # type: ignore[attr-defined]
        forward, by_op = model.forward, []
        model.forward = lambda: by_op.append(1) or forward()
        before = native.count("take_packed_rows", native.isa)
        loop.run([greedy("a", PROMPT, 4)])
        assert native.count("take_packed_rows", native.isa) == before + 4
    assert not by_op, "a step went op by op"


def test_a_kept_head_is_all_that_a_second_start_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start() -> list[int]:
        with open_loop("qwen3_tied", packed_cache=str(tmp_path), **OPTIONS) as loop:
            return loop.run([greedy("a", PROMPT, 12)])["a", 0].tokens

    first = start()
    read: list[str] = []
    get = Checkpoint.__getitem__
    monkeypatch.setattr(
        Checkpoint, "__getitem__", lambda self, n: (read.append(n), get(self, n))[1]
    )
    assert start() == first
    assert read and TABLE not in read
