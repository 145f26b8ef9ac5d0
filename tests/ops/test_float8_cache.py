"""A cache in float8, as the reference defines it: rounded, without a scale."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers.attention_steps import BASE, STEPS, check, run_step

from trimaran.conformance.lab import as_bits
from trimaran.conformance.paged import Program, random_actions
from trimaran.platforms.attention_reference import ReferenceAttention, rounded
from trimaran.platforms.attention_torch import TorchPagedAttention
from trimaran.platforms.cpu_attention import NativeAttention
from trimaran.platforms.host_device import HostDevice
from trimaran.platforms.transfers import move_blocks

KINDS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz]
E4M3 = dataclasses.replace(BASE, kv_dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_attention_is_over_the_rounded_keys(kind: torch.dtype) -> None:
    spec = dataclasses.replace(BASE, kv_dtype=kind, sliding_window=9, block_size=7)
    program = Program(spec, ReferenceAttention(), HostDevice(), 3)
    for action in random_actions(3, 14):
        if (step := program.act(action)) is not None:
            assert not step.touched
            check(spec, step.found, step.expected)
    found, _ = run_step(spec, ReferenceAttention(), STEPS["mixed"])
    exact = dataclasses.replace(spec, kv_dtype=torch.float32)
    exact_found, _ = run_step(exact, ReferenceAttention(), STEPS["mixed"])
    assert 1e-3 < (found - exact_found).abs().max() < 0.4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_beyond_the_range_is_its_end(kind: torch.dtype, dtype: torch.dtype) -> None:
    """And what is no number stays none; of two neighbours the nearer, of equals the even one."""
    most = torch.finfo(kind).max
    given = torch.tensor([most * 4, -most * 4, math.inf, -math.inf, math.nan, 1.0, 0.0, 2.25])
    kept = rounded(given.to(dtype), kind)
    assert kept.dtype == kind
    values = kept.float().tolist()
    assert values[:4] == [most, -most, most, -most] and math.isnan(values[4])
    assert values[5:] == [1.0, 0.0, 2.0 if kind == torch.float8_e5m2 else 2.25]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_blocks_travel_as_they_are(kind: torch.dtype) -> None:
    spec, impl = dataclasses.replace(BASE, kv_dtype=kind), ReferenceAttention()
    program = Program(spec, impl, HostDevice())
    program.extend(0, 40)
    assert len(program.kv.regions) == 1
    assert program.kv.regions[0].bytes == impl.block_bytes(spec) == 2 * 2 * 16 * 64
    canonical = impl.export_blocks(program.kv, spec, torch.tensor(program.tables[0]))
    assert canonical.dtype == kind and canonical.shape == (2, 3, 16, 2, 64)
    assert torch.equal(canonical[0].flatten(0, 1)[:40].float(), program.keys[0])
    canonical[0, 0, 0, 0, 0] = math.inf if kind == torch.float8_e5m2 else math.nan
    other, places = impl.alloc(HostDevice(), spec, 9), torch.tensor([7, 2, 5])
    impl.import_blocks(other, spec, places, canonical)
    again = impl.export_blocks(other, spec, places)
    assert torch.equal(as_bits(again), as_bits(canonical))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_blocks_are_moved_on_an_accelerator(kind: torch.dtype) -> None:
    """All sources before any target: torch's own copy by index knows no float8."""
    spec, impl = dataclasses.replace(BASE, kv_dtype=kind), ReferenceAttention()
    kv = impl.alloc(HostDevice(), spec, 4)
    canonical = torch.randn(2, 4, 16, 2, 64).to(kind)
    impl.import_blocks(kv, spec, torch.arange(4), canonical)
    move_blocks(kv.regions, torch.tensor([[0, 1], [1, 3], [3, 0]]))
    found = impl.export_blocks(kv, spec, torch.arange(4))
    assert torch.equal(as_bits(found), as_bits(canonical[:, [3, 0, 2, 1]]))


def test_who_keeps_none_says_so() -> None:
    for impl in (TorchPagedAttention(), NativeAttention()):
        answer = impl.supports(E4M3)
        assert not answer and "float8_e4m3fn" in answer.reason
