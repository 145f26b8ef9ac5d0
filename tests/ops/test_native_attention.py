"""Attention by the native kernels: against plain attention, and bit for bit against itself."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch
from helpers.attention_steps import BASE, SLOPES, SPECS, STEPS, check, outcome, run_step
from helpers.native import needs_native
from torch import Tensor

from trimaran.conformance.paged import Program, random_actions
from trimaran.kernels_cpu.library import library
from trimaran.platforms.attention_reference import ReferenceAttention
from trimaran.platforms.cpu_attention import NativeAttention
from trimaran.platforms.host_device import HostDevice
from trimaran.platforms.interface import AttentionBatch, AttentionSpec, LayerKV

pytestmark = needs_native

INT8: dict[str, Any] = {"kv_dtype": torch.int8}
BF16: dict[str, Any] = {"dtype": torch.bfloat16, "kv_dtype": torch.bfloat16}
CHANGES: dict[str, dict[str, Any]] = {
    **{name: changes for name, changes in SPECS.items() if changes.get("block_size", 16) % 16 == 0},
    "block 48": {"block_size": 48},
    "bfloat16 block 48": {"block_size": 48, **BF16},
    "float16 mqa": {"num_kv_heads": 1, "dtype": torch.float16, "kv_dtype": torch.float16},
    "int8": INT8,
    "int8 bfloat16": {**INT8, "dtype": torch.bfloat16},
    "int8 window": {**INT8, "sliding_window": 20},
    "int8 mqa": {**INT8, "num_kv_heads": 1, "block_size": 32},
    "int8 alibi window": {**INT8, "alibi_slopes": SLOPES, "sliding_window": 20},
    "float16 alibi": {**SPECS["float16"], "alibi_slopes": SLOPES},
    "wide cache": {"dtype": torch.bfloat16},
    "not causal window": {"causal": False, "sliding_window": 5},
}
"""From `helpers.attention_steps.BASE`."""

BORDERS = [
    *[(1, length) for length in (15, 16, 17, 127, 128, 129, 511, 512, 513, 1024, 1025)],
    *[(47, 127), (48, 128), (49, 513), (100, 640), (200, 1030)],
]
"""(queries, length) around the borders of blocks, chunks, tiles and splits."""

IMPL = NativeAttention()


def changed(**changes: Any) -> AttentionSpec:
    return dataclasses.replace(BASE, **changes)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", CHANGES)
def test_one_step(name: str, step: str) -> None:
    spec = changed(**CHANGES[name])
    assert IMPL.supports(spec)
    check(spec, *run_step(spec, IMPL, STEPS[step]))


@pytest.mark.parametrize("head_dim", [16, 48, 64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("changes", [{}, BF16, INT8, {"num_heads": 6}], ids=str)
def test_head_sizes(head_dim: int, changes: dict[str, Any]) -> None:
    spec = changed(head_dim=head_dim, scale=head_dim**-0.5, **changes)
    for step in ("decodes", "mixed"):
        check(spec, *run_step(spec, IMPL, STEPS[step]))


@pytest.mark.parametrize("block_size", [16, 32, 48, 512])
@pytest.mark.parametrize("changes", [{}, BF16, INT8, {"sliding_window": 130}], ids=str)
def test_borders(block_size: int, changes: dict[str, Any]) -> None:
    spec = changed(block_size=block_size, **changes)
    for part in (BORDERS[:6], BORDERS[6:10], BORDERS[10:13], BORDERS[13:]):
        check(spec, *run_step(spec, IMPL, part))


@pytest.mark.parametrize("heads", [1, 3, 5, 7, 12, 71, 256])
def test_heads_that_share_a_kv_head(heads: int) -> None:
    spec = changed(num_heads=heads, num_kv_heads=1, head_dim=32)
    sloped = dataclasses.replace(spec, alibi_slopes=tuple(2 ** (-i / 8) for i in range(heads)))
    for one in (spec, sloped):
        check(one, *run_step(one, IMPL, [(1, 40), (3, 50), (30, 30)]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "name", ["gqa", "window", "bfloat16 window", "int8 window", "int8 mqa", "alibi"]
)
def test_random_programs(name: str, seed: int) -> None:
    """Sequences come, grow by chunks and tokens, and go; their blocks are used again, stale: what
    was not written is NaN."""
    spec = changed(**CHANGES[name])
    program = Program(spec, IMPL, HostDevice(), seed)
    for action in random_actions(seed, 14):
        if (step := program.act(action)) is not None:
            assert not step.touched
            check(spec, step.found, step.expected)


def test_a_prefix_that_sequences_share() -> None:
    spec = changed(block_size=32, **BF16)
    program = Program(spec, IMPL, HostDevice())
    program.extend(0, 1024)
    for sequence in range(1, 4):
        program.fork(sequence, 0)
    check(spec, *outcome(program, [(1, 7), (2, 1), (3, 40), (0, 1)]))


# ---------------------------------------------------------------------------------------------
# Bit for bit
# ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize(
    "name", ["mqa", "bfloat16", "float16", "int8 mqa", "softcap window", "alibi"]
)
@pytest.mark.parametrize(
    "work", [[(1, 1500)], [(1, 1300), (1, 20), (3, 600)], [(100, 1200), (1, 513)]], ids=str
)
def test_the_number_of_threads_changes_no_bit(name: str, work: list[tuple[int, int]]) -> None:
    spec = changed(**CHANGES[name])
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(run_step(spec, IMPL, work)[0])
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


class Layer:
    """One sequence in a cache, attended to by any of its queries."""

    def __init__(self, spec: AttentionSpec, length: int, seed: int = 0) -> None:
        self.spec, self.length = spec, length
        generator = torch.Generator().manual_seed(seed)
        blocks = -(-length // spec.block_size)
        self.kv: LayerKV = IMPL.alloc(HostDevice(), spec, blocks + 1)
        self.table = (torch.randperm(blocks, generator=generator) + 1).int()
        at = torch.arange(length)
        self.slots = self.table[at // spec.block_size].long() * spec.block_size
        self.slots += at % spec.block_size
        shape = (length, spec.num_kv_heads, spec.head_dim)
        key, value = (torch.randn(shape, generator=generator).to(spec.dtype) for _ in range(2))
        IMPL.write(key, value, self.kv, self.slots)
        shape = (length, spec.num_heads, spec.head_dim)
        self.query = torch.randn(shape, generator=generator).to(spec.dtype)

    def attend(self, begin: int, end: int) -> Tensor:
        """The queries at positions [begin, end), in a step of their own."""
        batch = AttentionBatch(
            [0, end - begin], [end], self.table.unsqueeze(0), self.slots[begin:end]
        )
        return IMPL.run(self.query[begin:end], self.kv, self.spec, IMPL.plan(self.spec, batch))


@pytest.mark.parametrize(
    "name", ["gqa", "bfloat16", "int8", "window", "mqa", "head 80", "alibi", "alibi bfloat16"]
)
def test_a_row_does_not_depend_on_the_chunk_it_is_computed_in(name: str) -> None:
    layer = Layer(changed(**CHANGES[name]), 1100)
    whole = layer.attend(0, 1100)
    tiles = "bfloat16" in name and library().isa == "amx"  # they sum pairs in an order of their own
    tolerance = 3e-2 if tiles else 0
    for begin, end in ((0, 1), (3, 5), (100, 161), (511, 513), (700, 1100), (1099, 1100)):
        found, expected = layer.attend(begin, end), whole[begin:end]
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_queries_keys_and_values_may_be_columns_of_wider_rows() -> None:
    spec = changed(block_size=32, **BF16)
    wide = torch.randn(40, 8 * 64).to(spec.dtype)
    query, key, value = wide.split([4 * 64, 2 * 64, 2 * 64], dim=1)
    slots, table = torch.arange(40) + 32, torch.tensor([[1, 2]], dtype=torch.int32)
    batch = AttentionBatch([0, 40], [40], table, slots)
    found = []
    for copy in (False, True):
        parts = [part.unflatten(1, (-1, 64)) for part in (query, key, value)]
        parts = [part.contiguous() if copy else part for part in parts]
        kv = IMPL.alloc(HostDevice(), spec, 3)
        IMPL.write(parts[1], parts[2], kv, slots)
        found.append(IMPL.run(parts[0], kv, spec, IMPL.plan(spec, batch)))
    assert torch.equal(*found)


# ---------------------------------------------------------------------------------------------
# What is no number
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, BF16, INT8], ids=str)
def test_a_nan_stays_in_its_sequence(changes: dict[str, Any]) -> None:
    spec = changed(**changes)
    program = Program(spec, IMPL, HostDevice())
    for sequence, length in enumerate((20, 30, 25)):
        program.extend(sequence, length)
    key = torch.full((1, 2, 64), float("nan"), dtype=spec.dtype)
    slot = program.tables[1][0] * spec.block_size + 3
    IMPL.write(key, key, program.kv, torch.tensor([slot]))
    found, expected = outcome(program, [(0, 1), (1, 1), (2, 1)])
    assert found[1].isnan().all()
    check(spec, found[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 0.0, 1e-30, 3e38])
def test_int8_codes_are_those_of_the_reference(value: float) -> None:
    spec = changed(**INT8)
    torch.manual_seed(0)
    key, other = torch.randn(2, 5, 2, 64).unbind()
    key[1, 0, 5], key[2] = value, value
    slots = torch.tensor([20, 33, 16, 47, 40])
    blocks = torch.tensor([1, 2])
    exported = []
    for impl in (IMPL, ReferenceAttention()):
        kv = impl.alloc(HostDevice(), spec, 3)
        impl.write(key, other, kv, slots)
        exported.append(impl.export_blocks(kv, spec, blocks))
    torch.testing.assert_close(*exported, rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------------------------------------
# Blocks
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, BF16, INT8, SPECS["float16"]], ids=str)
def test_blocks_travel_in_the_canonical_form(changes: dict[str, Any]) -> None:
    spec = changed(block_size=32, **changes)
    program = Program(spec, IMPL, HostDevice())
    program.extend(0, 64)
    blocks = torch.tensor(program.tables[0])
    canonical = IMPL.export_blocks(program.kv, spec, blocks)
    expected = torch.float32 if spec.kv_dtype == torch.int8 else spec.kv_dtype
    assert canonical.dtype == expected and canonical.shape == (2, 2, 32, 2, 64)
    torch.testing.assert_close(canonical[0].flatten(0, 1).to(spec.dtype), program.keys[0])
    torch.testing.assert_close(canonical[1].flatten(0, 1).to(spec.dtype), program.values[0])
    other = IMPL.alloc(HostDevice(), spec, 9)
    there = torch.tensor([7, 2])
    IMPL.import_blocks(other, spec, there, canonical)
    again = IMPL.export_blocks(other, spec, there)
    torch.testing.assert_close(
        again, canonical, rtol=1e-6 if spec.kv_dtype == torch.int8 else 0, atol=0
    )
    assert not IMPL.export_blocks(other, spec, torch.tensor([0, 1, 3])).any()


@pytest.mark.parametrize("changes", [{}, BF16, INT8], ids=str)
def test_block_bytes_is_what_the_region_holds(changes: dict[str, Any]) -> None:
    spec = changed(block_size=32, **changes)
    program = Program(spec, IMPL, HostDevice())
    (region,) = program.kv.regions
    vector = 64 * spec.kv_dtype.itemsize + (4 if spec.kv_dtype == torch.int8 else 0)
    assert region.bytes == region.stride == IMPL.block_bytes(spec) == 2 * 2 * 32 * vector
    assert region.tensor[0].numel() * region.tensor.element_size() == region.bytes
    program.extend(0, 70)
    table = program.tables[0]
    moved = [program.free.pop() for _ in table]
    HostDevice().move_blocks(program.kv.regions, list(zip(table, moved, strict=True)))
    region.tensor[table] = -1
    program.tables[0] = moved
    check(spec, *outcome(program, [(0, 1)]))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block_size": 24}, "block_size 24"),
        ({"head_dim": 72}, "head_dim 72"),
        ({"head_dim": 272}, "head_dim 272"),
        ({"num_heads": 5}, "5 heads over 2"),
        ({"num_heads": 600}, "share a KV head"),
        ({"kv_dtype": torch.float64}, "float64"),
    ],
    ids=str,
)
def test_what_it_refuses(changes: dict[str, Any], said: str) -> None:
    support = IMPL.supports(changed(**changes))
    assert not support and said in support.reason


def test_a_plan_is_cheap() -> None:
    """Once a step and cache group, on the host."""
    count = 256
    tables = torch.ones(count, 40, dtype=torch.int32)
    lengths = [1 + i * 4 for i in range(count)]
    batch = AttentionBatch(list(range(count + 1)), lengths, tables, torch.zeros(count))
    spent = []
    for _ in range(200):
        start = time.thread_time()
        IMPL.plan(BASE, batch)
        spent.append(time.thread_time() - start)
    assert min(spent) < 200e-6
