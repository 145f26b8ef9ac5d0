"""Filling a decoder: from safetensors, each rank its own share, or with seeded random numbers.

Every tensor is checked by name, shape and element type before the first byte is copied, so that
nothing runs on uninitialised weights and a bad checkpoint is described once and whole.
"""

from __future__ import annotations

import logging
import re
import time
import zlib
from pathlib import Path

import torch
from torch import Tensor

from ...platforms.interface import Communicator
from ..errors import ConfigError, ModelLoadError
from ..ops import OpBinder
from .checkpoint import Checkpoint
from .decoder import Decoder
from .packed_cache import PackedCache
from .spec import DecoderSpec
from .step import StepBuffers
from .weights import Read, WeightSlot, WeightSource

logger = logging.getLogger("trimaran.loader")

FORMATS = ("auto", "safetensors", "dummy")
FLOATS = ("F64", "F32", "F16", "BF16")
DUMMY_STD = 0.02
DUMMY_PERIOD = 1_048_573
"""A prime, so that no power-of-two row length divides it and rows of random weights differ."""

READ_BYTES = 16 << 20
"""What is read of a tensor at once, so that no second copy of a large one is made on its way."""

MAPPED_BYTES = 64 << 20
"""What is read before the checkpoint is told to give its pages back."""

MAX_LISTED = 100
PROGRESS_SECONDS = 2.0


def load_model(
    path: Path,
    spec: DecoderSpec,
    binder: OpBinder,
    buffers: StepBuffers,
    comm: Communicator,
    *,
    dtype: torch.dtype,
    load_format: str = "auto",
    seed: int = 0,
) -> Decoder:
    """Build a whole decoder in `dtype` and fill it; see `fill`. `seed` is for `dummy`."""
    decoder = Decoder(spec, binder, buffers, comm, dtype=dtype)
    fill(decoder, path, load_format=load_format, seed=seed)
    return decoder


def fill(
    decoder: Decoder,
    path: Path,
    *,
    load_format: str = "auto",
    seed: int = 0,
    kept: PackedCache | None = None,
) -> None:
    """Fill `decoder` from the checkpoint in `path`, or with random weights (`dummy`), and make it
    ready to run. `kept`: packed weights of an earlier start of this checkpoint; what it lacked is
    written to it. Raises ModelLoadError naming every tensor and file at fault."""
    if load_format not in FORMATS:
        raise ConfigError(
            f"load_format={load_format!r} is unknown. Known: {', '.join(FORMATS)}.",
            param="load_format",
        )
    if load_format == "dummy":
        decoder.load(WeightSource(_random_reader(seed)))
    else:
        with Checkpoint(path) as checkpoint:
            slots = list(decoder.slots())
            _check(checkpoint, slots, decoder, path)
            decoder.load(WeightSource(_reader(checkpoint, slots), kept))
            if kept is not None:
                kept.save()
    decoder.device.synchronize()


def _reader(checkpoint: Checkpoint, slots: list[WeightSlot]) -> Read:
    """Copies from the mapped file; `slots` are all that it will be asked for."""
    progress = _Progress(sum(slot.numel for slot in slots))
    mapped = 0

    def read(slot: WeightSlot, target: Tensor) -> None:
        nonlocal mapped
        count, row_bytes = len(target), target[0].numel() * target.element_size()
        step = max(1, READ_BYTES // row_bytes)
        for first in range(0, count, step):
            last = min(first + step, count)
            target[first:last].copy_(checkpoint[slot.name][slot.rows(first, last)])
            mapped += (last - first) * row_bytes
            if mapped > MAPPED_BYTES:
                checkpoint.release()
                mapped = 0
        progress.add(slot.numel)

    return read


def _check(checkpoint: Checkpoint, slots: list[WeightSlot], decoder: Decoder, path: Path) -> None:
    """Raise one ModelLoadError for all tensors that are missing, extra or not as expected."""
    problems = []
    for slot in slots:
        if slot.name not in checkpoint:
            problems.append(f"missing: {slot.name} {list(slot.shape)}")
        elif checkpoint.shape(slot.name) != slot.shape:
            found = list(checkpoint.shape(slot.name))
            problems.append(f"misshapen: {slot.name} is {found}, expected {list(slot.shape)}")
        elif checkpoint.dtype(slot.name) not in FLOATS:
            problems.append(
                f"element type: {slot.name} is {checkpoint.dtype(slot.name)}, expected one of "
                f"{', '.join(FLOATS)} (quantized checkpoints are not read yet)"
            )
    unused = set(checkpoint) - {slot.name for slot in slots}
    problems += (
        f"extra: {name} {list(checkpoint.shape(name))}"
        for name in sorted(unused)
        if not _expected_elsewhere(name, decoder)
    )
    if problems:
        count = len(problems)
        listed = problems[:MAX_LISTED]
        if count > MAX_LISTED:
            listed.append(f"… and {count - MAX_LISTED} more")
        title = f"{path} does not match its config.json ({count} tensors at fault):"
        raise ModelLoadError("\n  ".join([title, *listed]))


def _expected_elsewhere(name: str, decoder: Decoder) -> bool:
    """Is this tensor left over for a known reason: another pipeline stage's, a head that repeats
    tied embeddings, or what the family says nobody needs?"""
    spec, names = decoder.spec, decoder.spec.names
    part, _, kind = name.rpartition(".")
    if names.ignored(name) or (part in names.top.values() and kind == "weight"):
        return True
    for template in names.layer.values():
        pattern = re.escape(template).replace(r"\{expert\}", r"\d+")
        match = re.fullmatch(pattern.replace(r"\{layer\}", r"(\d+)"), part)
        if match:
            layer = int(match[1])
            return layer < spec.num_layers and layer not in range(*decoder.layer_range)
    return False


def _random_reader(seed: int) -> Read:
    """The same weights whatever the group's size: a function of seed, name and full index."""
    generator = torch.Generator().manual_seed(seed)
    period = torch.randn(DUMMY_PERIOD, generator=generator).mul_(DUMMY_STD)

    def read(slot: WeightSlot, target: Tensor) -> None:
        if slot.init == "ones":
            target.fill_(1.0)
            return
        pattern = period.roll(zlib.crc32(slot.name.encode()) % DUMMY_PERIOD)
        target.copy_(_tiled(pattern.to(target.dtype), slot.shape)[slot.share])

    return read


def _tiled(pattern: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of `shape` that repeats `pattern`."""
    count = torch.Size(shape).numel()
    repeats = -(-count // len(pattern))
    return pattern.expand(repeats, -1).reshape(-1)[:count].view(shape)


class _Progress:
    """A line in the log every few seconds of a slow load; none for a quick one."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._done = 0
        self._due = time.monotonic() + PROGRESS_SECONDS

    def add(self, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now >= self._due:
            self._due = now + PROGRESS_SECONDS
            logger.info("loading weights: %d %%", 100 * self._done // self._total)
