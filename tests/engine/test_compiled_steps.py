"""Padded and compiled steps: the same tokens as op by op, and really taken."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from helpers.engine_loop import Loop, greedy, open_loop
from helpers.generate_reference import Case, greedy_cases
from torch import Tensor

from trimaran.core import executor as executor_module
from trimaran.core import resolve as resolve_module
from trimaran.core.errors import KVMemoryError, PlatformError
from trimaran.core.executor import UniExecutor
from trimaran.core.models.layers import GatedMLP
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.interface import (
    Capabilities,
    DeviceOutOfMemory,
    Fusion,
    OpImpl,
    OpSignature,
    Platform,
    StepFn,
    StepGraph,
    StepLimits,
    StepSizes,
    Support,
)
from trimaran.platforms.ops import OPS
from trimaran.platforms.step_graph import interpret
from trimaran.platforms.strict import StrictKnobs, StrictPlatform

NUM_TOKENS = 24
BUCKETS = (8, 32, 128)


class Compiling(StrictPlatform):
    """Compiles steps, and keeps what it was given and how many tokens each step had."""

    limits: ClassVar[StepLimits] = StepLimits(token_buckets=BUCKETS)
    sizes: ClassVar[StepSizes] = "buckets"
    graphs: ClassVar[list[StepGraph]]
    seen: ClassVar[list[StepLimits]]
    steps: ClassVar[list[int]]

    def __init__(self) -> None:
        super().__init__(StrictKnobs(limits=self.limits, compile_steps=True, step_sizes=self.sizes))

    def build_step(self, graph: StepGraph, limits: StepLimits) -> StepFn | None:
        self.graphs.append(graph)
        self.seen.append(limits)
        return self.counted(graph, super().build_step(graph, limits))

    @classmethod
    def counted(cls, graph: StepGraph, step: StepFn | None) -> StepFn | None:
        def run(metadata: Sequence[Any], num_tokens: int) -> Tensor:
            cls.steps.append(num_tokens)
            assert step is not None
            return step(metadata, num_tokens)

        return step and run


class AnySize(Compiling):
    """Compiles one step for all sizes; nothing is padded."""

    limits = StepLimits()
    sizes = "any"


class Padding(StrictPlatform):
    def __init__(self) -> None:
        super().__init__(StrictKnobs(limits=StepLimits(token_buckets=BUCKETS)))


class CpuPadding(CpuPlatform):
    def step_limits(self, plan: Any) -> StepLimits:
        return StepLimits(token_buckets=BUCKETS)


class CpuCompiling(CpuPadding):
    def capabilities(self, device: int = 0) -> Capabilities:
        return dataclasses.replace(super().capabilities(device), compiles_steps=True)

    def build_step(self, graph: StepGraph, limits: StepLimits) -> StepFn | None:
        return interpret(graph)


class CpuAnySize(CpuPlatform):
    def capabilities(self, device: int = 0) -> Capabilities:
        return dataclasses.replace(
            super().capabilities(device), compiles_steps=True, step_sizes="any"
        )

    def build_step(self, graph: StepGraph, limits: StepLimits) -> StepFn | None:
        return interpret(graph)


Use = Callable[[type[Platform]], str]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Put a platform in the place of the one of its name, which is returned."""

    def put(platform: type[Platform]) -> str:
        for module in (resolve_module, executor_module):
            monkeypatch.setattr(module, "make_platform", lambda name: platform())
        Compiling.graphs, Compiling.seen, Compiling.steps = [], [], []
        return platform.name

    return put


def cases_for(model: str, count: int = 8) -> tuple[Case, ...]:
    cases = greedy_cases(model, 64, NUM_TOKENS)
    return cases[:: len(cases) // count]


def check(loop: Loop, cases: tuple[Case, ...], **options: Any) -> dict[Any, Any]:
    found = loop.run(
        [greedy(str(i), case.prompt, NUM_TOKENS) for i, case in enumerate(cases)], **options
    )
    for index, case in enumerate(cases):
        row = found[str(index), 0]
        assert row.error is None
        assert row.tokens == case.tokens, f"prompt {index} of {len(case.prompt)} tokens"
    return found


def runner_of(loop: Loop) -> Any:
    assert isinstance(loop.executor, UniExecutor) and loop.executor._rank is not None
    return loop.executor._rank.runner


MODELS = ("llama3", "mistral", "qwen2_sliding", "qwen3")

# ---------------------------------------------------------------------------------------------
# The same tokens
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "platform"),
    [
        *itertools.product(MODELS, (Compiling, CpuCompiling)),  # which pad as well
        *itertools.product(["qwen3"], (Padding, CpuPadding)),
        *itertools.product(MODELS, (AnySize, CpuAnySize)),
    ],
)
def test_chunks_and_prefix_cache(model: str, platform: type[Platform], use: Use) -> None:
    """Everything twice, in chunks, arriving in any order; the second time from the cache. The
    budget lies between two buckets, if there are any."""
    cases = cases_for(model)
    with open_loop(
        model, platform=use(platform), max_num_batched_tokens=24, max_num_seqs=16
    ) as loop:
        padded = not issubclass(platform, AnySize | CpuAnySize)
        assert loop.config.scheduler.token_buckets == ((8, 32) if padded else ())
        check(loop, cases, arrivals=random.Random(1))
        again = check(loop, cases, arrivals=random.Random(2))
        assert any(row.num_cached for row in again.values())


@pytest.mark.parametrize(
    ("platform", "sync"),
    [
        (Padding, "on"),
        *itertools.product((Compiling, AnySize), ("on", "off")),
        *itertools.product((CpuCompiling, CpuAnySize), ("off",)),
    ],
)
def test_preemption(platform: type[Platform], sync: str, use: Use) -> None:
    cases = cases_for("qwen3", 16)
    with open_loop(
        "qwen3",
        platform=use(platform),
        async_scheduling=sync,
        max_model_len="120",
        block_size=24,
        num_gpu_blocks_override=10,
        max_num_seqs=16,
    ) as loop:
        found = check(loop, cases, arrivals=random.Random(3))
        assert sum(row.num_preemptions for row in found.values()) > 0
        assert loop.scheduler.stats().kv_used == 0


@pytest.mark.parametrize("platform", [Compiling, CpuPadding])
def test_prompts_and_decoding_in_turn(
    platform: type[Platform], use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = StepLimits(token_buckets=BUCKETS, mixed_batches=False)
    monkeypatch.setattr(platform, "step_limits", lambda self, plan: apart)
    cases = cases_for("qwen3")
    with open_loop(
        "qwen3", platform=use(platform), max_num_batched_tokens=32, max_num_seqs=16
    ) as loop:
        assert not loop.config.scheduler.mixed_batches
        check(loop, cases, arrivals=random.Random(4))


@pytest.mark.parametrize("platform", [Padding, Compiling, AnySize])
def test_log_probabilities_and_drawn_tokens(platform: type[Platform], use: Use) -> None:
    """Of prompts and of samples, against steps as large as their work."""
    prompts = [case.prompt for case in cases_for("qwen3")]
    drawn = {"temperature": 0.9, "top_p": 0.9, "seed": 5, "logprobs": 2, "prompt_logprobs": 1}
    requests = [greedy(str(i), prompt, 8, **drawn) for i, prompt in enumerate(prompts)]
    results = []
    for one in (platform, StrictPlatform):
        with open_loop(
            "qwen3", platform=use(one), max_num_batched_tokens=24, max_num_seqs=16
        ) as loop:
            results.append(loop.run(requests))
    padded, plain = results
    for key, row in plain.items():
        assert padded[key].tokens == row.tokens
        for name in ("logprobs", "prompt_logprobs"):
            pairs = zip(getattr(padded[key], name), getattr(row, name), strict=True)
            for ours, theirs in pairs:
                assert ours.token_ids == theirs.token_ids
                assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


@pytest.mark.tp2
@pytest.mark.real
def test_the_ranks_of_a_group_pad_alike(use: Use, caplog: pytest.LogCaptureFixture) -> None:
    cases = cases_for("llama3")
    with open_loop("llama3", platform=use(Compiling), tensor_parallel_size=2) as loop:
        check(loop, cases)
    assert "cannot hold a group's collectives" in caplog.text
    assert not Compiling.graphs


# ---------------------------------------------------------------------------------------------
# Padding
# ---------------------------------------------------------------------------------------------


def test_every_step_has_the_size_of_a_bucket(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    with open_loop("qwen3", platform=use(Padding)) as loop:
        runner = runner_of(loop)
        forward = runner._decoder.forward

        def counted() -> Tensor:
            sizes.append(loop.executor.model.buffers.num_tokens)  # type: ignore[attr-defined]
            return forward()

        monkeypatch.setattr(runner._decoder, "forward", counted)
        check(loop, cases_for("qwen3"), arrivals=random.Random(5))
    assert set(sizes) == set(BUCKETS)


def test_the_scratch_block_stays_finite_and_the_scratch_row_zero(use: Use) -> None:
    with open_loop(
        "mistral", platform=use(Padding), max_num_batched_tokens=24, max_num_seqs=16
    ) as loop:
        check(loop, cases_for("mistral"), arrivals=random.Random(6))
        runner = runner_of(loop)
        loop.executor.device.synchronize()  # type: ignore[attr-defined]
        for regions in runner._regions:
            for region in regions:
                assert region.tensor[0].isfinite().all() and region.tensor[0].any()
        rows = runner._rows
        assert not any(table[rows.scratch].any() for table in (rows.tokens, *rows.blocks))


# ---------------------------------------------------------------------------------------------
# Compiling
# ---------------------------------------------------------------------------------------------


def test_steps_are_compiled_once_a_bucket_and_taken(use: Use) -> None:
    name = use(Compiling)
    with open_loop("qwen3", platform=name, max_num_batched_tokens=30, max_num_seqs=16) as loop:
        assert [graph.num_tokens for graph in Compiling.graphs] == [8, 32]
        assert Compiling.seen == [StepLimits(32, (8, 32), True)] * 2
        assert Compiling.steps == []
        numbers = []
        forward = loop.executor.model.forward  # type: ignore[attr-defined]
        loop.executor.model.forward = lambda: numbers.append(1) or forward()  # type: ignore[attr-defined]
        check(loop, cases_for("qwen3"), arrivals=random.Random(7))
    assert set(Compiling.steps) == {8, 32}
    assert not numbers, "a step went op by op"


def test_a_graph_has_the_ops_of_the_model_in_order(use: Use) -> None:
    with open_loop("qwen3", platform=use(Compiling)) as loop:
        layers = loop.executor.model.spec.num_layers  # type: ignore[attr-defined]
    attention = ["linear", "rms_norm", "rms_norm", "rope", "kv_write", "attention", "linear"]
    mlp = ["add_rms_norm", "linear", "silu_mul", "linear", "add_rms_norm"]
    expected = ["embed", "rms_norm"] + (attention + mlp) * layers
    for graph in Compiling.graphs:
        parts = [part for node in graph.nodes for part in node.op.split("+")]
        assert parts == expected


@pytest.mark.parametrize("model", MODELS)
def test_a_compiled_step_is_the_forward(model: str, use: Use) -> None:
    """Both, on the same inputs, in every step of a run: the graph was traced on padding only."""
    compared: list[int] = []
    with open_loop(model, platform=use(Compiling)) as loop:
        runner = runner_of(loop)

        runner.compiled = with_forward(runner, compared)
        check(loop, cases_for(model), arrivals=random.Random(8))
    assert set(compared) == set(BUCKETS)


def with_forward(runner: Any, compared: list[int]) -> Callable[[int], StepFn | None]:
    """The runner's compiled steps, each compared with the forward; `compared`: their sizes."""
    compiled = runner.compiled

    def both(metadata: Sequence[Any], num_tokens: int) -> Tensor:
        found: Tensor = compiled(num_tokens)(metadata, num_tokens)
        assert torch.equal(found, runner._decoder.forward())
        compared.append(len(found))
        return found

    return lambda num_tokens: both


class FusedMLP(OpImpl):
    op = "linear+silu_mul"
    name = "fused"

    def supports(self, sig: OpSignature) -> Support:
        return Support.yes()

    def __call__(self, *args: Any) -> Any:
        return OPS["silu_mul"].reference(OPS["linear"].reference(*args))


class Fusing(Compiling):
    def fusions(self) -> Sequence[Fusion]:
        return (Fusion("mlp", ("linear", "silu_mul"), FusedMLP()),)


def test_a_fusion_is_one_node(use: Use) -> None:
    with open_loop("qwen3", platform=use(Fusing)) as loop:
        check(loop, cases_for("qwen3"))
        layers = loop.executor.model.spec.num_layers  # type: ignore[attr-defined]
    for graph in Compiling.graphs:
        fused = [node for node in graph.nodes if node.op == "linear+silu_mul"]
        assert len(fused) == layers and isinstance(fused[0].call, FusedMLP)
    assert Compiling.steps


def test_two_cache_groups_have_each_their_metadata(use: Use) -> None:
    from_ops = []
    with open_loop("qwen2_sliding", platform=use(Compiling)) as loop:
        groups = loop.executor.model.buffers.groups  # type: ignore[attr-defined]
        assert len(groups) == 2
        for node in Compiling.graphs[0].nodes:
            from_ops += [a.group for a in node.arguments if type(a).__name__ == "StepMetadata"]
        layers = loop.executor.model.spec.num_layers  # type: ignore[attr-defined]
        expected = [next(i for i, g in enumerate(groups) if n in g.layers) for n in range(layers)]
    assert from_ops == expected and set(expected) == {0, 1}


class Choosy(Compiling):
    """Compiles small steps only."""

    def build_step(self, graph: StepGraph, limits: StepLimits) -> StepFn | None:
        return None if graph.num_tokens > 8 else super().build_step(graph, limits)


class Broken(Compiling):
    def build_step(self, graph: StepGraph, limits: StepLimits) -> StepFn | None:
        if graph.num_tokens > 8:
            raise RuntimeError("out of registers")
        return None


def test_a_step_that_is_not_compiled_runs_op_by_op(
    use: Use, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level("INFO", "trimaran.runner"),
        open_loop("qwen3", platform=use(Choosy)) as loop,
    ):
        check(loop, cases_for("qwen3"), arrivals=random.Random(9))
    assert set(Compiling.steps) == {8}
    assert "steps of [8] tokens are compiled" in caplog.text
    assert "steps of [32, 128] tokens run op by op: the platform compiled none" in caplog.text


def test_a_platform_that_fails_to_compile_is_named(use: Use) -> None:
    with (
        pytest.raises(PlatformError, match=r"'strict' .*32 tokens: RuntimeError: out of registers"),
        open_loop("qwen3", platform=use(Broken)),
    ):
        pass


class Full(Compiling):
    def build_step(self, graph: StepGraph, limits: StepLimits) -> StepFn | None:
        raise DeviceOutOfMemory("4 GiB for the program.")


def test_no_memory_for_a_compiled_step_says_what_to_lower(use: Use) -> None:
    with (
        pytest.raises(KVMemoryError, match=r"4 GiB for the program\. Lower"),
        open_loop("qwen3", platform=use(Full)),
    ):
        pass


def test_a_model_that_cannot_be_traced_runs_op_by_op(
    use: Use, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = GatedMLP.__call__
    monkeypatch.setattr(GatedMLP, "__call__", lambda self, hidden: plain(self, hidden * 1.0))
    with open_loop("qwen3", platform=use(Compiling)) as loop:
        check(loop, cases_for("qwen3"))
    assert not Compiling.graphs
    assert "run op by op, because this model cannot be traced: aten.mul" in caplog.text


# ---------------------------------------------------------------------------------------------
# One step for all sizes
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_one_graph_is_the_forward_of_every_size(
    model: str, use: Use, caplog: pytest.LogCaptureFixture
) -> None:
    """Of whole prompts, chunks, single tokens and their mixtures."""
    compared: list[int] = []
    cases = cases_for(model, 16)
    with (
        caplog.at_level("INFO", "trimaran.runner"),
        open_loop(model, platform=use(AnySize)) as loop,
    ):
        assert loop.config.scheduler.token_buckets == ()
        most = loop.config.scheduler.max_num_batched_tokens
        assert [graph.any_size for graph in Compiling.graphs] == [True]
        assert Compiling.seen == [StepLimits(most)]
        runner = runner_of(loop)
        runner.compiled = with_forward(runner, compared)
        check(loop, cases, arrivals=random.Random(10))
        check(loop, cases[:1])  # alone: one token a step
    assert f"steps of up to {most} tokens are compiled as one" in caplog.text
    assert 1 in compared and len(set(compared)) > 12 and max(compared) > 24


def test_the_one_step_is_taken_and_nothing_goes_op_by_op(use: Use) -> None:
    with open_loop(
        "qwen3", platform=use(AnySize), max_num_batched_tokens=24, max_num_seqs=16
    ) as loop:
        assert Compiling.seen == [StepLimits(24)] and Compiling.steps == []
        forwards = []
        forward = loop.executor.model.forward  # type: ignore[attr-defined]
        loop.executor.model.forward = lambda: forwards.append(1) or forward()  # type: ignore[attr-defined]
        check(loop, cases_for("qwen3"), arrivals=random.Random(11))
    assert not forwards and set(Compiling.steps) <= set(range(1, 25)) and 24 in Compiling.steps


class PaddedAnySize(AnySize):
    limits = StepLimits(token_buckets=BUCKETS)


def test_one_step_may_serve_the_buckets(use: Use) -> None:
    with open_loop(
        "qwen3", platform=use(PaddedAnySize), max_num_batched_tokens=24, max_num_seqs=16
    ) as loop:
        assert Compiling.seen == [StepLimits(32, (8, 32))], "a step of 24 is padded to 32"
        check(loop, cases_for("qwen3"), arrivals=random.Random(12))
    assert set(Compiling.steps) == {8, 32}


class Declining(AnySize):
    def build_step(self, graph: StepGraph, limits: StepLimits) -> StepFn | None:
        return None


def test_without_the_one_step_all_run_op_by_op(
    use: Use, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "trimaran.runner"):
        with open_loop("qwen3", platform=use(Declining)) as loop:
            check(loop, cases_for("qwen3"))
        assert "steps run op by op: the platform compiled none" in caplog.text
        with open_loop(
            "qwen3", platform=use(AnySize), max_num_batched_tokens=2, max_num_seqs=2
        ) as loop:
            check(loop, cases_for("qwen3", 4))
        assert "an example has 3 tokens, a step 2 at most" in caplog.text
        plain = GatedMLP.__call__

        def twice_if_few(self: GatedMLP, hidden: Tensor) -> Tensor:
            return plain(self, hidden if len(hidden) > 2 else plain(self, hidden))

        monkeypatch.setattr(GatedMLP, "__call__", twice_if_few)
        with open_loop("qwen3", platform=use(AnySize)):
            pass
        assert "this model cannot be traced: steps of 3 and 2 tokens have" in caplog.text
    assert not Compiling.graphs


def test_a_platform_that_fails_to_compile_the_one_step_is_named(
    use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Any, graph: StepGraph, limits: StepLimits) -> StepFn | None:
        raise RuntimeError("out of registers")

    monkeypatch.setattr(AnySize, "build_step", fail)
    with (
        pytest.raises(PlatformError, match=r"'strict' .*any number of tokens: RuntimeError: out"),
        open_loop("qwen3", platform=use(AnySize)),
    ):
        pass
