"""A GPU of tensors without content: shapes, dtypes and devices are checked, nothing is computed.

Under torch's FakeTensorMode an op whose operands lie on two devices raises, and so does whatever
asks the device for a value: `.item()`, `.tolist()`, `bool()`. The device is called `meta`, the one
beside `cpu` that every build of torch has.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from trimaran.platforms import torch_accelerator, transfers
from trimaran.platforms.cuda import CudaPlatform
from trimaran.platforms.gpu_cards import Card, Survey
from trimaran.platforms.gpu_ops import torch_ops
from trimaran.platforms.interface import (
    AttentionImpl,
    AttentionSpec,
    Capabilities,
    Device,
    OpImpl,
    Telemetry,
)
from trimaran.platforms.torch_accelerator import TorchAccelerator

H100 = Card("GPU-0", "NVIDIA H100 80GB HBM3", 81559 << 20, "sm_90")


class Nothing:
    """A stream, event or graph without a device."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: True

    def __enter__(self) -> None:
        return None

    def __exit__(self, *args: object) -> None:
        return None


class NullAccelerator:
    """What TorchAccelerator asks of `torch.cuda`, answered without one."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: Nothing()

    def mem_get_info(self, ordinal: int) -> tuple[int, int]:
        return 80 << 30, 80 << 30

    def memory_reserved(self, ordinal: int) -> int:
        return 0

    memory_allocated = memory_reserved


class FakeTensorGpu(CudaPlatform):
    """An H100 that computes nothing, by torch's ops alone: Triton's kernels want memory. Used under
    `fake_tensors`."""

    def capabilities(self, device: int = 0) -> Capabilities:
        return dataclasses.replace(super().capabilities(device), compiles_steps=False)

    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        return torch_ops()

    def attention(self, spec: AttentionSpec) -> Sequence[AttentionImpl]:
        return [impl for impl in super().attention(spec) if impl.name != "triton"]

    @classmethod
    def survey(cls) -> Survey:
        return Survey((H100,))

    def open(self, device: int = 0, num_threads: int | None = None) -> Device:
        return TorchAccelerator(NullAccelerator(), device, 0, Telemetry, torch.device("meta"))


@contextlib.contextmanager
def fake_tensors(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is made inside has no content; the host's own tensors from outside may be used."""
    for module in (transfers, torch_accelerator):  # a build without accelerators pins nothing
        monkeypatch.setattr(module, "pinned_like", lambda x: torch.empty_like(x, device="cpu"))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
