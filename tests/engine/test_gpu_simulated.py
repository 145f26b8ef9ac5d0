"""The engine on a simulated GPU, whose streams are late: poison where a wait is missing."""

from __future__ import annotations

import pytest
from helpers import tiny_models
from helpers.fake_tensor_gpu import FakeTensorGpu
from helpers.generate_reference import greedy_cases
from helpers.stream_simulator import DEVICE, StreamSimulator

from trimaran.core import executor as executor_module
from trimaran.core import resolve as resolve_module
from trimaran.core.args import EngineArgs
from trimaran.core.executor import UniExecutor
from trimaran.core.plan import NewRow, RowSampling, StepPlan
from trimaran.core.resolve import resolve
from trimaran.platforms.interface import Device, Telemetry
from trimaran.platforms.torch_accelerator import TorchAccelerator


class SimulatedGpu(FakeTensorGpu):
    """An H100 whose streams are threads."""

    def __init__(self, simulator: StreamSimulator) -> None:
        self.simulator = simulator

    def open(self, device: int = 0, num_threads: int | None = None) -> Device:
        return TorchAccelerator(self.simulator, device, 0, Telemetry, DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3"])
def test_queued_steps_yield_the_same_tokens(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """A prompt in two chunks and then decoding, all queued before any result is read."""
    simulator = StreamSimulator(quick=0.0, slow=0.003, default=0.003, limit=64 << 20)
    for module in (executor_module, resolve_module):
        monkeypatch.setattr(module, "make_platform", lambda name: SimulatedGpu(simulator))
    case = next(c for c in greedy_cases(family, 64, 24) if len(c.prompt) == 31)
    config = resolve(
        EngineArgs(
            model=str(tiny_models.model_path(family)),
            dtype="float32",
            max_model_len="96",
            max_num_seqs=4,
            num_gpu_blocks_override=12,
            kv_cache_memory_bytes="4M",
        )
    )
    with simulator.active(monkeypatch):
        executor = UniExecutor(config)
        new = NewRow(2, case.prompt, 31, [[5, 3]], RowSampling(temperature=0.0))
        plans = [
            StepPlan(0, added=[new], rows=[2], starts=[0], counts=[20], emits=[False]),
            StepPlan(1, rows=[2], starts=[20], counts=[11], emits=[True]),
            *(
                StepPlan(2 + i, rows=[2], starts=[31 + i], counts=[1], emits=[True])
                for i in range(23)
            ),
        ]
        outputs = [handle.result() for handle in [executor.submit(plan) for plan in plans]]
        executor.close()
    assert all(output.error is None for output in outputs)
    assert [output.tokens[0] for output in outputs] == [[], *([token] for token in case.tokens)]
