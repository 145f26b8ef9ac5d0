"""Random paged programs: every attention implementation against plain attention over a dict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.attention_steps import BASE, SPECS, STEPS, check, outcome, run_step, spec_of

from trimaran.conformance.paged import Program, random_actions
from trimaran.platforms import attention_plan, attention_torch
from trimaran.platforms.attention_reference import ReferenceAttention, attend, quantize_vectors
from trimaran.platforms.attention_torch import TorchPagedAttention
from trimaran.platforms.host_device import HostDevice
from trimaran.platforms.interface import AttentionBatch, AttentionImpl, AttentionSpec

IMPLEMENTATIONS: list[type[AttentionImpl]] = [TorchPagedAttention, ReferenceAttention]


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
@pytest.mark.parametrize("name", ["bfloat16", "bfloat16 window", "alibi bfloat16"])
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
@pytest.mark.parametrize(
    "name", ["gqa", "window", "softcap window", "bfloat16", "not causal", "alibi"]
)
def test_steps_cut_into_small_groups(name: str) -> None:
    spec = spec_of(name)
    for step in STEPS.values():
        check(spec, *run_step(spec, TorchPagedAttention(), step))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", ["gqa", "window odd block", "bfloat16 window", "alibi"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_random_programs(implementation: type[AttentionImpl], name: str, seed: int) -> None:
    """Sequences come, grow by chunks and tokens, and go; their blocks are used again, stale."""
    spec = spec_of(name)
    program = Program(spec, implementation(), HostDevice(), seed)
    for action in random_actions(seed, 14):
        if (step := program.act(action)) is not None:
            assert not step.touched
            check(spec, step.found, step.expected)


def test_a_sequence_does_not_depend_on_its_batch_beyond_rounding() -> None:
    """A NaN in one sequence's own tokens stays there."""
    program = Program(BASE, TorchPagedAttention(), HostDevice())
    for sequence, length in enumerate((20, 30, 25)):
        program.extend(sequence, length)
    block = program.tables[1][0]
    for region in program.kv.regions:
        region.tensor[block] = float("nan")
    found, expected = outcome(program, [(0, 1), (1, 1), (2, 1)])
    assert found[1].isnan().all()
    check(BASE, found[[0, 2]], expected[[0, 2]])


INT8 = dataclasses.replace(BASE, kv_dtype=torch.int8)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 9, "block_size": 7}], ids=str)
def test_the_reference_keeps_a_cache_in_int8(changes: dict[str, Any]) -> None:
    """Exactly the attention over what scales of max|x| / 127 make of keys and values."""
    spec = dataclasses.replace(INT8, **changes)
    program = Program(spec, ReferenceAttention(), HostDevice(), 3)
    for action in random_actions(3, 14):
        if (step := program.act(action)) is not None:
            assert not step.touched
            check(spec, step.found, step.expected)
    found, expected = run_step(spec, ReferenceAttention(), STEPS["mixed"])
    check(spec, found, expected)
    exact, _ = run_step(
        dataclasses.replace(spec, kv_dtype=torch.float32), ReferenceAttention(), STEPS["mixed"]
    )
    assert 1e-4 < (found - exact).abs().max() < 0.05


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none_in_int8(value: float) -> None:
    vectors = torch.randn(3, 2, 8)
    vectors[1, 0, 5] = value
    codes, scales = quantize_vectors(vectors)
    values = codes.float() * scales.unsqueeze(-1)
    assert values[1, 0].isnan().all() and values.isnan().sum() == 8
    zero, none = quantize_vectors(torch.zeros(2, 4))
    assert not zero.any() and not none.any()


def test_blocks_of_an_int8_cache_travel_as_fp32() -> None:
    program = Program(INT8, ReferenceAttention(), HostDevice())
    program.extend(0, 40)
    blocks = torch.tensor(program.tables[0])
    impl, kv = program.impl, program.kv
    assert len(kv.regions) == 2
    assert sum(region.bytes for region in kv.regions) == impl.block_bytes(INT8) == 2 * 2 * 16 * 68
    canonical = impl.export_blocks(kv, INT8, blocks)
    assert canonical.dtype == torch.float32 and canonical.shape == (2, 3, 16, 2, 64)
    torch.testing.assert_close(canonical[0].flatten(0, 1)[:40], program.keys[0])
    other = impl.alloc(HostDevice(), INT8, 9)
    impl.import_blocks(other, INT8, torch.tensor([7, 2, 5]), canonical.nan_to_num())
    again = impl.export_blocks(other, INT8, torch.tensor([7, 2, 5]))
    torch.testing.assert_close(again, canonical.nan_to_num(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("causal", [True, False])
def test_alibi_lowers_each_score_by_slope_times_distance(causal: bool) -> None:
    """Score by score, as Press et al. 2022 (section 3) write it; the softcap comes before."""
    slopes, cap = (0.5, 2**-4), 2.0
    spec = AttentionSpec(
        *(2, 1, 8, 0.3, torch.float32, torch.float32, 16),
        causal=causal,
        softcap=cap,
        alibi_slopes=slopes,
    )
    query, key, value = torch.randn(3, 2, 8), torch.randn(5, 1, 8), torch.randn(5, 1, 8)
    for head, slope in enumerate(slopes):
        for at in range(3):
            position = at + 2
            keys = range(position + 1 if causal else 5)
            scores = [
                cap * math.tanh(0.3 * float(query[at, head] @ key[j, 0]) / cap)
                - slope * abs(position - j)
                for j in keys
            ]
            expected = torch.tensor(scores).softmax(0) @ value[: len(keys), 0]
            torch.testing.assert_close(attend(query, key, value, spec)[at, head], expected)


def test_each_head_has_a_slope_or_none_has() -> None:
    with pytest.raises(ValueError, match="3 ALiBi slopes for 4 heads"):
        dataclasses.replace(BASE, alibi_slopes=(0.5, 0.25, 0.125))


def test_padded_torch_calls_refuse_a_quantized_cache() -> None:
    support = TorchPagedAttention().supports(INT8)
    assert not support and "no cache in 8 bits" in support.reason


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
        program = Program(BASE, implementation(), HostDevice())
        regions = program.kv.regions
        assert sum(region.bytes for region in regions) == program.impl.block_bytes(BASE)
        for region in regions:
            assert region.tensor[0].is_contiguous()
            assert region.tensor[0].numel() * region.tensor.element_size() == region.bytes
            assert region.tensor.stride(0) * region.tensor.element_size() == region.stride


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_moved_blocks_serve_as_well(implementation: type[AttentionImpl]) -> None:
    program = Program(BASE, implementation(), HostDevice())
    program.extend(0, 40)
    table = program.tables[0]
    moved = [program.free.pop() for _ in table]
    HostDevice().move_blocks(program.kv.regions, list(zip(table, moved, strict=True)))
    for region in program.kv.regions:
        region.tensor[table] = float("nan")
    program.tables[0] = moved
    check(BASE, *outcome(program, [(0, 1)]))
