"""The decoder against `transformers`: equal logits for every family, whole and token by token."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers.decoder_harness import Chunk, Harness
from helpers.tiny_models import FAMILIES, VARIANTS, model_path, prompt, reference, reference_logits
from torch import Tensor

from trimaran.core.models.decoder import Decoder, LayerRange
from trimaran.core.models.loader import fill
from trimaran.core.ops import OpBinder
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.interface import Communicator, Platform
from trimaran.platforms.strict import StrictKnobs, StrictPlatform

LENGTH = 61


def make_platform(name: str) -> Platform:
    return CpuPlatform() if name == "cpu" else StrictPlatform(StrictKnobs(delay=0.0))


@pytest.fixture
def harness() -> Iterator[Callable[..., Harness]]:
    opened: list[Harness] = []

    def open_harness(platform: str, variant: str, **options: Any) -> Harness:
        opened.append(Harness(make_platform(platform), model_path(variant), **options))
        return opened[-1]

    yield open_harness
    for one in opened:
        one.close()


def assert_same(found: Tensor, expected: Tensor) -> None:
    """Logits within 1e-4, log-probabilities within 1e-5 of the larger of 1 and their size."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        found.log_softmax(-1), expected.log_softmax(-1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("platform", ["cpu", "strict"])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_whole_prompt(platform: str, variant: str, harness: Callable[..., Harness]) -> None:
    ids = prompt(LENGTH)
    expected = reference_logits(reference(variant), ids)
    assert len(set(expected.argmax(-1).tolist())) > LENGTH // 3, "the model says too little"
    assert_same(harness(platform, variant).logits(ids), expected)


@pytest.mark.parametrize("platform", ["cpu", "strict"])
@pytest.mark.parametrize("variant", FAMILIES)
def test_token_by_token(platform: str, variant: str, harness: Callable[..., Harness]) -> None:
    ids = prompt(LENGTH, seed=1)
    one = harness(platform, variant)
    prefix = 23
    parts = [one.logits(ids[:prefix])]
    parts += [one.step([Chunk(0, at, ids[at : at + 1])]) for at in range(prefix, LENGTH)]
    assert_same(torch.cat(parts), reference_logits(reference(variant), ids))


@pytest.mark.parametrize("variant", FAMILIES)
def test_mixed_batch_keeps_sequences_apart(variant: str, harness: Callable[..., Harness]) -> None:
    """Three sequences, cut differently, a decode beside prefills in the same step."""
    prompts = [prompt(50, seed=2), prompt(31, seed=3), prompt(42, seed=4)]
    one = harness("cpu", variant, sequences=3, length=64)
    one.step([Chunk(0, 0, prompts[0][:49]), Chunk(2, 0, prompts[2][:17])])
    found = one.step(
        [Chunk(2, 17, prompts[2][17:]), Chunk(0, 49, prompts[0][49:]), Chunk(1, 0, prompts[1])]
    )
    model = reference(variant)
    expected = [reference_logits(model, ids) for ids in prompts]
    assert_same(found, torch.cat([expected[2][17:], expected[0][49:], expected[1]]))


class ThreadGroup:
    """A parallel group of threads: collectives meet at a barrier."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=30)
        self.shared: list[Any] = [None] * size

    def run(self, member: Callable[[Communicator], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size

        def work(rank: int) -> None:
            try:
                with torch.no_grad():
                    results[rank] = member(ThreadCommunicator(self, rank))
            except BaseException as error:
                results[rank] = error
                self.barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors = [r for r in results if isinstance(r, BaseException)]
        for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise error
        return results


class ThreadCommunicator(Communicator):
    def __init__(self, group: ThreadGroup, rank: int) -> None:
        self.rank, self.size = rank, group.size
        self._group = group

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self._group.shared[self.rank] = tensor.clone()
        self._group.barrier.wait()
        found = list(self._group.shared)
        self._group.barrier.wait()
        return found

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor.copy_(torch.stack(self._exchange(tensor)).sum(0))

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        return torch.cat(self._exchange(tensor), dim)

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        return tensor.copy_(self._exchange(tensor)[source])

    def barrier(self) -> None:
        self._group.barrier.wait()

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("variant", "ranks"),
    [
        ("llama3", 2),
        ("qwen3", 2),
        ("mistral", 2),
        ("llama2", 4),
        ("qwen3", 4),  # 2 kv heads on 4 ranks
        ("llama_biased", 2),  # 1 kv head on 2 ranks; biases on rows too
        ("qwen2", 2),  # a tied head, biases on columns
        ("mixtral", 2),
        ("qwen3_moe", 4),  # experts are split by their width
    ],
)
def test_split_over_ranks(variant: str, ranks: int) -> None:
    ids = prompt(LENGTH, seed=5)

    def member(comm: Communicator) -> Tensor:
        one = Harness(CpuPlatform(), model_path(variant), comm=comm)
        whole = one.logits(ids[:40])
        return torch.cat([whole, one.step([Chunk(0, 40, ids[40:])])])

    expected = reference_logits(reference(variant), ids)
    for found in ThreadGroup(ranks).run(member):
        assert_same(found, expected)


@pytest.mark.parametrize("variant", ["qwen2", "llama3", "qwen3_moe_mixed"])
def test_pipeline_stages_equal_the_whole(variant: str, harness: Callable[..., Harness]) -> None:
    """A decoder built for a range of layers needs no change of the model."""
    one = harness("cpu", variant)
    ids = prompt(30, seed=6)
    expected = one.logits(ids)
    decoder = one.decoder
    kvs = {i: layer.mixer.kv for i, layer in enumerate(decoder.layers)}
    stages = []
    for layers in (LayerRange(0, 1), LayerRange(1, 3)):
        stage = Decoder(
            decoder.spec,
            one.binder,
            one.buffers,
            decoder.layers[0].mixer.out._comm,
            dtype=torch.float32,
            layers=layers,
        )
        fill(stage, model_path(variant))
        stage.bind_kv(kvs)
        stages.append(stage)
    hidden = stages[1].forward(stages[0].forward())
    torch.testing.assert_close(stages[1].logits(hidden), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precisions_stay_near(dtype: torch.dtype, harness: Callable[..., Harness]) -> None:
    ids = prompt(LENGTH)
    found = harness("cpu", "qwen3", dtype=dtype).logits(ids)
    model = reference("qwen3")
    with torch.no_grad():
        half = type(model)(model.config).to(dtype).eval()
        half.load_state_dict(model.state_dict())
        expected = half(torch.tensor([ids]), use_cache=False).logits[0].float()
    exact = reference_logits(model, ids)
    assert found.dtype == torch.float32
    assert (found - exact).abs().mean() < 1.5 * (expected - exact).abs().mean() + 1e-3


def test_forward_comes_after_bind_kv(harness: Callable[..., Harness]) -> None:
    one = harness("cpu", "llama2")
    one.decoder.layers[1].mixer.kv = None
    with pytest.raises(AssertionError, match="bind_kv"):
        one.logits([5, 6])


def test_the_report_names_every_choice() -> None:
    one = Harness(CpuPlatform(), model_path("qwen3"))
    report = one.binder.report()
    ops = {binding.op for binding in report}
    assert {"embed", "linear", "rms_norm", "add_rms_norm", "rope", "silu_mul", "attention"} <= ops
    fused = next(binding for binding in report if binding.op == "add_rms_norm")
    assert fused.chosen == "native"
    attention = next(binding for binding in report if binding.op == "attention")
    reasons = [refusal.reason for refusal in attention.refused]
    assert reasons == ["block_size 8: it takes multiples of 16", "outranked by torch"]


def test_config_json_is_what_transformers_writes() -> None:
    config = json.loads((model_path("llama3") / "config.json").read_text())
    assert "rope_parameters" in config, "tests of the older form live in test_models_spec.py"


def test_binder_without_a_device_only_sizes() -> None:
    with pytest.raises(Exception, match="only size"):
        _ = OpBinder(CpuPlatform()).device


def test_step_views_begin_at_fixed_addresses() -> None:
    """A captured graph reads the same memory whatever the step's length."""
    buffers = Harness(CpuPlatform(), model_path("mistral")).buffers

    def addresses() -> list[int]:
        views = [buffers.token_ids, buffers.positions, *(g.slots for g in buffers.groups)]
        return [view.data_ptr() for view in views]

    whole = addresses()
    buffers.begin(5)
    assert addresses() == whole
    assert buffers.token_ids.shape == (5,) and buffers.positions.shape == (1, 5)
    assert buffers.groups[0].slots.shape == (5,) and buffers.groups[0].metadata is None
    with pytest.raises(ValueError, match="129 tokens; the buffers hold 128"):
        buffers.begin(129)
