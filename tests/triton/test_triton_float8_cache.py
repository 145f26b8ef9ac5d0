"""A cache in float8 by the portable kernels, in the hull's own layout, against the reference."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from helpers.attention_steps import BASE
from helpers.engine_loop import greedy, open_loop
from helpers.generate_reference import greedy_cases
from helpers.interpreter import skip_unknown

from trimaran.conformance.lab import as_bits
from trimaran.conformance.paged import Program
from trimaran.kernels_cuda.portable.tuning import Table
from trimaran.platforms.attention_reference import ReferenceAttention
from trimaran.platforms.gpu_attention import TritonAttention
from trimaran.platforms.host_device import HostDevice

GPU = "helpers.interpreted_gpu:InterpretedGpu"
KINDS = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz]


def attention_over(kind: torch.dtype, table: Table) -> TritonAttention:
    """That of a card which converts this kind alone."""
    skip_unknown(kind)
    return TritonAttention(dataclasses.replace(table, fp8=(str(kind).removeprefix("torch."),)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_step(kind: torch.dtype, dtype: torch.dtype, table: Table) -> None:
    impl = attention_over(kind, table)
    spec = dataclasses.replace(BASE, dtype=dtype, kv_dtype=kind)
    assert impl.supports(spec)
    program = Program(spec, impl, HostDevice())
    program.extend(0, 37)
    step = program.step([(0, 1), (1, 5)])
    assert not step.touched
    most = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(step.found.float(), step.expected.float(), rtol=most, atol=most)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_its_codes_are_those_of_the_reference(kind: torch.dtype, table: Table) -> None:
    """Whatever is written: numbers beyond the range, infinities, NaN; and blocks travel."""
    spec = dataclasses.replace(BASE, kv_dtype=kind)
    key, value = torch.randn(2, 6, 2, 64).unbind()
    key[1, 0, :4] = torch.tensor([1e5, -1e5, float("inf"), float("nan")])
    value[2] *= 1e-3
    slots, blocks = torch.tensor([20, 33, 16, 47, 40, 18]), torch.tensor([1, 2])
    both = attention_over(kind, table), ReferenceAttention()
    caches = [impl.alloc(HostDevice(), spec, 4) for impl in both]
    for impl, kv in zip(both, caches, strict=True):
        impl.write(key, value, kv, slots)
        assert sum(region.bytes for region in kv.regions) == impl.block_bytes(spec)
    ours, theirs = (
        impl.export_blocks(kv, spec, blocks) for impl, kv in zip(both, caches, strict=True)
    )
    assert ours.dtype == kind and ours.shape == (2, 2, 16, 2, 64)
    assert torch.equal(as_bits(ours), as_bits(theirs))
    assert ours[0].isnan().sum() == 1
    there = torch.tensor([3, 0])
    both[0].import_blocks(caches[0], spec, there, theirs)
    assert torch.equal(as_bits(both[0].export_blocks(caches[0], spec, there)), as_bits(theirs))


def test_a_kind_that_the_card_does_not_convert_is_refused(table: Table) -> None:
    impl = TritonAttention(dataclasses.replace(table, fp8=("float8_e5m2",)))
    answer = impl.supports(dataclasses.replace(BASE, kv_dtype=torch.float8_e4m3fn))
    assert not answer and "float8_e4m3fn on generic" in answer.reason


@pytest.mark.slow
@pytest.mark.parametrize("kept", ["fp8", "fp8_e5m2"])
def test_tokens_are_those_of_the_reference_platform(kept: str) -> None:
    """Prompts in chunks beside requests that decode, and recordings that are replayed."""
    cases = greedy_cases("qwen3", 64, 24)[::16]
    found = {}
    for platform in (GPU, "strict"):
        sizes = {"max_num_batched_tokens": 24, "max_num_seqs": 8}
        with open_loop("qwen3", platform=platform, kv_cache_dtype=kept, **sizes) as loop:
            requests = [greedy(str(i), case.prompt, 8) for i, case in enumerate(cases)]
            made = loop.run(requests, arrivals=random.Random(1))
        assert not any(row.error for row in made.values())
        found[platform] = {key: row.tokens for key, row in made.items()}
    assert found[GPU] == found["strict"]
    exact = {(str(i), 0): case.tokens[:8] for i, case in enumerate(cases)}
    assert found[GPU] != exact, "the cache is in fp32"
