"""Attention of libraries that a user may have installed beside torch, over their paged layout.

They rank below the portable kernels, for nothing has been measured yet, and above torch's: they are
taken where `--attention-backend` names one, or where the portable ones refuse. What is not handed
on to them, or not by all their versions, they refuse: sliding windows (blocks before one may be the
scratch block, whose NaN a mask does not hide), softcaps, ALiBi, caches in another dtype than the
queries'.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from abc import abstractmethod
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor

from .attention_torch import TorchPagedAttention
from .interface import AttentionBatch, AttentionSpec, LayerKV, Support
from .transfers import to_accelerator

HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Library:
    """`module` is imported when the attention is planned first; `distribution` and `versions`:
    those whose functions are called as they are documented; `cards`: the architectures that it has
    kernels for, all whose names begin so."""

    module: str
    distribution: str
    versions: str
    cards: tuple[str, ...]

    def installed(self) -> bool:
        """Can the module be found? It is not imported."""
        return importlib.util.find_spec(self.module) is not None

    def refusal(self, cards: Collection[str]) -> str:
        """Why it cannot serve `cards`; empty: it can."""
        try:
            version = importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            return f"{self.module} is no part of an installed {self.distribution}"
        if not SpecifierSet(self.versions).contains(version, prereleases=True):
            return f"{self.distribution} {version} is not {self.versions}"
        strange = sorted(card for card in cards if not card.startswith(self.cards))
        return f"{self.distribution} has no kernels for {', '.join(strange)}" if strange else ""


@dataclass(frozen=True, slots=True)
class Lengths:
    """A step's sequences on the device: `query_starts` and `key_starts` int32 `[seqs + 1]`, sums
    of the queries and keys before; `lens` int32 `[seqs]`; `tables` int32 `[seqs, blocks]`."""

    query_starts: Tensor
    key_starts: Tensor
    lens: Tensor
    tables: Tensor
    max_queries: int
    max_keys: int


class LibraryAttention(TorchPagedAttention):
    """Keys and values lie as torch's own attention has them, which is the layout of them all:
    `[blocks, block_size, kv_heads, head_dim]` each."""

    name: str
    priority = 5
    layout = "NHD"
    library: ClassVar[Library]
    block_multiple: ClassVar[int] = 1
    head_dims: ClassVar[tuple[int, ...]] = tuple(range(8, 257, 8))

    def __init__(self, cards: Collection[str]) -> None:
        self._cards = cards

    def supports(self, spec: AttentionSpec) -> Support:
        if reason := self.library.refusal(self._cards) or self._refusal(spec):
            return Support.no(reason)
        return Support.yes(f"{self.library.distribution}'s paged attention")

    def _refusal(self, spec: AttentionSpec) -> str:
        if spec.dtype not in HALVES or spec.kv_dtype != spec.dtype:
            return f"it computes in 16 bits over a cache of the same, not {spec.dtype} over " + str(
                spec.kv_dtype
            )
        if spec.sliding_window is not None or spec.softcap or spec.alibi_slopes:
            return "no sliding window, softcap or ALiBi is handed on to it"
        if spec.num_heads % spec.num_kv_heads:
            return f"{spec.num_heads} heads over {spec.num_kv_heads} KV heads"
        if spec.head_dim not in self.head_dims:
            return f"no kernel for head_dim {spec.head_dim}"
        if spec.block_size % self.block_multiple:
            return f"block_size {spec.block_size}: it takes multiples of {self.block_multiple}"
        return ""

    @property
    def module(self) -> Any:
        return importlib.import_module(self.library.module)

    def plan(self, spec: AttentionSpec, batch: AttentionBatch) -> Any:
        return lengths_of(batch)

    @abstractmethod
    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Any) -> Tensor: ...


def lengths_of(batch: AttentionBatch) -> Lengths:
    """One copy to the device, waited for by nobody."""
    keys = torch.tensor([0, *batch.seq_lens], dtype=torch.int32)
    queries = torch.tensor(batch.query_starts, dtype=torch.int32)
    parts = (queries, keys.cumsum(0, dtype=torch.int32), keys[1:])
    there = to_accelerator(torch.cat(parts), batch.block_tables.device)
    query_starts, key_starts, lens = torch.split(there, [len(part) for part in parts])
    return Lengths(
        query_starts.clone(),  # each at an address of its own, aligned
        key_starts.clone(),
        lens.clone(),
        batch.block_tables.contiguous(),
        int(queries.diff().max()),
        max(batch.seq_lens),
    )
