"""The engine's loop around a fake executor: order, errors, ends, and no busy waiting."""

import threading
import time

import pytest
from helpers.fake_executor import FakeExecutor, continuation, fake_config

from trimaran.core.admission import Quarantine
from trimaran.core.engine.inproc import InprocClient
from trimaran.core.engine.messages import (
    AbortRequests,
    AddRequests,
    EngineRequest,
    FinishSequence,
    StepMessage,
    UtilityCall,
    UtilityResult,
)
from trimaran.core.errors import EngineDeadError
from trimaran.core.plan import StepPlan
from trimaran.core.sampling_params import SamplingParams
from trimaran.core.settlement import MAX_FAILED_STEPS
from trimaran.core.types import FinishReason, Prompt

DEPTHS = pytest.mark.parametrize("run_ahead", [0, 1, 2])


def request(request_id, prompt=(5, 6, 7), max_tokens=8, **params):
    return EngineRequest(
        request_id,
        Prompt.of_tokens(list(prompt)),
        SamplingParams(max_tokens=max_tokens, seed=1, **params),
    )


class Loop:
    def __init__(self, tmp_path, executor=None, **scheduler):
        self.executor = executor or FakeExecutor()
        self.client = InprocClient(fake_config(tmp_path, **scheduler), self.executor)
        self.tokens: dict[tuple[str, int], list[int]] = {}
        self.ends: dict[tuple[str, int], tuple[str, str | None]] = {}
        self.rejected = []

    def add(self, *requests):
        self.client.send(AddRequests(list(requests)))

    def run(self, on_message=lambda message: None, limit=1000):
        """Until nothing is left to do."""
        for _ in range(limit):
            message = self.client.poll(0.0)
            if isinstance(message, StepMessage):
                self.note(message)
                on_message(message)
            if message is None and not self.client.engine.has_work:
                return self
        raise AssertionError("the engine does not come to an end")

    def note(self, message):
        self.rejected += message.rejected
        for output in message.outputs:
            key = (output.request_id, output.index)
            assert key not in self.ends, "an output after the last one"
            self.tokens.setdefault(key, []).extend(output.token_ids)
            if output.finish_reason is not None:
                self.ends[key] = (str(output.finish_reason), output.error)

    @property
    def blocks_used(self):
        return self.client.engine.scheduler.stats().kv_used


@DEPTHS
def test_tokens_do_not_depend_on_the_depth(tmp_path, run_ahead):
    loop = Loop(tmp_path, run_ahead=run_ahead)
    prompts = {str(i): [5 + i] * (3 + 17 * i) for i in range(6)}
    loop.add(*(request(name, prompt, max_tokens=12) for name, prompt in prompts.items()))
    loop.run()
    for name, prompt in prompts.items():
        assert loop.tokens[name, 0] == continuation(prompt, 12)
        assert loop.ends[name, 0] == ("length", None)
    assert loop.blocks_used == 0


@DEPTHS
def test_that_many_steps_are_in_flight(tmp_path, run_ahead):
    loop = Loop(tmp_path, run_ahead=run_ahead)
    engine = loop.client.engine
    deepest = 0

    def watch(message):
        nonlocal deepest
        deepest = max(deepest, len(engine._in_flight))

    loop.add(request("a", max_tokens=20))
    loop.run(watch)
    assert deepest == run_ahead


@DEPTHS
def test_several_children_are_forked(tmp_path, run_ahead):
    loop = Loop(tmp_path, run_ahead=run_ahead)
    loop.add(request("a", n=3, max_tokens=6))
    loop.run()
    for index in range(3):
        assert loop.tokens["a", index] == continuation([5, 6, 7], 6, salt=index)


@DEPTHS
@pytest.mark.parametrize("where", ["on_submit", "on_result"])
def test_a_step_that_raises_ends_its_batch_and_nothing_else(tmp_path, run_ahead, where):
    def fail(number, plan):
        if number == 3:
            raise RuntimeError("the fuse blew")

    loop = Loop(tmp_path, FakeExecutor(**{where: fail}), run_ahead=run_ahead)
    prompts = {"a": [5, 6, 7], "b": [8, 9]}
    loop.add(*(request(name, prompt) for name, prompt in prompts.items()))
    loop.run()
    for name, prompt in prompts.items():
        reason, error = loop.ends[name, 0]
        assert reason == "error" and "the fuse blew" in error
        expected = continuation(prompt, 8)
        assert 0 < len(loop.tokens[name, 0]) < 8
        assert loop.tokens[name, 0] == expected[: len(loop.tokens[name, 0])]
    assert loop.blocks_used == 0
    loop.add(request("c"))
    loop.run()
    assert loop.tokens["c", 0] == continuation([5, 6, 7], 8)


def test_requests_outside_the_failed_batch_go_on(tmp_path):
    def fail(number, plan):
        if number == 1:
            raise RuntimeError("the fuse blew")

    loop = Loop(tmp_path, FakeExecutor(on_result=fail), max_num_seqs=1)
    loop.add(request("a"), request("b"))
    loop.run()
    assert loop.ends["a", 0][0] == "error"
    assert loop.tokens["b", 0] == continuation([5, 6, 7], 8)


@DEPTHS
def test_a_lost_rank_ends_the_engine_with_its_own_words(tmp_path, run_ahead):
    def fail(number, plan):
        if number == 2:
            raise EngineDeadError("rank 1 was killed by SIGKILL")

    loop = Loop(tmp_path, FakeExecutor(on_result=fail), run_ahead=run_ahead)
    loop.add(request("a"))
    with pytest.raises(EngineDeadError, match="rank 1 was killed"):
        loop.run()
    for use in (lambda: loop.client.poll(0.0), lambda: loop.add(request("b"))):
        with pytest.raises(EngineDeadError, match="rank 1 was killed"):
            use()


def break_device(number, plan):
    if plan.rows:  # what only concerns the runner's tables still works
        raise RuntimeError("an illegal memory access was encountered")


@DEPTHS
@pytest.mark.parametrize("where", ["on_submit", "on_result"])
def test_a_broken_device_ends_the_engine(tmp_path, run_ahead, where):
    """Once it is not about the requests any more: every step fails, whoever is in it."""
    loop = Loop(tmp_path, FakeExecutor(**{where: break_device}), run_ahead=run_ahead)
    for i in range(MAX_FAILED_STEPS - 1):
        loop.add(request(str(i), prompt=[5, i]))
        loop.run()
        assert loop.ends[str(i), 0][0] == "error"
    loop.add(request("last"))
    with pytest.raises(EngineDeadError, match="8 steps in a row failed.* illegal memory access"):
        loop.run()


def test_a_good_step_in_between_lets_it_go_on(tmp_path):
    def fail(number, plan):
        if any(new.token_ids[1] % MAX_FAILED_STEPS for new in plan.added):
            break_device(number, plan)

    loop = Loop(tmp_path, FakeExecutor(on_result=fail))
    for i in range(3 * MAX_FAILED_STEPS):
        loop.add(request(str(i), prompt=[5, i], max_tokens=1))
        loop.run()
    assert [key for key, end in loop.ends.items() if end[0] == "length"] == [
        (str(i), 0) for i in range(0, 3 * MAX_FAILED_STEPS, MAX_FAILED_STEPS)
    ]


def test_the_same_two_prompts_never_end_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Quarantine, "check", lambda self, children: None)
    loop = Loop(tmp_path, FakeExecutor(on_result=break_device))
    for i in range(3 * MAX_FAILED_STEPS):
        loop.add(request(str(i), prompt=[5, i % 2]))
        loop.run()
    loop.add(request("another"))
    with pytest.raises(EngineDeadError, match="25 steps in a row"):
        loop.run()


def test_a_fault_of_the_scheduler_ends_the_engine_with_its_own_words(tmp_path, monkeypatch):
    loop = Loop(tmp_path)
    monkeypatch.setattr(loop.client.engine.scheduler, "schedule", lambda: 1 / 0)
    with pytest.raises(EngineDeadError, match="ZeroDivisionError: division by zero"):
        loop.run()


@DEPTHS
def test_an_interrupt_from_the_keyboard_loses_only_its_batch(tmp_path, run_ahead):
    def interrupt(number, plan):
        if number == 2:
            raise KeyboardInterrupt

    loop = Loop(tmp_path, FakeExecutor(on_submit=interrupt), run_ahead=run_ahead)
    loop.add(request("a"))
    with pytest.raises(KeyboardInterrupt):
        loop.run()
    loop.run()
    assert loop.ends["a", 0] == ("error", "KeyboardInterrupt")
    loop.add(request("b"))
    loop.run()
    assert loop.tokens["b", 0] == continuation([5, 6, 7], 8)


@DEPTHS
def test_what_comes_after_a_finish_is_discarded(tmp_path, run_ahead):
    loop = Loop(tmp_path, run_ahead=run_ahead)

    def stop_at_three(message):
        if len(loop.tokens.get(("a", 0), [])) == 3:
            loop.client.send(FinishSequence("a", 0, 3))

    loop.add(request("a", max_tokens=100))
    loop.run(stop_at_three)
    assert loop.tokens["a", 0] == continuation([5, 6, 7], 3)
    assert loop.client.engine.scheduler.stats().generation_tokens == 3
    assert loop.blocks_used == 0


@DEPTHS
@pytest.mark.parametrize("when", [0, 1, 5])
def test_an_abort_frees_everything(tmp_path, run_ahead, when):
    loop = Loop(tmp_path, run_ahead=run_ahead)
    loop.add(request("a", max_tokens=200), request("b", n=2, max_tokens=200))
    for _ in range(when):
        message = loop.client.poll(0.0)
        loop.note(message) if message is not None else None
    loop.client.send(AbortRequests(["a", "b", "unknown"]))
    loop.run()
    assert {key: end[0] for key, end in loop.ends.items()} == {
        ("a", 0): "abort",
        ("b", 0): "abort",
        ("b", 1): "abort",
    }
    assert loop.blocks_used == 0 and loop.executor.num_steps < 20


def test_refusals_come_back_as_they_were_raised(tmp_path, monkeypatch):
    loop = Loop(tmp_path, max_num_queued_reqs=1, max_num_seqs=1)
    loop.add(request("a"), request("b"), request("c"))
    loop.run()
    assert [(r.request_id, r.kind) for r in loop.rejected] == [
        ("b", "QueueFullError"),
        ("c", "QueueFullError"),
    ]
    assert loop.rejected[0].retry_after > 0
    loop.rejected.clear()
    loop.add(request("d", prompt=[5] * 300))
    loop.run()
    assert [r.kind for r in loop.rejected] == ["ContextLengthError"]
    # Even a fault in admission is that request's alone.
    loop.rejected.clear()
    monkeypatch.setattr(loop.client.engine.scheduler, "add", lambda request: {}["x"])
    loop.add(request("e"))
    loop.run()
    assert [(r.kind, r.message) for r in loop.rejected] == [("KeyError", "KeyError: 'x'")]


def test_questions_are_answered(tmp_path):
    loop = Loop(tmp_path)
    answers = []
    for call_id, method in enumerate(("ping", "stats", "reset_prefix_cache", "drop_tables")):
        loop.client.send(UtilityCall(call_id, method))
    while len(answers) < 4:
        answers.append(loop.client.poll(0.0))
    assert all(isinstance(answer, UtilityResult) for answer in answers)
    assert [answer.call_id for answer in answers] == [0, 1, 2, 3]
    assert answers[1].value["num_running"] == 0 and answers[2].value == {"done": True}
    assert "drop_tables" in answers[3].error


@DEPTHS
def test_a_ping_tells_whether_it_is_idle(tmp_path, run_ahead):
    """Not while a step is in flight, even if all its requests have ended."""
    loop = Loop(tmp_path, run_ahead=run_ahead)
    loop.add(request("a", max_tokens=50))
    answers = []
    for messages in ([], [UtilityCall(0, "ping")], [AbortRequests(["a"]), UtilityCall(0, "ping")]):
        for message in messages:
            loop.client.send(message)
        answers.append(loop.client.poll(0.0))
    while loop.client.engine.has_work or loop.client._outbox:
        answers.append(loop.client.poll(0.0))
    loop.client.send(UtilityCall(0, "ping"))
    answers.append(loop.client.poll(0.0))
    idle = [answer.value["idle"] for answer in answers if isinstance(answer, UtilityResult)]
    assert idle == [False, run_ahead == 0, True]


def test_an_idle_engine_waits_for_messages(tmp_path):
    loop = Loop(tmp_path)
    begin, cpu = time.monotonic(), time.thread_time()
    assert loop.client.poll(0.3) is None
    assert time.monotonic() - begin >= 0.25 and time.thread_time() - cpu < 0.05
    threading.Timer(0.1, loop.add, [request("a")]).start()
    begin = time.monotonic()
    assert isinstance(loop.client.poll(10.0), StepMessage)
    assert time.monotonic() - begin < 5


def test_stopping_wakes_an_idle_engine(tmp_path):
    loop = Loop(tmp_path)
    threading.Timer(0.1, loop.client.stop, ["that was all"]).start()
    begin = time.monotonic()
    loop.client.poll(10.0)
    assert time.monotonic() - begin < 5
    with pytest.raises(EngineDeadError, match="that was all"):
        loop.client.poll(10.0)
    loop.client.close()
    loop.client.close()
    assert loop.executor.closed


def test_every_message_carries_statistics(tmp_path):
    loop = Loop(tmp_path)
    seen = []
    loop.add(request("a", max_tokens=3))
    loop.run(lambda message: seen.append(message.stats))
    assert [stats.generation_tokens for stats in seen][:3] == [1, 2, 3]
    assert (seen[-1].num_running, seen[-1].generation_tokens) == (0, 3)
    assert FinishReason.LENGTH in [FinishReason(end[0]) for end in loop.ends.values()]


def test_work_that_cannot_go_on_is_looked_at_now_and_then(tmp_path, monkeypatch):
    loop = Loop(tmp_path)
    loop.add(request("a"))
    turns = 0

    def nothing():
        nonlocal turns
        turns += 1
        return StepPlan(0)

    monkeypatch.setattr(loop.client.engine.scheduler, "schedule", nothing)
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        loop.client.poll(60.0)
    assert 3 <= turns <= 60  # neither for ever, nor a busy loop
