"""Packed weights on disk, so that the next start neither quantizes nor packs.

One file for each model, element type, quantization, rank and layout, in the form of safetensors:
whoever wants to look into it can. It is read into one allocation of the device, where weights lie
one after the other. Only layouts of plain tensors can be stored (`WeightPacker.layout`), on devices
that share the host's memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import struct
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...platforms.interface import Device, PackedWeight
from ...platforms.registry import user_cache
from ..config import ModelSpec
from ..ops import OpBinder

logger = logging.getLogger("trimaran.loader")

VERSION = 1
"""Of what is stored; raised when the same checkpoint would give other weights."""
ALIGNMENT = 4096
"""Bytes; where weights begin in memory."""
CHUNK = 16 << 20
READERS = 4
AUTO_BYTES = 256 << 20
"""Smaller checkpoints are packed in no time."""
SPARE = 4
"""A file is written only where the disk has this many times its size left."""


def open_cache(model: ModelSpec, binder: OpBinder, *, rank: int, ranks: int) -> PackedCache | None:
    """The packed weights of this model and rank; None where they are not kept."""
    directory, layouts = _directory(model), binder.layouts()
    if directory is None or not layouts or model.load_format == "dummy":
        return None
    files = _weight_files(model)
    facts = {
        "version": VERSION,
        "model": str(model.path.resolve()),
        "files": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        "config": model.hf_config,
        "dtype": str(model.dtype),
        "quantization": model.quantization,
        "layouts": layouts,
        "rank": (rank, ranks),
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    path = directory / f"{model.path.name}-{digest[:16]}.safetensors"
    return PackedCache(path, binder.device)


def _directory(model: ModelSpec) -> Path | None:
    if model.packed_cache == "off":
        return None
    if model.packed_cache != "auto":
        return Path(model.packed_cache)
    home = user_cache()
    small = sum(file.stat().st_size for file in _weight_files(model)) < AUTO_BYTES
    return None if small or home is None else home / "packed"


def _weight_files(model: ModelSpec) -> list[Path]:
    return sorted(model.path.glob("*.safetensors"))


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tensor of the file: where its bytes lie there, and where they go in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int
    place: int


class PackedCache:
    """The packed weights of one file: those that it holds are handed out by name; those that are
    made instead are written by `save`, if all went well."""

    def __init__(self, path: Path, device: Device) -> None:
        self._path = path
        self._device = device
        self._stored = self._open()
        self._made: dict[str, PackedWeight] = {}

    def get(self, name: str, shape: tuple[int, int]) -> PackedWeight | None:
        weight = self._stored.get(name)
        return weight if weight is not None and weight.shape == shape else None

    def add(self, name: str, weight: PackedWeight) -> None:
        self._made[name] = weight

    def save(self) -> None:
        """Write what was made, unless all was there or the disk has little room; a file that
        cannot be written is a line in the log."""
        if not self._made:
            return
        weights = {**self._stored, **self._made}
        size = sum(tensor.nbytes for weight in weights.values() for tensor in weight.tensors)
        partial = self._path.with_suffix(f".{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if shutil.disk_usage(self._path.parent).free < SPARE * size:
                logger.info("packed weights are not kept: the disk of %s is near full", self._path)
                return
            _write(partial, weights, self._device)
            partial.replace(self._path)
        except OSError as error:
            logger.warning("packed weights are not kept: %s", error)
            with contextlib.suppress(OSError):
                partial.unlink()
        else:
            logger.info("packed weights are kept for the next start: %s", self._path)

    def _open(self) -> dict[str, PackedWeight]:
        """What the file holds; nothing if there is none, or it cannot be read."""
        try:
            file = os.open(self._path, os.O_RDONLY)
        except FileNotFoundError:
            return {}
        except OSError as error:
            logger.warning("packed weights are made again: %s", error)
            return {}
        try:
            described, entries = _header(file)
            memory = _read(file, entries.values(), self._device)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            logger.warning("packed weights are made again: %s is damaged: %r", self._path, error)
            return {}
        finally:
            os.close(file)
        weights = dict(_weights(described, entries, memory))
        for weight in weights.values():  # they outlive `memory`, whose parts they are
            self._device.account(weight, weight.extra_bytes, tag="weights")
        return weights


def _write(path: Path, weights: Mapping[str, PackedWeight], device: Device) -> None:
    described, header, tensors, end = {}, {}, [], 0
    for name, weight in weights.items():
        described[name] = {
            "format": weight.format,
            "shape": weight.shape,
            "count": len(weight.tensors),
        }
        for index, tensor in enumerate(weight.tensors):
            begin, end = end, end + tensor.nbytes
            header[f"{name}:{index}"] = {
                "dtype": _NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
            tensors.append(tensor)
    text = json.dumps({"__metadata__": {"weights": json.dumps(described)}, **header}).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            values = tensor.contiguous().view(-1).view(torch.uint8)
            file.write((values if values.device == _HOST else device.to_host(values)).numpy().data)


def _header(file: int) -> tuple[dict[str, Any], dict[str, _Entry]]:
    """What the weights are, and their tensors in the order of the file."""
    (length,) = struct.unpack("<Q", os.pread(file, 8, 0))
    header = json.loads(os.pread(file, length, 8))
    described = json.loads(header.pop("__metadata__")["weights"])
    start, place, entries = 8 + length, 0, {}
    for name, value in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = value["data_offsets"]
        dtype = _DTYPES[value["dtype"]]
        entries[name] = _Entry(dtype, tuple(value["shape"]), start + begin, start + end, place)
        place += -(-(end - begin) // ALIGNMENT) * ALIGNMENT
    if os.fstat(file).st_size != max((entry.end for entry in entries.values()), default=start):
        raise ValueError("its length is not what its header says")
    return described, entries


def _read(file: int, entries: Collection[_Entry], device: Device) -> Tensor:
    """All tensors in one allocation, bytes; read by several threads at once."""
    last = max(entries, key=lambda entry: entry.place)
    memory = device.alloc((last.place + last.end - last.begin,), torch.uint8, tag="weights")

    def fill(part: tuple[int, int, int]) -> None:
        offset, place, size = part
        target = memory[place : place + size]
        if memory.device == _HOST:
            return _read_into(target, file, offset)
        staged = torch.empty(size, dtype=torch.uint8)
        _read_into(staged, file, offset)
        target.copy_(staged)

    parts = [part for entry in entries for part in _parts(entry)]
    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(fill, parts))
    return memory


def _read_into(target: Tensor, file: int, offset: int) -> None:
    """Fill `target`, bytes on the host. Raises OSError where the file ends before it is full."""
    room = target.numpy().data
    while room:
        count = os.preadv(file, [room], offset)
        if count == 0:
            raise OSError("it ends early")
        offset, room = offset + count, room[count:]


def _parts(entry: _Entry) -> Iterator[tuple[int, int, int]]:
    """Offset in the file, place in memory, bytes."""
    for offset in range(entry.begin, entry.end, CHUNK):
        size = min(CHUNK, entry.end - offset)
        yield offset, entry.place + offset - entry.begin, size


def _weights(
    described: dict[str, Any], entries: Mapping[str, _Entry], memory: Tensor
) -> Iterator[tuple[str, PackedWeight]]:
    for name, value in described.items():
        tensors = []
        for index in range(value["count"]):
            entry = entries[f"{name}:{index}"]
            part = memory[entry.place : entry.place + entry.end - entry.begin]
            tensors.append(part.view(entry.dtype).view(entry.shape))
        size = sum(tensor.nbytes for tensor in tensors)
        yield name, PackedWeight(value["format"], tuple(value["shape"]), tuple(tensors), size)


_HOST = torch.frombuffer(bytearray(1), dtype=torch.uint8).device
"""Where a file is read into: on a device that has its tensors there, nothing is copied twice."""

_DTYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "U8": torch.uint8,
    "I32": torch.int32,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""Of element types, as safetensors writes them."""
