"""Signatures first; the bodies follow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ...platforms.interface import Communicator, LayerKV
from ..ops import OpBinder
from .spec import DecoderSpec
from .step import StepBuffers


class LayerRange(NamedTuple):
    """The layers [start, stop) that a pipeline stage holds."""

    start: int
    stop: int


class Decoder:
    """A stage of the decoder on one rank."""

    def __init__(
        self,
        spec: DecoderSpec,
        binder: OpBinder,
        buffers: StepBuffers,
        comm: Communicator,
        *,
        dtype: torch.dtype,
        layers: LayerRange | None = None,
    ) -> None: ...

    def bind_kv(self, layer_kvs: Mapping[int, LayerKV]) -> None:
        """Give every attention layer of this stage its cache (`group.impl.alloc(…)`)."""

    def forward(self, hidden: Tensor | None = None) -> Tensor:
        """The step in the buffers → hidden `[tokens, hidden]`, normed on the last stage.
        `hidden`: what the stage before returned; None on the first, which reads token ids."""
        raise NotImplementedError

    def logits(self, rows: Tensor) -> Tensor:
        """`[rows, hidden]` of `forward`'s result → fp32 `[rows, vocab]` on every rank."""
        raise NotImplementedError
