"""Signatures first; the bodies follow."""

from __future__ import annotations

from pathlib import Path

import torch

from ...platforms.interface import Communicator
from ..ops import OpBinder
from .decoder import Decoder, LayerRange
from .spec import DecoderSpec
from .step import StepBuffers


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
    layers: LayerRange | None = None,
) -> Decoder:
    """Build the decoder and fill it from `path`'s safetensors (or with seeded random numbers,
    `load_format="dummy"`)."""
    raise NotImplementedError
