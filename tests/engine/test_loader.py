"""Checkpoints on disk: single and sharded, and every way in which one can be wrong."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.decoder_harness import Harness
from helpers.tiny_models import model_path, prompt, reference
from safetensors.torch import load_file, save_file
from torch import Tensor

from trimaran.core.errors import ConfigError, ModelLoadError
from trimaran.core.models import loader
from trimaran.core.models.checkpoint import Checkpoint
from trimaran.core.models.layers import VocabEmbedding
from trimaran.core.models.weights import WeightSlot
from trimaran.platforms.communicator import LocalCommunicator
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.interface import Device, PackedWeight, WeightPacker
from trimaran.platforms.strict import StrictPlatform

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def load(path: Path, **options: Any) -> Harness:
    return Harness(CpuPlatform(), path, length=32, **options)


def error_of(path: Path, **options: Any) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load(path, **options)
    return str(caught.value)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[..., Path]:
    """A writable copy of a variant, its tensors changed by `edit`."""

    def make(variant: str, edit: Callable[[dict[str, Tensor]], Any] | None = None) -> Path:
        path = tmp_path / variant
        shutil.copytree(model_path(variant), path)
        if edit is not None:
            tensors = load_file(path / FILE)
            edit(tensors)
            save_file(tensors, path / FILE)
        return path

    return make


def shard(path: Path) -> None:
    """Replace the single file by shards and an index."""
    reference(path.name).save_pretrained(path, max_shard_size="200KB")
    assert (path / INDEX).exists()
    (path / FILE).unlink(missing_ok=True)


@pytest.mark.parametrize("variant", ["qwen2", "llama3"])
def test_sharded_equals_single(variant: str, copy_of: Callable[..., Path]) -> None:
    path = copy_of(variant)
    shard(path)
    assert len(list(path.glob("model-*.safetensors"))) > 1
    ids = prompt(20)
    expected = load(model_path(variant)).logits(ids)
    torch.testing.assert_close(load(path).logits(ids), expected, rtol=0, atol=0)


def test_every_fault_is_named_at_once(copy_of: Callable[..., Path]) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        del tensors["model.layers.2.mlp.up_proj.weight"]
        tensors[Q_PROJ] = tensors[Q_PROJ][:-64].clone()
        tensors["model.layers.0.mlp.down_proj.weight"] = torch.ones(128, 256, dtype=torch.int8)
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(256)
        tensors["model.layers.3.input_layernorm.weight"] = torch.zeros(128)
        tensors["model.norm.bias"] = torch.zeros(128)

    message = error_of(copy_of("llama3", edit))
    assert "7 tensors at fault" in message
    assert "missing: model.norm.weight [128]" in message
    assert "missing: model.layers.2.mlp.up_proj.weight [256, 128]" in message
    assert f"misshapen: {Q_PROJ} is [192, 128], expected [256, 128]" in message
    assert "element type: model.layers.0.mlp.down_proj.weight is I8" in message
    assert "extra: model.layers.0.self_attn.q_proj.bias [256]" in message
    assert "extra: model.layers.3.input_layernorm.weight [128]" in message
    assert "extra: model.norm.bias [128]" in message


def test_many_faults_are_cut_short(copy_of: Callable[..., Path]) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors.update({f"junk.{i}": torch.zeros(1) for i in range(150)})

    message = error_of(copy_of("llama3", edit))
    assert "150 tensors at fault" in message
    assert "and 50 more" in message


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("llama3", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("qwen2", "lm_head.weight"),
    ],
)
def test_known_extras_are_ignored(variant: str, name: str, copy_of: Callable[..., Path]) -> None:
    path = copy_of(variant, lambda tensors: tensors.update({name: torch.full((7,), torch.nan)}))
    ids = prompt(9)
    torch.testing.assert_close(load(path).logits(ids), load(model_path(variant)).logits(ids))


def test_an_untied_head_must_be_there(copy_of: Callable[..., Path]) -> None:
    message = error_of(copy_of("llama3", lambda tensors: tensors.pop("lm_head.weight")))
    assert "missing: lm_head.weight [1031, 128]" in message


@pytest.mark.parametrize("keep", [0, 5, 100, -4096])
def test_truncated_file(keep: int, copy_of: Callable[..., Path]) -> None:
    path = copy_of("llama3")
    content = (path / FILE).read_bytes()
    (path / FILE).write_bytes(content[:keep])
    message = error_of(path)
    assert str(path / FILE) in message
    assert f"{len(content[:keep])} bytes" in message
    if keep < 0:
        assert f"promises {len(content)}" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xff" * 64, "64 bytes are too few"),
        ((8).to_bytes(8, "little") + b"not json", "not a valid safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "not a valid safetensors file"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    ],
)
def test_corrupt_header(content: bytes, words: str, copy_of: Callable[..., Path]) -> None:
    path = copy_of("llama3")
    (path / FILE).write_bytes(content)
    message = error_of(path)
    assert str(path / FILE) in message and words in message


def test_truncated_shards_are_all_named(copy_of: Callable[..., Path]) -> None:
    path = copy_of("llama3")
    shard(path)
    victims = sorted(path.glob("model-*.safetensors"))[1:3]
    for victim in victims:
        victim.write_bytes(victim.read_bytes()[:-8])
    message = error_of(path)
    assert all(victim.name in message for victim in victims)


def test_absent_shards_are_all_named(copy_of: Callable[..., Path]) -> None:
    path = copy_of("llama3")
    shard(path)
    victims = sorted(path.glob("model-*.safetensors"))[:2]
    for victim in victims:
        victim.unlink()
    message = error_of(path)
    assert "names files that are not there" in message
    assert all(victim.name in message for victim in victims)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "not an index"),
        ("[]", "not an index"),
        ('{"weight_map": {}}', "not an index"),
        ('{"weight_map": {"a": 3}}', "not an index"),
        ('{"weight_map": {"a": "../../etc/weights.safetensors"}}', "outside its directory"),
    ],
)
def test_bad_index(index: str, words: str, copy_of: Callable[..., Path]) -> None:
    path = copy_of("llama3")
    (path / FILE).unlink()
    (path / INDEX).write_text(index)
    message = error_of(path)
    assert INDEX in message and words in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(name: str, copy_of: Callable[..., Path]) -> None:
    path = copy_of("llama3")
    (path / FILE).rename(path / name)
    message = error_of(path)
    assert name in message and "safetensors" in message


def test_no_weights_at_all(copy_of: Callable[..., Path], tmp_path: Path) -> None:
    path = copy_of("llama3")
    (path / FILE).unlink()
    assert "no weights" in error_of(path)
    with pytest.raises(ModelLoadError, match="not a directory"):
        Checkpoint(tmp_path / "nowhere")


def test_half_precision_checkpoint_converts(copy_of: Callable[..., Path]) -> None:
    def halve(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    one = load(copy_of("llama3", halve))
    weight = load_file(model_path("llama3") / FILE)["model.norm.weight"]
    assert one.decoder.norm is not None
    loaded = one.decoder.norm._weight
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded, weight.bfloat16().float(), rtol=0, atol=0)


def test_a_rank_reads_only_its_share() -> None:
    """Indexing the checkpoint reads just the rows or columns asked for."""
    with Checkpoint(model_path("llama3")) as checkpoint:
        whole = load_file(model_path("llama3") / FILE)[Q_PROJ]
        for dim, start in ((0, 64), (1, 32)):
            target = torch.empty(64, 128) if dim == 0 else torch.empty(256, 32)
            slot = WeightSlot(Q_PROJ, (256, 128), start, start + target.shape[dim], dim)
            assert slot.numel == target.numel()
            expected = whole.narrow(dim, start, target.shape[dim])
            assert torch.equal(checkpoint[Q_PROJ][slot.share], expected)
            assert torch.equal(checkpoint[Q_PROJ][slot.rows(3, 9)], expected[3:9])


def test_dummy_weights_are_seeded() -> None:
    path, ids = model_path("qwen3_tied"), prompt(12)
    first, again, other = (
        load(path, load_format="dummy", seed=seed).logits(ids) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(set(first.argmax(-1).tolist())) > 1


def test_unknown_format() -> None:
    with pytest.raises(ConfigError, match="Known: auto, safetensors, dummy"):
        load(model_path("llama3"), load_format="gguf")


def test_slow_loads_show_progress(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loader, "PROGRESS_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "trimaran.loader"):
        load(model_path("llama3"))
    assert "loading weights: 100 %" in caplog.messages


def test_nothing_stays_poisoned() -> None:
    """On `strict` fresh memory is NaN: every weight must have been written, padding too."""
    one = Harness(StrictPlatform(), model_path("llama_biased"), length=32)
    assert one.decoder.norm is not None and not one.decoder.norm._weight.isnan().any()
    assert not one.logits(prompt(9)).isnan().any()
    one.close()


class Dropping(StrictPlatform):
    """Packs weights into nothing, and notes what the device holds each time."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[int] = []
        self.device: Device | None = None

    def open(self, device: int = 0, num_threads: int | None = None) -> Device:
        self.device = super().open(device, num_threads)
        return self.device

    def weight_packers(self) -> Mapping[str, WeightPacker]:
        platform = self

        class Packer(WeightPacker):
            format = "dense"

            def pack(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedWeight:
                assert platform.device is not None
                platform.held.append(platform.device.memory().by_tag["weights"])
                return PackedWeight("nothing", shape, ())

        return {"dense": Packer()}


def test_plain_weights_of_one_layer_exist_at_a_time() -> None:
    platform = Dropping()
    one = Harness(platform, model_path("llama3"), length=32)
    kept = one.device.memory().by_tag["weights"]
    largest = 1031 * 128 * 4  # the head
    assert len(platform.held) == 3 * 4 + 1
    assert max(platform.held) == kept + largest
    assert sorted(platform.held)[-2] == kept + 2 * 256 * 128 * 4, "gate and up"
    one.close()


def test_a_checkpoint_is_mapped_anew_while_it_is_read(
    monkeypatch: pytest.MonkeyPatch, copy_of: Callable[..., Path]
) -> None:
    """Else all that was read would count as the process's own until the last byte is."""
    path = copy_of("llama3")
    shard(path)
    released: list[int] = []
    release = Checkpoint.release
    monkeypatch.setattr(loader, "READ_BYTES", 3000)
    monkeypatch.setattr(loader, "MAPPED_BYTES", 100_000)
    monkeypatch.setattr(
        Checkpoint, "release", lambda self: (released.append(len(set(self))), release(self))
    )
    ids = prompt(20)
    found = load(path).logits(ids)
    assert len(released) > 10 and set(released) == {3 * 9 + 3}
    monkeypatch.undo()
    assert torch.equal(found, load(model_path("llama3")).logits(ids))


class LastOfTwo(LocalCommunicator):
    """Rank 1 of a group of two that never meets: enough to load a share."""

    rank = 1
    size = 2


def test_a_share_is_padded_with_zeros_and_no_larger_than_it_must() -> None:
    """1031 ids on two ranks: 516 rows each, the last of rank 1 none of the vocabulary's."""
    path = model_path("llama3")
    one = Harness(StrictPlatform(), path, length=32, comm=LastOfTwo())
    assert isinstance(one.decoder.embed, VocabEmbedding) and one.decoder.head is not None
    whole = load_file(path / FILE)
    table = one.decoder.embed.table
    assert torch.equal(table[:515], whole["model.embed_tokens.weight"][516:])
    assert table.shape == (516, 128) and not table[515].any()
    assert one.decoder.head._packed is not None
    head = one.decoder.head._packed.tensors[0]
    assert torch.equal(head[:515], whole["lm_head.weight"][516:]) and not head[515].any()
    stored = sum(tensor.numel() * 4 for tensor in whole.values())
    assert one.device.memory().by_tag["weights"] < 0.6 * stored
    one.close()


def test_memory_is_accounted() -> None:
    """Weights go through the device's ledger, once: a tied head takes no memory of its own."""
    path = model_path("qwen2")
    one = Harness(StrictPlatform(), path, length=32)
    header = json.loads((path / "config.json").read_text())
    assert header["tie_word_embeddings"]
    stored = sum(tensor.numel() * 4 for tensor in load_file(path / FILE).values())
    table = one.buffers.max_positions * one.decoder.spec.rope.dim * 4
    assert one.device.memory().by_tag["weights"] == stored + table
