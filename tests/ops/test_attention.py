"""Random paged programs: every attention implementation against plain attention over a dict."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from trimaran.platforms import attention_plan, attention_torch
from trimaran.platforms.attention_reference import ReferenceAttention, attend
from trimaran.platforms.attention_torch import TorchPagedAttention
from trimaran.platforms.host_device import HostDevice
from trimaran.platforms.interface import AttentionBatch, AttentionImpl, AttentionSpec

IMPLEMENTATIONS: list[type[AttentionImpl]] = [TorchPagedAttention, ReferenceAttention]
BASE = AttentionSpec(
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    scale=0.125,
    dtype=torch.float32,
    kv_dtype=torch.float32,
    block_size=16,
)
SPECS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_kv_heads": 4},
    "mqa": {"num_kv_heads": 1},
    "odd block": {"block_size": 7},
    "block 24": {"block_size": 24},
    "block of one": {"block_size": 1},
    "head 80": {"head_dim": 80},
    "head 256": {"head_dim": 256, "num_heads": 2, "num_kv_heads": 1},
    "window": {"sliding_window": 20},
    "window of one": {"sliding_window": 1},
    "window odd block": {"sliding_window": 9, "block_size": 7},
    "softcap": {"softcap": 3.0},
    "softcap window": {"softcap": 3.0, "sliding_window": 20},
    "not causal": {"causal": False},
    "bfloat16": {"dtype": torch.bfloat16, "kv_dtype": torch.bfloat16},
    "bfloat16 window": {
        "dtype": torch.bfloat16,
        "kv_dtype": torch.bfloat16,
        "sliding_window": 20,
    },
    "float16": {"dtype": torch.float16, "kv_dtype": torch.float16},
    "float16 softcap": {"dtype": torch.float16, "kv_dtype": torch.float16, "softcap": 3.0},
    "narrow cache": {"kv_dtype": torch.bfloat16},
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# (queries, length) of each sequence in a step.
STEPS: dict[str, list[tuple[int, int]]] = {
    "one token": [(1, 1)],
    "one decode": [(1, 45)],
    "equal decodes": [(1, 33)] * 4,
    "decodes": [(1, 3), (1, 50), (1, 17), (1, 16), (1, 49)],
    "very different decodes": [(1, 2), (1, 400), (1, 5), (1, 390), (1, 7)],
    "one prefill": [(70, 70)],
    "prefills": [(40, 40), (39, 39), (8, 8), (40, 40)],
    "chunk": [(40, 90)],
    "few": [(3, 50), (2, 48), (4, 51)],
    "mixed": [(1, 60), (30, 30), (5, 64), (1, 1), (90, 120), (1, 61), (1, 300)],
}


def spec_of(name: str) -> AttentionSpec:
    return dataclasses.replace(BASE, **SPECS[name])


@dataclass
class Program:
    """The sequences' tokens in a dict-like model, and in the paged cache of `impl`.

    The cache starts as NaN everywhere (the scratch block too), so that reading any position that
    was not written shows.
    """

    spec: AttentionSpec
    impl: AttentionImpl
    seed: int = 0
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    tables: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.num_blocks = 8 + 3000 // self.spec.block_size
        self.kv = self.impl.alloc(HostDevice(), self.spec, self.num_blocks)
        assert all(not region.tensor.any() for region in self.kv.regions), "alloc must zero"
        for region in self.kv.regions:
            region.tensor.fill_(float("nan"))
        self.free = list(range(1, self.num_blocks))
        self.random.shuffle(self.free)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def extend(self, sequence: int, count: int) -> list[int]:
        """`count` more tokens are written; returns their slots."""
        spec = self.spec
        shape = (count, spec.num_kv_heads, spec.head_dim)
        new = [self.normal(*shape).to(spec.dtype) for _ in range(2)]
        old = self.keys.get(sequence, new[0][:0])
        start, end = len(old), len(old) + count
        table = self.tables.setdefault(sequence, [])
        while len(table) * spec.block_size < end:
            table.append(self.free.pop())
        slots = [
            table[at // spec.block_size] * spec.block_size + at % spec.block_size
            for at in range(start, end)
        ]
        self.impl.write(new[0], new[1], self.kv, torch.tensor(slots, dtype=torch.int64))
        rounded = [tensor.to(spec.kv_dtype).to(spec.dtype) for tensor in new]
        self.keys[sequence] = torch.cat((old, rounded[0]))
        self.values[sequence] = torch.cat((self.values.get(sequence, old), rounded[1]))
        return slots

    def drop_outside_window(self, sequence: int, queries: int) -> None:
        """Blocks no query of this step sees are freed and poisoned: their entries become 0."""
        if self.spec.sliding_window is None or not self.spec.causal:
            return
        length = len(self.keys[sequence])
        first = max(0, length - queries - self.spec.sliding_window + 1) // self.spec.block_size
        table = self.tables[sequence]
        for index, block in enumerate(table[:first]):
            if block:
                for region in self.kv.regions:
                    region.tensor[block] = float("nan")
                self.free.insert(0, block)
                table[index] = 0

    def step(self, work: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """(sequence, queries) each; returns (found, expected)."""
        spec = self.spec
        slots = [slot for sequence, count in work for slot in self.extend(sequence, count)]
        for sequence, count in work:
            self.drop_outside_window(sequence, count)
        starts = [0]
        for _, count in work:
            starts.append(starts[-1] + count)
        width = max(len(self.tables[s]) for s, _ in work) + self.random.randrange(3)
        # Entries past a sequence's end are never read: 0 there, as before a window.
        tables = torch.zeros(len(work), width, dtype=torch.int32)
        for row, (sequence, _) in enumerate(work):
            tables[row, : len(self.tables[sequence])] = torch.tensor(self.tables[sequence])
        batch = AttentionBatch(
            starts, [len(self.keys[s]) for s, _ in work], tables, torch.tensor(slots)
        )
        query = self.normal(starts[-1], spec.num_heads, spec.head_dim).to(spec.dtype)
        found = self.impl.run(query, self.kv, spec, self.impl.plan(spec, batch))
        expected = [
            attend(query[starts[i] : starts[i + 1]], self.keys[s], self.values[s], spec)
            for i, (s, _) in enumerate(work)
        ]
        return found, torch.cat(expected)


def run_step(
    spec: AttentionSpec, impl: AttentionImpl, step: list[tuple[int, int]], seed: int = 0
) -> tuple[Tensor, Tensor]:
    program = Program(spec, impl, seed)
    for sequence, (queries, length) in enumerate(step):
        if length > queries:
            program.extend(sequence, length - queries)
    return program.step([(sequence, queries) for sequence, (queries, _) in enumerate(step)])


def check(spec: AttentionSpec, found: Tensor, expected: Tensor) -> None:
    assert found.dtype == spec.dtype and found.shape == expected.shape
    tolerance = TOLERANCE[spec.dtype]
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Limits so low that steps are cut into many pieces and groups."""
    monkeypatch.setattr(attention_plan, "SCORES", 4 * 600)
    monkeypatch.setattr(attention_plan, "PIECE_QUERIES", 4)
    monkeypatch.setattr(attention_plan, "WINDOW_QUERIES", 8)
    monkeypatch.setattr(attention_plan, "GROUP_BYTES", 1 << 16)
    yield


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("onednn", [True, False], ids=["onednn bf16", "no onednn bf16"])
@pytest.mark.parametrize("name", ["bfloat16", "bfloat16 window"])
def test_decode_in_bfloat16_by_either_road(
    name: str, onednn: bool, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_torch, "onednn_multiplies_bfloat16", lambda: onednn)
    spec = spec_of(name)
    check(spec, *run_step(spec, TorchPagedAttention(), STEPS[step]))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", SPECS)
def test_one_step(name: str, step: str) -> None:
    spec, impl = spec_of(name), TorchPagedAttention()
    assert impl.supports(spec)
    check(spec, *run_step(spec, impl, STEPS[step]))


@pytest.mark.parametrize("name", SPECS)
def test_one_step_of_the_reference(name: str) -> None:
    check(spec_of(name), *run_step(spec_of(name), ReferenceAttention(), STEPS["mixed"]))


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize("name", ["gqa", "window", "softcap window", "bfloat16", "not causal"])
def test_steps_cut_into_small_groups(name: str) -> None:
    spec = spec_of(name)
    for step in STEPS.values():
        check(spec, *run_step(spec, TorchPagedAttention(), step))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["gqa", "window odd block", "bfloat16 window"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_random_programs(implementation: type[AttentionImpl], name: str, seed: int) -> None:
    """Sequences come, grow by chunks and tokens, and go; their blocks are used again, stale."""
    spec = spec_of(name)
    program = Program(spec, implementation(), seed)
    choose = program.random
    alive: list[int] = []
    for number in range(14):
        if len(alive) < 5:
            alive.append(number)
        if len(alive) > 3 and choose.random() < 0.4:
            gone = alive.pop(choose.randrange(len(alive)))
            program.free += [block for block in program.tables.pop(gone, []) if block]
            program.keys.pop(gone, None)
            program.values.pop(gone, None)
        order = choose.sample(alive, len(alive))
        work = [(s, 1 if choose.random() < 0.6 else choose.randrange(1, 40)) for s in order]
        check(spec, *program.step(work))


def test_a_sequence_does_not_depend_on_its_batch_beyond_rounding() -> None:
    """A NaN in one sequence's own tokens stays there."""
    program = Program(BASE, TorchPagedAttention())
    for sequence, length in enumerate((20, 30, 25)):
        program.extend(sequence, length)
    block = program.tables[1][0]
    for region in program.kv.regions:
        region.tensor[block] = float("nan")
    found, expected = program.step([(0, 1), (1, 1), (2, 1)])
    assert found[1].isnan().all()
    check(BASE, found[[0, 2]], expected[[0, 2]])


def num_groups(lengths: list[int]) -> int:
    count = len(lengths)
    tables = torch.ones(count, 1 + max(lengths) // BASE.block_size, dtype=torch.int32)
    slots = torch.zeros(count, dtype=torch.int64)
    batch = AttentionBatch(list(range(count + 1)), lengths, tables, slots)
    plan: Any = TorchPagedAttention().plan(BASE, batch)
    return len(plan.groups)


def test_a_step_is_few_calls_and_little_padding() -> None:
    assert num_groups([100 + i % 10 for i in range(24)]) == 1
    assert num_groups([10, 1500, 12, 1510, 11]) == 2, "the short ones are not padded to the long"


def test_block_bytes_is_what_the_regions_hold() -> None:
    for implementation in IMPLEMENTATIONS:
        program = Program(BASE, implementation())
        regions = program.kv.regions
        assert sum(region.bytes for region in regions) == program.impl.block_bytes(BASE)
        for region in regions:
            assert region.tensor[0].is_contiguous()
            assert region.tensor[0].numel() * region.tensor.element_size() == region.bytes
            assert region.tensor.stride(0) * region.tensor.element_size() == region.stride


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_moved_blocks_serve_as_well(implementation: type[AttentionImpl]) -> None:
    program = Program(BASE, implementation())
    program.extend(0, 40)
    table = program.tables[0]
    moved = [program.free.pop() for _ in table]
    HostDevice().move_blocks(program.kv.regions, list(zip(table, moved, strict=True)))
    for region in program.kv.regions:
        region.tensor[table] = float("nan")
    program.tables[0] = moved
    check(BASE, *program.step([(0, 1)]))
