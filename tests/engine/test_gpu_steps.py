"""Steps of a GPU without one: every tensor on the right device, nothing waits for a value."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import tiny_models
from helpers.fake_tensor_gpu import FakeTensorGpu, fake_tensors
from torch._subclasses.fake_tensor import DataDependentOutputException

from trimaran.core import executor as executor_module
from trimaran.core import resolve as resolve_module
from trimaran.core.args import EngineArgs
from trimaran.core.executor import UniExecutor
from trimaran.core.plan import BlockCopy, BlockRef, NewRow, RowSampling, StepPlan
from trimaran.core.resolve import resolve
from trimaran.platforms.attention_reference import ReferenceAttention
from trimaran.platforms.attention_torch import TorchPagedAttention
from trimaran.platforms.interface import AttentionBatch, AttentionImpl, AttentionSpec

# Rows that draw at random read the sampler's decisions on the host (see platforms/draw.py).
SAMPLING = {
    "greedy": RowSampling(temperature=0.0),
    "penalties": RowSampling(temperature=0.0, repetition_penalty=1.2, frequency_penalty=0.2),
    "logprobs": RowSampling(temperature=0.0, logprobs=3, prompt_logprobs=2, logit_bias={3: 1.0}),
}


@pytest.fixture(params=["qwen3", "mistral"])
def executor(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[UniExecutor]:
    for module in (executor_module, resolve_module):
        monkeypatch.setattr(module, "make_platform", lambda name: FakeTensorGpu())
    config = resolve(
        EngineArgs(
            model=str(tiny_models.model_path(request.param)),
            dtype="float16",
            max_model_len="96",
            max_num_seqs=4,
            num_gpu_blocks_override=24,
            kv_cache_memory_bytes="4M",
            load_format="dummy",
        )
    )
    with fake_tensors(monkeypatch):
        executor = UniExecutor(config)
        yield executor
        executor.close()


@pytest.mark.parametrize("sampling", SAMPLING)
def test_a_step_stays_on_the_device(executor: UniExecutor, sampling: str) -> None:
    """A prompt in two chunks, the second beside the whole prompt of another row, then decoding."""
    groups = len(executor._rank.runner._regions)  # type: ignore[union-attr]
    first, second = (
        NewRow(row, list(range(31)), 31, [blocks] * groups, SAMPLING[sampling])
        for row, blocks in ((2, [5, 3]), (0, [7, 8]))
    )
    plans = [
        StepPlan(0, added=[first], rows=[2], starts=[0], counts=[20], emits=[False]),
        StepPlan(
            1, added=[second], rows=[2, 0], starts=[20, 0], counts=[11, 31], emits=[True, True]
        ),
        StepPlan(
            2,
            scrubs=[BlockRef(0, 9)],
            copies=[BlockCopy(0, 5, 10)],
            rows=[2, 0],
            starts=[31, 31],
            counts=[1, 1],
            emits=[True, True],
        ),
    ]
    for plan in plans:
        handle = executor.submit(plan)
        assert handle._error is None, handle._error  # type: ignore[attr-defined]
        assert handle.event._error is None  # type: ignore[attr-defined]


def test_a_tensor_on_the_wrong_device_is_noticed(executor: UniExecutor) -> None:
    embed = executor.model.embed  # type: ignore[attr-defined]
    embed.table = torch.zeros_like(embed.table, device="cpu")
    new = NewRow(2, list(range(20)), 20, [[5, 3]], SAMPLING["greedy"])
    plan = StepPlan(0, added=[new], rows=[2], starts=[0], counts=[20], emits=[True])
    assert "DeviceMismatch" in executor.submit(plan)._error  # type: ignore[attr-defined]


def test_reading_a_value_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_tensors(monkeypatch):
        device = FakeTensorGpu().open()
        tensor = device.alloc((3,), torch.int64, tag="test")
        with pytest.raises(DataDependentOutputException):
            device.launch(lambda: print(bool(tensor.sum() > 0))).wait()


@pytest.mark.parametrize("impl", [TorchPagedAttention(), ReferenceAttention()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"sliding_window": 9},
        {"softcap": 3.0},
        {"causal": False},
        {"alibi_slopes": (0.5, 0.25, 0.125, 0.0625)},
    ],
    ids=str,
)
def test_attention_stays_on_the_device(
    monkeypatch: pytest.MonkeyPatch, impl: AttentionImpl, dtype: torch.dtype, extra: dict[str, Any]
) -> None:
    spec = AttentionSpec(4, 2, 16, 0.25, dtype, dtype, 16, **extra)
    with fake_tensors(monkeypatch):
        device = FakeTensorGpu().open()
        kv = impl.alloc(device, spec, 40)
        queries, lengths = [5, 1, 70, 1], [5, 90, 70, 17]
        starts = [sum(queries[:i]) for i in range(5)]
        total, home = starts[-1], device.torch_device
        tables = device.alloc((4, 6), torch.int32, tag="test")
        slots = device.alloc((total,), torch.int64, tag="test")
        query = torch.zeros(total, 4, 16, dtype=dtype, device=home)
        key, value = torch.zeros(2, total, 2, 16, dtype=dtype, device=home)
        metadata = impl.plan(spec, AttentionBatch(starts, lengths, tables, slots))
        impl.write(key, value, kv, slots)
        found = impl.run(query, kv, spec, metadata)
        blocks = torch.zeros(3, dtype=torch.int64, device=home)
        canonical = impl.export_blocks(kv, spec, blocks)
        impl.import_blocks(kv, spec, blocks, canonical)
    assert found.device == canonical.device == home
    assert found.shape == query.shape and found.dtype == dtype
    assert canonical.shape == (2, 3, 16, 2, 16)
