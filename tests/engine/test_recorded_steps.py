"""Steps out of recordings yield the tokens of steps that run: on a device whose recordings keep
every decision that the host took (`helpers.simulated_capture`)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import tiny_models
from helpers.engine_loop import Loop, beam, greedy, open_loop
from helpers.generate_reference import Case, greedy_cases
from helpers.recording_platform import LaunchedAttention, RecordingPlatform

from trimaran.core import executor as executor_module
from trimaran.core import resolve as resolve_module
from trimaran.core.args import EngineArgs
from trimaran.core.engine.messages import EngineRequest
from trimaran.core.executor import UniExecutor
from trimaran.core.plan import NewRow, RowSampling, StepPlan
from trimaran.core.resolve import resolve
from trimaran.core.runner import recorded
from trimaran.core.sampling_params import BeamSearchParams
from trimaran.core.types import FinishReason
from trimaran.platforms.attention_reference import ReferenceAttention
from trimaran.platforms.interface import AttentionImpl, AttentionSpec, OpImpl
from trimaran.platforms.ops import reference_ops

NUM_TOKENS = 24
HERE = "helpers.recording_platform:"
PLATFORMS = {name: HERE + name for name in ("RecordingPlatform", "RecordingCompiled")}
RECORDING = PLATFORMS["RecordingPlatform"]
AT_ONCE = HERE + "RecordingAtOnce"

DRAWS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.0},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.95},
    {"temperature": 0.9, "min_p": 0.05},
    {"temperature": 1.1, "top_k": 3},
)
EXTRAS: tuple[dict[str, Any], ...] = (
    {"repetition_penalty": 0.05, "frequency_penalty": 0.3},
    {"logprobs": 2},
    {"logit_bias": {5: 50.0}, "prompt_logprobs": 1},
    {"allowed_token_ids": [7, 8, 9]},
)


def replays(loop: Loop) -> int:
    count: int = loop.executor.device.replays  # type: ignore[attr-defined]
    return count


def cases_for(model: str, count: int = 8) -> tuple[Case, ...]:
    cases = greedy_cases(model, 64, NUM_TOKENS)
    return cases[:: len(cases) // count]


def requests_for(cases: Sequence[Case]) -> list[EngineRequest]:
    return [greedy(str(i), case.prompt, NUM_TOKENS) for i, case in enumerate(cases)]


def check(loop: Loop, cases: Sequence[Case], **options: Any) -> dict[Any, Any]:
    found = loop.run(requests_for(cases), **options)
    for index, case in enumerate(cases):
        row = found[str(index), 0]
        assert row.error is None
        assert row.tokens == case.tokens, f"prompt {index} of {len(case.prompt)} tokens"
    return found


def drawn(cases: Sequence[Case]) -> list[EngineRequest]:
    return [
        greedy(str(i), case.prompt, NUM_TOKENS, seed=i + 2**40, **DRAWS[i % len(DRAWS)])
        for i, case in enumerate(cases)
    ]


def plain(model: str, requests: Sequence[EngineRequest]) -> dict[Any, Any]:
    with open_loop(model, platform="strict") as loop:
        return loop.run(requests)


def same_tokens(found: dict[Any, Any], expected: dict[Any, Any]) -> None:
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        assert found[key].tokens == row.tokens, key


@pytest.fixture
def all_recorded(caplog: pytest.LogCaptureFixture) -> Any:
    """Nothing was left out."""
    caplog.set_level("INFO", "trimaran.runner")
    yield
    said = "\n".join(record.getMessage() for record in caplog.get_records("call"))
    assert "that decode are recorded" in said
    assert "not recorded" not in said


# ---------------------------------------------------------------------------------------------
# The same tokens
# ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("all_recorded")
@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("model", ["llama3", "mistral", "qwen2_sliding", "qwen3"])
def test_batches_that_grow_and_shrink(model: str, platform: str) -> None:
    """Prompts in chunks between steps that decode; twice, the second time from the prefix cache."""
    options = {"max_num_batched_tokens": 32, "max_num_seqs": 16}
    with open_loop(model, platform=PLATFORMS[platform], **options) as loop:
        cases = cases_for(model)
        check(loop, cases, arrivals=random.Random(1))
        found = check(loop, cases)
        assert sum(row.num_cached for row in found.values()) > 0
        assert replays(loop) > NUM_TOKENS


@pytest.mark.usefixtures("all_recorded")
def test_recordings_are_of_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which none has more rows than a step may have; a step of five is padded to seven."""
    monkeypatch.setattr(recorded, "PREPARED", 0)
    shapes: list[recorded.Shape] = []
    init = recorded.Recording.__init__

    def counted(self: Any, device: Any, shape: recorded.Shape, groups: int) -> None:
        shapes.append(shape)
        init(self, device, shape, groups)

    monkeypatch.setattr(recorded.Recording, "__init__", counted)
    with open_loop("qwen3", platform=RECORDING, max_num_seqs=7) as loop:
        check(loop, cases_for("qwen3")[:5])
        check(loop, cases_for("qwen3")[:3])
        check(loop, cases_for("qwen3")[:1])
    assert [shape.size for shape in shapes] == [7, 4, 1]
    assert not any(shape.drawing for shape in shapes)


@pytest.mark.usefixtures("all_recorded")
def test_the_likeliest_are_recorded_at_start() -> None:
    """The largest first, in whose memory the others find room; what comes is replayed at once."""
    with open_loop("qwen3", platform=RECORDING, max_num_seqs=40) as loop:
        made = [(shape.size, shape.drawing) for shape in recordings(loop)]
        assert made == [(size, drawing) for size in (40, 4, 2, 1) for drawing in (True, False)]
        device: Any = loop.executor.device  # type: ignore[attr-defined]
        assert (device.captures, device.replays) == (8, 0)
        assert device.memory().by_tag["graphs"] > 0
        check(loop, cases_for("qwen3")[:2])
        same_tokens(
            loop.run(drawn(cases_for("qwen3"))[:1]), plain("qwen3", drawn(cases_for("qwen3"))[:1])
        )
        assert device.captures == 8 and device.replays >= 2 * (NUM_TOKENS - 2)


def recordings(loop: Loop) -> dict[recorded.Shape, recorded.Recording]:
    found: dict[recorded.Shape, recorded.Recording]
    found = loop.executor._rank.runner._recorded._recordings  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("platform", PLATFORMS)
def test_an_eager_engine_records_and_compiles_nothing(
    platform: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "trimaran")
    with open_loop("qwen3", platform=PLATFORMS[platform], enforce_eager=True) as loop:
        check(loop, cases_for("qwen3")[:2])
        device: Any = loop.executor.device  # type: ignore[attr-defined]
        assert (device.captures, device.replays) == (0, 0)
    assert "enforce_eager: steps run op by op" in caplog.text
    assert "compiled as one" not in caplog.text


@pytest.mark.usefixtures("all_recorded")
def test_more_rows_than_any_recording_take_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "SIZES", (1, 2, 4))
    cases = cases_for("qwen3")
    with open_loop("qwen3", platform=RECORDING) as loop:
        check(loop, cases)
        assert replays(loop) == 0
        check(loop, cases[:3])
        assert replays(loop) > 0


@pytest.mark.usefixtures("all_recorded")
def test_steps_that_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy rows among rows with seeds and filters; alone, and coming and going."""
    requests = drawn(cases_for("llama3", 16))
    expected = plain("llama3", requests)
    with open_loop("llama3", platform=RECORDING, max_num_seqs=16) as loop:
        same_tokens(loop.run(requests), expected)
        before = replays(loop)
        assert before >= NUM_TOKENS - 5
        same_tokens(loop.run(requests, arrivals=random.Random(2)), expected)
        assert replays(loop) > before
        lone = loop.run(requests[:1])
        assert lone["0", 0].tokens == expected["0", 0].tokens


@pytest.mark.usefixtures("all_recorded")
def test_children_draw_noise_of_their_own() -> None:
    requests = [
        greedy(str(i), case.prompt, NUM_TOKENS, seed=i, n=3, temperature=1.0)
        for i, case in enumerate(cases_for("qwen3", 2))
    ]
    expected = plain("qwen3", requests)
    with open_loop("qwen3", platform=RECORDING) as loop:
        same_tokens(loop.run(requests), expected)
        assert replays(loop) >= NUM_TOKENS - 5
    assert len({tuple(row.tokens) for row in expected.values()}) == 6


@pytest.mark.usefixtures("all_recorded")
def test_rows_that_want_more_join_and_leave() -> None:
    """One after the other: steps with it take the plain way, recordings serve before and after."""
    cases = cases_for("qwen3", 16)
    extras = {4 * i + 3: one for i, one in enumerate(EXTRAS)}
    requests = [
        greedy(str(i), case.prompt, 8 if i in extras else NUM_TOKENS, **extras.get(i, {}))
        for i, case in enumerate(cases)
    ]
    expected = plain("qwen3", requests)
    for i, asked in extras.items():
        assert (expected[str(i), 0].tokens == cases[i].tokens[:8]) == ("logprobs" in asked)
    with open_loop("qwen3", platform=RECORDING, max_num_seqs=4) as loop:
        found = loop.run(requests)
        assert replays(loop) > NUM_TOKENS
    same_tokens(found, expected)
    for key, row in expected.items():
        for name in ("logprobs", "prompt_logprobs"):
            ours, theirs = getattr(found[key], name), getattr(row, name)
            assert [one.token_ids for one in ours] == [one.token_ids for one in theirs]


@pytest.mark.usefixtures("all_recorded")
def test_a_row_may_be_taken_in_a_step_in_which_all_decode() -> None:
    """Others decode when a prompt comes whose tokens but the last are in the cache."""
    prompts = [case.prompt[:25] for case in greedy_cases("qwen3", 64, 24) if len(case.prompt) > 25]
    requests = [greedy(str(i), prompts[i % 3], NUM_TOKENS) for i in range(4)]
    expected = plain("qwen3", requests)
    with open_loop("qwen3", platform=RECORDING) as loop:
        loop.run(requests[:1])
        for request in requests[1:]:
            loop.scheduler.add(request)
            for _ in range(6):
                loop.step()
        while loop.busy:
            loop.step()
        assert loop.found["3", 0].num_cached == 24
        assert replays(loop) > NUM_TOKENS
    for key, row in loop.found.items():
        assert row.tokens == expected[key].tokens


def test_rows_of_a_beam_search_take_the_plain_way() -> None:
    """By hand: in the engine they change rows with each step."""
    args = EngineArgs(
        model=str(tiny_models.model_path("qwen3")),
        platform=RECORDING,
        dtype="float32",
        max_model_len="96",
        max_num_seqs=4,
        num_gpu_blocks_override=12,
    )
    executor = UniExecutor(resolve(args))
    new = NewRow(1, list(range(5, 15)), 10, [[3, 4]], RowSampling(beam_width=2, logprobs=4))
    plans = [StepPlan(0, added=[new], rows=[1], starts=[0], counts=[10], emits=[True])]
    plans += [StepPlan(i, rows=[1], starts=[9 + i], counts=[1], emits=[True]) for i in range(1, 5)]
    outputs = [executor.submit(plan).result() for plan in plans]
    assert all(output.logprobs[0] and output.tokens == [[]] for output in outputs)
    executor.close()


def test_a_beam_search_beside_others() -> None:
    cases = cases_for("qwen3")
    searched = beam("beam", cases[0].prompt, BeamSearchParams(beam_width=2, max_tokens=6))
    with open_loop("qwen3", platform="strict") as loop:
        loop.run([searched])
        expected = loop.beams["beam"].token_ids
    with open_loop("qwen3", platform=RECORDING) as loop:
        check(loop, cases[:3])
        loop.scheduler.add(searched)
        check(loop, cases[:3])
        found = loop.beams["beam"]
        assert found.token_ids == expected
        assert replays(loop) > NUM_TOKENS


@pytest.mark.usefixtures("all_recorded")
def test_depth_does_not_matter() -> None:
    requests = drawn(cases_for("qwen3"))
    results = []
    for platform in (RECORDING, AT_ONCE):
        with open_loop("qwen3", platform=platform, max_num_seqs=6) as loop:
            assert loop.config.scheduler.run_ahead == (platform == RECORDING)
            results.append(loop.run(requests))
            assert replays(loop) > NUM_TOKENS
    same_tokens(*results)


@pytest.mark.usefixtures("all_recorded")
@pytest.mark.parametrize("model", ["mistral", "qwen3"])
def test_longer_sequences_get_wider_recordings(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings for 16 tokens, 32, 64, 128: each is made where it is needed, and right."""
    monkeypatch.setattr(recorded, "FIRST_REACH", 16)
    cases = sorted(greedy_cases(model, 64, NUM_TOKENS), key=lambda case: len(case.prompt))
    with open_loop(model, platform=RECORDING, enable_prefix_caching=False) as loop:
        for case in (cases[0], cases[20], cases[40], cases[-1], cases[0]):
            check(loop, [case])
        assert [(shape.size, shape.reach, shape.drawing) for shape in recordings(loop)] == [
            (64, 128, True),  # the largest first, here too
            (64, 128, False),
            (1, 128, False),
        ]


@pytest.mark.usefixtures("all_recorded")
def test_preempted_requests_lose_nothing() -> None:
    cases = greedy_cases("qwen3", 16, NUM_TOKENS)
    tight = {"max_model_len": "120", "num_gpu_blocks_override": 9}
    with open_loop("qwen3", max_num_seqs=16, platform=RECORDING, **tight) as loop:
        found = check(loop, cases)
        assert sum(row.num_preemptions for row in found.values()) > 0
        assert replays(loop) > NUM_TOKENS


@pytest.mark.usefixtures("all_recorded")
def test_requests_that_stop_or_are_aborted_leave_the_others_alone() -> None:
    """In flight: the step behind still computes their rows, and the rows are given on."""
    cases = cases_for("qwen3", 16)
    requests = requests_for(cases)
    for i in (1, 5, 9):
        stop = cases[i].tokens[i]
        requests[i] = greedy(str(i), cases[i].prompt, NUM_TOKENS, stop_token_ids=[stop])
    with open_loop("qwen3", platform=RECORDING, max_num_seqs=6) as loop:
        for request in requests:
            loop.scheduler.add(request)
        for step in range(2_000):
            if step == 12:
                loop.scheduler.abort("2")
            loop.step()
            if not loop.busy:
                break
        assert not loop.busy and replays(loop) > NUM_TOKENS
        found = loop.found
    for i, case in enumerate(cases):
        tokens = found[str(i), 0].tokens if (str(i), 0) in found else []
        if i in (1, 5, 9):
            assert tokens == case.tokens[: case.tokens.index(case.tokens[i]) + 1]
        elif i == 2:
            assert tokens == case.tokens[: len(tokens)] and len(tokens) < NUM_TOKENS
        else:
            assert tokens == case.tokens


@pytest.mark.usefixtures("all_recorded")
def test_a_row_with_nan_ends_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it decodes: the embedding of a token that it yields becomes NaN."""
    cases = cases_for("qwen3")
    bad = cases[0].tokens[6]
    others = [case for case in cases[1:] if bad not in [*case.prompt, *case.tokens]]
    assert bad not in cases[0].prompt and bad not in cases[0].tokens[:6] and len(others) >= 3
    with open_loop("qwen3", platform=RECORDING) as loop:
        check(loop, others)
        before = replays(loop)
        embed = loop.executor.model.embed  # type: ignore[attr-defined]
        embed.table[bad] = torch.nan
        found = loop.run(requests_for([*others, cases[0]]))
        assert replays(loop) > before + 10
    for i, case in enumerate(others):
        assert found[str(i), 0].tokens == case.tokens
    failed = found[str(len(others)), 0]
    assert failed.finish_reason is FinishReason.ERROR
    assert failed.tokens == cases[0].tokens[:7]


@pytest.mark.usefixtures("all_recorded")
def test_padding_leaves_no_trace() -> None:
    with open_loop("qwen3", platform=RECORDING, max_num_seqs=16) as loop:
        loop.run(drawn(cases_for("qwen3")[:5]))
        assert replays(loop) > 0
        loop.executor.device.synchronize()  # type: ignore[attr-defined]
        rows = loop.executor._rank.runner._rows  # type: ignore[attr-defined]
        assert not any(table[rows.scratch].any() for table in (rows.tokens, *rows.blocks))


# ---------------------------------------------------------------------------------------------
# What is not recorded, and why
# ---------------------------------------------------------------------------------------------


class PlansOnHost(RecordingPlatform):
    def attention(self, spec: AttentionSpec) -> Sequence[AttentionImpl]:
        return (ReferenceAttention(),)


class PlansBadly(RecordingPlatform):
    """Attention that cannot plan on the device for more than `MOST` sequences."""

    MOST = 0

    def attention(self, spec: AttentionSpec) -> Sequence[AttentionImpl]:
        most = self.MOST

        class Failing(LaunchedAttention):
            def plan_recorded(self, spec: Any, block_tables: Any, seq_lens: Any) -> Any:
                if len(seq_lens) > most:
                    raise ValueError("no such plan")
                return super().plan_recorded(spec, block_tables, seq_lens)

        return (Failing(),)


class PlansOne(PlansBadly):
    MOST = 1


class PlansNarrow(RecordingPlatform):
    """Whose attention cannot plan on the device for more than two blocks a sequence."""

    def attention(self, spec: AttentionSpec) -> Sequence[AttentionImpl]:
        class Failing(LaunchedAttention):
            def plan_recorded(self, spec: Any, block_tables: Any, seq_lens: Any) -> Any:
                if block_tables.shape[1] > 2:
                    raise ValueError("too wide")
                return super().plan_recorded(spec, block_tables, seq_lens)

        return (Failing(),)


class DrawsOnHost(RecordingPlatform):
    def ops(self) -> dict[str, Sequence[OpImpl]]:
        return {**reference_ops()}


class Untold(DrawsOnHost):
    """An op says that it can be recorded, and reads a value on the host."""

    def ops(self) -> dict[str, Sequence[OpImpl]]:
        ops = dict(super().ops())
        (sample,) = reference_ops()["sample"]

        class Reading(type(sample)):  # type: ignore[misc]
            def __init__(self) -> None:
                self.op, self.priority = "sample", 1

            def __call__(self, *args: Any) -> Any:
                return torch.tensor([int(row.argmax()) for row in args[0]])

        ops["sample"] = [Reading()]
        return ops


Use = Any


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Put a platform in the place of `strict`."""

    def put(platform: type[RecordingPlatform]) -> str:
        for module in (resolve_module, executor_module):
            monkeypatch.setattr(module, "make_platform", lambda name: platform())
        return "strict"

    return put


def test_attention_that_plans_on_the_host_is_named(
    use: Use, caplog: pytest.LogCaptureFixture
) -> None:
    with open_loop("qwen3", platform=use(PlansOnHost)) as loop:
        check(loop, cases_for("qwen3")[:2])
        assert replays(loop) == 0
    assert "not recorded: the attention 'reference' is planned on the host" in caplog.text


@pytest.mark.parametrize("platform", [PlansBadly, PlansOne])
def test_attention_that_fails_to_plan_does_not_end_the_start(
    use: Use, caplog: pytest.LogCaptureFixture, platform: type[RecordingPlatform]
) -> None:
    """When it is asked whether it can; when the first steps are prepared."""
    with open_loop("qwen3", platform=use(platform)) as loop:
        check(loop, cases_for("qwen3")[:2])
        assert replays(loop) == 0
    reason = "ValueError: no such plan"
    if platform is PlansBadly:
        reason = f"the attention 'launched' fails to plan on the device: {reason}"
    assert f"steps are not recorded: {reason}" in caplog.text


def test_wider_steps_that_fail_take_the_plain_way(
    use: Use, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "FIRST_REACH", 32)
    cases = sorted(greedy_cases("qwen3", 64, NUM_TOKENS), key=lambda case: len(case.prompt))
    with open_loop("qwen3", platform=use(PlansNarrow)) as loop:
        check(loop, cases[-1:])
        assert replays(loop) == 0
        check(loop, cases[:1])
    assert caplog.text.count("no more steps are recorded: ValueError: too wide") == 1


def test_drawing_on_the_host_leaves_greedy_steps_recorded(
    use: Use, caplog: pytest.LogCaptureFixture
) -> None:
    requests = drawn(cases_for("qwen3"))
    with open_loop("qwen3", platform=use(DrawsOnHost)) as loop:
        found = loop.run(requests)
        assert replays(loop) == 0
        check(loop, cases_for("qwen3")[:2])
        assert replays(loop) > 0
    assert "steps that draw at random are not recorded" in caplog.text
    assert "CaptureError" not in caplog.text
    same_tokens(found, plain("qwen3", requests))


def test_experts_on_the_host_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with open_loop("qwen3_moe", platform=RECORDING) as loop:
        check(loop, cases_for("qwen3_moe")[:2])
        assert replays(loop) == 0
    assert "not recorded: moe reads values on the host" in caplog.text


def test_what_cannot_be_recorded_runs_and_is_told_once(
    use: Use, caplog: pytest.LogCaptureFixture
) -> None:
    with open_loop("qwen3", platform=use(Untold)) as loop:
        check(loop, cases_for("qwen3")[:2])
        assert replays(loop) == 0
    assert caplog.text.count("steps of 2 rows are not recorded: CaptureError") == 1


@pytest.mark.tp2
@pytest.mark.real
def test_a_group_of_ranks_does_not_record(use: Use, caplog: pytest.LogCaptureFixture) -> None:
    cases = cases_for("llama3")
    with open_loop("llama3", platform=use(RecordingPlatform), tensor_parallel_size=2) as loop:
        check(loop, cases)
    assert "not recorded: a recording cannot hold a group's collectives" in caplog.text
