"""Packed weights kept on disk: the next start takes them, and gives the same tokens."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from helpers.engine_loop import greedy, open_loop
from helpers.native import needs_native
from helpers.tiny_models import model_path
from torch import Tensor

from trimaran.core.models import packed_cache
from trimaran.platforms.interface import PackedWeight
from trimaran.platforms.strict_device import StrictDevice

pytestmark = needs_native
PROMPT = list(range(5, 25))


def tokens(variant: str, folder: Path | str, **args: Any) -> list[int]:
    options = {"platform": "cpu", "packed_cache": str(folder), "block_size": 16, **args}
    with open_loop(variant, **options) as loop:
        found = loop.run([greedy("a", PROMPT, 12)])
        memory = loop.executor.device.memory().by_tag["weights"]
    assert memory > 0
    return found["a", 0].tokens


@pytest.mark.parametrize("quantization", [None, "int8", "int4", "w4a16"])
@pytest.mark.parametrize("variant", ["qwen3", "qwen3_tied", "llama_biased"])
def test_the_second_start_packs_nothing(
    variant: str, quantization: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = tokens(variant, "off", quantization=quantization)
    assert tokens(variant, tmp_path, quantization=quantization) == expected
    (kept,) = tmp_path.iterdir()

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a weight is packed again")

    monkeypatch.setattr("trimaran.core.ops.OpBinder.pack", fail)
    assert tokens(variant, tmp_path, quantization=quantization) == expected
    assert list(tmp_path.iterdir()) == [kept]


@pytest.mark.parametrize("damage", ["truncated", "header", "empty"])
def test_a_damaged_file_is_made_again(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = tokens("qwen3", tmp_path)
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    broken = {"truncated": whole[:-1], "header": whole[:8] + b"x" + whole[9:], "empty": b""}[damage]
    kept.write_bytes(broken)
    assert tokens("qwen3", tmp_path) == expected
    assert "are made again" in caplog.text and kept.name in caplog.text
    assert kept.read_bytes() == whole


def test_another_checkpoint_dtype_or_quantization_has_a_file_of_its_own(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_path("qwen3"), model)
    folder = tmp_path / "kept"
    for change in ({}, {"quantization": "int8"}, {"dtype": "bfloat16"}):
        tokens("qwen3", folder, model=str(model), **change)
    assert len(list(folder.iterdir())) == 3
    weights = next(model.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes())  # as a new version of it would be
    tokens("qwen3", folder, model=str(model))
    assert len(list(folder.iterdir())) == 4


def test_a_full_disk_or_a_place_that_is_no_folder_costs_only_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    expected = tokens("qwen3", "off")
    assert tokens("qwen3", file / "folder") == expected
    assert "are not kept" in caplog.text
    monkeypatch.setattr(packed_cache, "SPARE", 1 << 40)
    assert tokens("qwen3", tmp_path / "folder") == expected
    assert not list((tmp_path / "folder").iterdir())


def test_small_checkpoints_are_not_kept_unless_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokens("qwen3", "auto")
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(packed_cache, "AUTO_BYTES", 0)
    tokens("qwen3", "auto")
    assert len(list((tmp_path / "trimaran" / "packed").iterdir())) == 1


class Foreign(Tensor):
    """Memory that is not the host's: its bytes cannot be had without a copy."""

    device = torch.device("meta")

    def numpy(self, *, force: bool = False) -> NoReturn:
        raise TypeError("it is not on the host")


class ForeignDevice(StrictDevice):
    def alloc(self, shape: Sequence[int], dtype: torch.dtype, tag: str) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype).as_subclass(Foreign)

    def to_host(self, tensor: Tensor) -> Tensor:
        assert isinstance(tensor, Foreign)
        return tensor.as_subclass(Tensor).clone()


def test_weights_on_a_device_are_kept_and_come_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_cache, "CHUNK", 64)
    parts = (torch.randn(24, 10).to(torch.float8_e4m3fn), torch.randn(24), torch.randn(3).half())
    there = tuple(part.as_subclass(Foreign) for part in parts)
    weight = PackedWeight("codes", (24, 10), there)
    device, path = ForeignDevice(0, 0.0), tmp_path / "file.safetensors"
    made = packed_cache.PackedCache(path, device)
    made.add("layer", weight)
    made.save()
    kept = packed_cache.PackedCache(path, device).get("layer", (24, 10))
    device.close()
    assert kept is not None
    for found, expected in zip(kept.tensors, parts, strict=True):
        assert isinstance(found, Foreign) and found.dtype == expected.dtype
        assert torch.equal(found.as_subclass(Tensor).float(), expected.float())
