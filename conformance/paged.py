"""Programs of sequences over a paged cache: the tokens in a dict-like model, and in the cache of an
attention implementation, on any device."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..platforms.attention_reference import attend, quantize_vectors, rounded
from ..platforms.interface import (
    AttentionBatch,
    AttentionImpl,
    AttentionSpec,
    Device,
    KVRegion,
)
from .lab import Guarded, on_device

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Of attention, relative and absolute, by the dtype of the queries."""

QUANTIZED = 3e-2
"""Of attention over a quantized cache: what its scales are is the implementation's own matter."""


def tolerance_of(spec: AttentionSpec) -> float:
    exact = TOLERANCE[spec.dtype]
    return exact if spec.kv_dtype.is_floating_point else max(exact, QUANTIZED)


def as_kept(vectors: Tensor, spec: AttentionSpec) -> Tensor:
    """What a cache of `spec` gives back of `[tokens, kv_heads, head_dim]`."""
    if spec.kv_dtype.is_floating_point:
        return rounded(vectors, spec.kv_dtype).to(spec.dtype)
    codes, scales = quantize_vectors(vectors)
    return codes.float() * scales.unsqueeze(-1)


CAPACITY = 3000  # tokens of all sequences of a program


class Step(NamedTuple):
    """One step: (sequence, tokens it computes) each. A sequence begins with its first step."""

    work: tuple[tuple[int, int], ...]


class Fork(NamedTuple):
    """`new` begins with the full blocks of `source`, shared as by a prefix cache."""

    new: int
    source: int


class Drop(NamedTuple):
    """The sequence ends; its blocks are used again, with what stands in them."""

    sequence: int


Action = Step | Fork | Drop


def simpler(action: Action) -> list[Action]:
    """With one sequence less, or fewer tokens."""
    if not isinstance(action, Step):
        return []
    work = action.work
    fewer: list[Action] = [Step(work[:i] + work[i + 1 :]) for i in range(len(work))]
    for i, (sequence, count) in enumerate(work):
        for less in dict.fromkeys((1, count // 2, count - 1)):
            if 0 < less < count:
                fewer.append(Step((*work[:i], (sequence, less), *work[i + 1 :])))
    return [one for one in fewer if one != Step(())]


def random_actions(seed: int, length: int) -> list[Action]:
    """Sequences come, by themselves or on another's prefix, grow by chunks and tokens, and go."""
    choose = random.Random(seed)
    actions: list[Action] = []
    alive: list[int] = []
    for number in range(length):
        if len(alive) < 5:
            if alive and choose.random() < 0.3:
                actions.append(Fork(number, choose.choice(alive)))
            alive.append(number)
        if len(alive) > 3 and choose.random() < 0.4:
            actions.append(Drop(alive.pop(choose.randrange(len(alive)))))
        order = choose.sample(alive, len(alive))
        work = [(s, 1 if choose.random() < 0.6 else choose.randrange(1, 40)) for s in order]
        actions.append(Step(tuple(work)))
    return actions


def poison(region: KVRegion, block: int | None = None) -> None:
    """NaN into one block of the region, or all: what nobody may read."""
    target = region.tensor if block is None else region.tensor[block]
    if target.dtype.is_floating_point:
        target.fill_(float("nan"))
    else:  # raw bytes: all bits set is a NaN of every floating dtype
        target.fill_(torch.iinfo(target.dtype).max if target.dtype == torch.uint8 else -1)


@dataclass
class Found:
    """What a step returned and what it should have; `touched`: memory written that may not be."""

    found: Tensor
    expected: Tensor
    touched: str = ""


class Program:
    """The cache starts as NaN everywhere (the scratch block too), so that reading any position
    that was not written shows. The `seed` decides which blocks and which values are used."""

    def __init__(
        self,
        spec: AttentionSpec,
        impl: AttentionImpl,
        device: Device,
        seed: int = 0,
        slot_dtype: torch.dtype = torch.int64,
    ) -> None:
        self.spec, self.impl, self.device = spec, impl, device
        self._slot_dtype = slot_dtype
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.tables: dict[int, list[int]] = {}
        self._leases: Counter[int] = Counter()
        num_blocks = 8 + CAPACITY // spec.block_size
        self.kv = impl.alloc(device, spec, num_blocks)
        self._stale: list[int | None] = [None]
        self.free = list(range(1, num_blocks))
        self.random.shuffle(self.free)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def act(self, action: Action) -> Found | None:
        """What does not apply (its sequence is not there) is passed over."""
        if isinstance(action, Fork):
            self.fork(action.new, action.source)
        elif isinstance(action, Drop):
            self.drop(action.sequence)
        elif self._room_for(action.work):
            return self.step(list(action.work))
        return None

    def fork(self, new: int, source: int) -> None:
        if new in self.tables or source not in self.tables:
            return
        full = len(self.keys[source]) // self.spec.block_size
        shared = self.tables[source][:full]
        if not shared or 0 in shared:  # some are outside the source's window: gone
            return
        self._leases.update(shared)
        self.tables[new] = list(shared)
        length = full * self.spec.block_size
        self.keys[new] = self.keys[source][:length]
        self.values[new] = self.values[source][:length]

    def drop(self, sequence: int) -> None:
        for block in self.tables.pop(sequence, []):
            self._release(block)
        self.keys.pop(sequence, None)
        self.values.pop(sequence, None)

    def extend(self, sequence: int, count: int) -> list[int]:
        """`count` more tokens are written; returns their slots."""
        slots, key, value = self._append(sequence, count)
        sent = [Guarded(self.device, one) for one in (key, value, self._slots(slots))]
        on_device(self.device, lambda: self._write(*(one.tensor for one in sent)))
        return slots

    def step(self, work: Sequence[tuple[int, int]]) -> Found:
        """(sequence, queries) each, whose tokens are written and attended to in one launch."""
        new = [self._append(sequence, count) for sequence, count in work]
        for sequence, count in work:
            self.drop_outside_window(sequence, count)
        slots = [slot for one in new for slot in one[0]]
        key = torch.cat([keys for _, keys, _ in new])
        value = torch.cat([values for _, _, values in new])
        starts = [0]
        for _, count in work:
            starts.append(starts[-1] + count)
        query = self.normal(starts[-1], self.spec.num_heads, self.spec.head_dim)
        query = query.to(self.spec.dtype)
        lengths = [len(self.keys[sequence]) for sequence, _ in work]
        found, touched = self._run(
            starts, lengths, (query, key, value, self._slots(slots), self._tables(work))
        )
        expected = [
            attend(query[starts[i] : starts[i + 1]], self.keys[s], self.values[s], self.spec)
            for i, (s, _) in enumerate(work)
        ]
        return Found(found, torch.cat(expected), touched)

    def _run(
        self, starts: list[int], lengths: list[int], inputs: tuple[Tensor, ...]
    ) -> tuple[Tensor, str]:
        guards = [Guarded(self.device, one) for one in inputs]
        query, key, value, slots, tables = (guard.tensor for guard in guards)

        def work() -> tuple[Tensor, list[Tensor]]:
            metadata = self.impl.plan(self.spec, AttentionBatch(starts, lengths, tables, slots))
            self._write(key, value, slots)
            found = self.device.to_host(self.impl.run(query, self.kv, self.spec, metadata))
            return found, [guard.read(self.device) for guard in guards]

        found, reads = on_device(self.device, work)
        names = ("query", "key", "value", "slots", "block_tables")
        for name, guard, read in zip(names, guards, reads, strict=True):
            if said := guard.changed(read):
                return found, f"{name}: {said}"
        return found, ""

    def _write(self, key: Tensor, value: Tensor, slots: Tensor) -> None:
        """Inside a launch; what became stale since is spoilt first."""
        for block in self._stale:
            for region in self.kv.regions:
                poison(region, block)
        self._stale.clear()
        self.impl.write(key, value, self.kv, slots)

    def _append(self, sequence: int, count: int) -> tuple[list[int], Tensor, Tensor]:
        """Tokens for the model; their slots, keys and values for the cache."""
        spec = self.spec
        shape = (count, spec.num_kv_heads, spec.head_dim)
        new = [self.normal(*shape).to(spec.dtype) for _ in range(2)]
        old = self.keys.get(sequence, new[0][:0])
        start, end = len(old), len(old) + count
        table = self.tables.setdefault(sequence, [])
        while len(table) * spec.block_size < end:
            table.append(self.free.pop())
            self._leases[table[-1]] += 1
        slots = [
            table[at // spec.block_size] * spec.block_size + at % spec.block_size
            for at in range(start, end)
        ]
        rounded = [as_kept(tensor, spec) for tensor in new]
        self.keys[sequence] = torch.cat((old, rounded[0]))
        self.values[sequence] = torch.cat((self.values.get(sequence, old), rounded[1]))
        return slots, new[0], new[1]

    def drop_outside_window(self, sequence: int, queries: int) -> None:
        """Blocks no query of this step sees are freed: their entries become 0."""
        if self.spec.sliding_window is None or not self.spec.causal:
            return
        length = len(self.keys[sequence])
        first = max(0, length - queries - self.spec.sliding_window + 1) // self.spec.block_size
        table = self.tables[sequence]
        for index, block in enumerate(table[:first]):
            if block:
                self._release(block)
                table[index] = 0

    def _release(self, block: int) -> None:
        """The last one to hold it leaves it spoilt."""
        if block == 0:
            return
        self._leases[block] -= 1
        if not self._leases[block]:
            self.free.insert(0, block)
            self._stale.append(block)

    def _room_for(self, work: Sequence[tuple[int, int]]) -> bool:
        blocks = sum(count // self.spec.block_size + 2 for _, count in work)
        return blocks <= len(self.free)

    def _slots(self, slots: Sequence[int]) -> Tensor:
        return torch.tensor(slots, dtype=self._slot_dtype)

    def _tables(self, work: Sequence[tuple[int, int]]) -> Tensor:
        """Entries past a sequence's end are never read: 0 there, as before a window."""
        width = max(len(self.tables[s]) for s, _ in work) + self.random.randrange(3)
        tables = torch.zeros(len(work), width, dtype=torch.int32)
        for row, (sequence, _) in enumerate(work):
            tables[row, : len(self.tables[sequence])] = torch.tensor(self.tables[sequence])
        return tables
