"""A decoder driven directly: one sequence or several, no scheduler, no runner."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimaran.core.config import CacheConfig, CacheGroupConfig
from trimaran.core.models.decoder import Decoder
from trimaran.core.models.loader import load_model
from trimaran.core.models.registry import decoder_spec
from trimaran.core.models.step import StepBuffers, make_groups
from trimaran.core.ops import OpBinder
from trimaran.platforms.communicator import LocalCommunicator
from trimaran.platforms.interface import AttentionBatch, Communicator, Device, Platform


class Chunk(NamedTuple):
    """Tokens of sequence `sequence` at positions from `start` on."""

    sequence: int
    start: int
    token_ids: Sequence[int]


class Harness:
    """A model on a platform, with room for `sequences` of `length` tokens each. Blocks of a
    sequence lie scattered, and never at the same places in two groups."""

    def __init__(
        self,
        platform: Platform,
        path: Path,
        *,
        comm: Communicator | None = None,
        dtype: torch.dtype = torch.float32,
        length: int = 128,
        sequences: int = 1,
        quantization: str | None = None,
        **load: Any,
    ) -> None:
        comm = comm or LocalCommunicator()
        self.device: Device = platform.open(0)
        self.binder = OpBinder(platform, self.device, quantization=quantization)
        spec = decoder_spec(json.loads((path / "config.json").read_text()))
        block_size = 8
        per_sequence = -(-length // block_size)
        num_blocks = 1 + sequences * per_sequence
        groups = tuple(
            CacheGroupConfig(
                name=group.name,
                layers=group.layers,
                block_size=block_size,
                num_blocks=num_blocks,
                sliding_window=group.sliding_window,
            )
            for group in spec.cache_groups()
        )
        cache = CacheConfig(groups=groups, dtype=dtype)
        self.buffers = StepBuffers(
            self.device,
            make_groups(spec, self.binder, cache, dtype=dtype, ranks=comm.size),
            max_tokens=length * sequences,
            max_positions=length,
        )
        self.decoder: Decoder = load_model(
            path, spec, self.binder, self.buffers, comm, dtype=dtype, **load
        )
        self.decoder.bind_kv(
            {
                layer: group.impl.alloc(self.device, group.spec, num_blocks)
                for group in self.buffers.groups
                for layer in group.layers
            }
        )
        generator = torch.Generator().manual_seed(7)
        self.tables = [
            (1 + torch.randperm(num_blocks - 1, generator=generator)).view(sequences, -1).int()
            for _ in groups
        ]

    def step(self, chunks: Sequence[Chunk]) -> Tensor:
        """Compute the chunks in one step; fp32 logits `[tokens, vocab]` of all their tokens."""
        result: list[Tensor] = []
        event = self.device.launch(lambda: result.append(self._forward(chunks)))
        event.wait()
        return result[0]

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """One whole prompt in one step."""
        return self.step([Chunk(0, 0, token_ids)])

    def close(self) -> None:
        self.device.close()

    def _forward(self, chunks: Sequence[Chunk]) -> Tensor:
        buffers = self.buffers
        starts = [0]
        for chunk in chunks:
            starts.append(starts[-1] + len(chunk.token_ids))
        buffers.begin(starts[-1])
        ids = [token for chunk in chunks for token in chunk.token_ids]
        positions = [c.start + i for c in chunks for i in range(len(c.token_ids))]
        buffers.token_ids.copy_(torch.tensor(ids))
        buffers.positions.copy_(torch.tensor([positions]))
        for group, tables in zip(buffers.groups, self.tables, strict=True):
            rows = tables[[chunk.sequence for chunk in chunks]]
            owner = [i for i, chunk in enumerate(chunks) for _ in chunk.token_ids]
            at, size = torch.tensor(positions), group.spec.block_size
            group.slots.copy_(rows[owner, at // size].long() * size + at % size)
            lens = [chunk.start + len(chunk.token_ids) for chunk in chunks]
            batch = AttentionBatch(starts, lens, rows, group.slots)
            group.metadata = group.impl.plan(group.spec, batch)
        return self.decoder.logits(self.decoder.forward())
