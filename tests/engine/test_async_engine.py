"""`AsyncEngine` in one process around a fake executor: validation, ends, slow readers."""

import asyncio
import contextlib
import functools
import threading
import time

import pytest
from helpers.fake_executor import FakeExecutor, continuation, fake_config
from helpers.tiny_tokenizers import byte_level, save

from trimaran.core.args import EngineArgs
from trimaran.core.async_engine import AsyncEngine
from trimaran.core.engine import link
from trimaran.core.engine.inproc import InprocClient
from trimaran.core.errors import (
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    ModelLoadError,
    QueueFullError,
    StepError,
)
from trimaran.core.sampling_params import BeamSearchParams, SamplingParams
from trimaran.core.text import templates
from trimaran.core.text.render_pool import MAX_PROCESSES, RenderPool

TEMPLATE = (
    "{% if messages[0].content == 'loop' %}{% for i in range(10**5) %}{% for j in range(10**5) %}"
    "{% endfor %}{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
)
SLOW = {"max_tokens": 200, "ignore_eos": True, "output_kind": "delta", "detokenize": False}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Engines around `executor`, with limits as wanted."""
    save(byte_level(), tmp_path, eos_token="</s>", chat_template=TEMPLATE)

    def build(executor=None, chat_template=None, **scheduler):
        class Client(InprocClient):
            @classmethod
            def from_args(cls, args):
                return cls(fake_config(tmp_path, **scheduler), executor or FakeExecutor())

        monkeypatch.setattr(link, "_load", lambda place: Client)
        return AsyncEngine.from_args(EngineArgs(), in_process=True, chat_template=chat_template)

    return build


def slowed(seconds=0.005, **hooks):
    return FakeExecutor(on_submit=lambda number, plan: time.sleep(seconds), **hooks)


async def collect(stream):
    return [output async for output in stream]


def engine_stats(engine):
    return engine._link._client.engine.scheduler.stats()


async def until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def test_generates_and_counts(make):
    async with make() as engine:
        params = SamplingParams(max_tokens=6, ignore_eos=True, output_kind="delta")
        outputs = await collect(engine.generate([5, 6, 7], params))
        tokens = [token for output in outputs for token in output.outputs[0].token_ids]
        assert tokens == continuation([5, 6, 7], 6)
        assert outputs[-1].finished and engine.num_unfinished == 0
        assert engine.stats().generation_tokens == 6
        assert engine.description == {"platform": "fake"}
        assert await engine.reset_prefix_cache()
        engine.health()
        assert await engine.encode("hello") == engine.tokenizer.encode("hello")
        assert await engine.render_chat([{"role": "user", "content": "Hi"}]) == "user: Hi\n"


async def test_everything_wrong_is_said_at_once(make):
    wrong = [
        ("", {}, InvalidRequestError, "prompt is empty"),
        ([], {}, InvalidRequestError, "prompt is empty"),
        ({"prompt_token_ids": []}, {}, InvalidRequestError, "prompt is empty"),
        ({}, {}, InvalidRequestError, "a prompt is"),
        (5, {}, InvalidRequestError, "a prompt is"),
        (b"bytes", {}, InvalidRequestError, "a prompt is"),
        ([-1], {}, InvalidRequestError, r"\[0, 400\)"),
        ([400], {}, InvalidRequestError, r"\[0, 400\)"),
        ([2**40], {}, InvalidRequestError, r"\[0, 400\)"),
        ([5, "x"], {}, InvalidRequestError, r"prompt\[1\]"),
        ([5, True], {}, InvalidRequestError, r"prompt\[1\]"),
        ([5] * 256, {}, ContextLengthError, "256 tokens"),
        ([5] * 10**5, {}, ContextLengthError, "context holds 256"),
        ("hello " * 10**5, {}, ContextLengthError, "context holds 256"),
        ([5] * 250, {"max_tokens": 7}, ContextLengthError, "at most 6"),
        ([5], {"logprobs": 21}, InvalidRequestError, "at most 20"),
        ([5], {"logprobs": -1}, InvalidRequestError, "at most 20"),
        ([5], {"prompt_logprobs": 21}, InvalidRequestError, "at most 20"),
        ([5], {"stop_token_ids": [400]}, InvalidRequestError, "stop_token_ids"),
        ([5], {"allowed_token_ids": [-1]}, InvalidRequestError, "allowed_token_ids"),
        ([5], {"logit_bias": {400: 1.0}}, InvalidRequestError, "logit_bias"),
    ]
    async with make() as engine:
        for prompt, changes, error, words in wrong:
            begin = time.monotonic()
            with pytest.raises(error, match=words):
                await engine.submit(prompt, SamplingParams(**changes))
            assert time.monotonic() - begin < 10, prompt  # 0.1 s on a quiet machine
        assert engine.num_unfinished == 0
        assert len(await collect(engine.generate([5], SamplingParams(max_tokens=1)))) == 1


async def test_defaults_fill_the_context_and_draw_a_seed(make):
    async with make() as engine:
        (*_, last) = await collect(
            engine.generate([5] * 250, SamplingParams(max_tokens=None, ignore_eos=True))
        )
        assert len(last.outputs[0].token_ids) == 6
        prepare = engine._intake.prepare
        seeds = {prepare([5], SamplingParams(), "x").params.seed for _ in range(20)}
        assert len(seeds) == 20 and prepare([5], SamplingParams(seed=3), "x").params.seed == 3
        assert engine.default_sampling_params(temperature=0.5).temperature == 0.5


async def test_tenants_and_salts_are_apart(make):
    async with make() as engine:
        prepare = engine._intake.prepare
        cases = [{}, {"key_id": b"a"}, {"key_id": b"b"}, {"cache_salt": "a"}]
        roots = {prepare([5], SamplingParams(), "x", **case).cache_root for case in cases}
        assert len(roots) == 4
        assert prepare([5], SamplingParams(), "x").cache_root in roots


@pytest.mark.parametrize("how", ["cancel", "close", "break"])
@pytest.mark.parametrize("run_ahead", [0, 1])
async def test_a_reader_that_goes_frees_the_blocks(make, how, run_ahead):
    async with make(slowed(), run_ahead=run_ahead) as engine:
        if how == "cancel":
            task = asyncio.create_task(
                collect(engine.generate([5] * 9, SamplingParams(**SLOW, n=2)))
            )
            await until(lambda: engine.stats().step_id > 2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        elif how == "close":
            stream = await engine.submit([5] * 9, SamplingParams(**SLOW))
            await anext(stream)
            await stream.aclose()
            await stream.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(stream)
        else:
            async with contextlib.aclosing(engine.generate([5] * 9, SamplingParams(**SLOW))) as s:
                async for _ in s:
                    break
        assert engine.num_unfinished == 0
        await until(lambda: engine_stats(engine).num_running == 0)
        await until(lambda: engine_stats(engine).kv_used == 0)
        assert engine_stats(engine).generation_tokens < 150


async def test_an_abort_ends_the_stream_with_that_reason(make):
    async with make(slowed()) as engine:
        stream = await engine.submit([5], SamplingParams(**SLOW), request_id="mine")
        with pytest.raises(InvalidRequestError, match="mine"):
            await engine.submit([5], request_id="mine")
        await anext(stream)
        await engine.abort("mine")
        await engine.abort("unknown")
        assert (await collect(stream))[-1].outputs[0].finish_reason == "abort"


async def test_a_slow_reader_finds_one_merged_delta(make):
    async with make() as engine:
        params = SamplingParams(max_tokens=50, ignore_eos=True, output_kind="delta", n=2)
        stream = await engine.submit([5, 6], params)
        await until(lambda: engine.num_unfinished == 0)
        (output,) = await collect(stream)
        assert [len(o.token_ids) for o in output.outputs] == [50, 50]
        assert output.outputs[0].token_ids == continuation([5, 6], 50)


async def test_stop_strings_end_the_sequence_in_the_engine_too(make):
    def letters(tokens, salt):
        return [260, 281, 82, 3][len(tokens) % 4]

    async with make(FakeExecutor(next_of=letters), run_ahead=1) as engine:
        word = engine.tokenizer.decode([260, 281, 82])
        params = SamplingParams(max_tokens=200, stop=[word[1:]], output_kind="final_only")
        (output,) = await collect(engine.generate([260, 281, 82, 82], params))
        (sequence,) = output.outputs
        assert (sequence.finish_reason, sequence.stop_reason) == ("stop", word[1:])
        assert word[1:] not in sequence.text
        await until(lambda: engine_stats(engine).kv_used == 0)
        assert engine_stats(engine).generation_tokens == len(sequence.token_ids)


async def test_a_full_queue_is_told_before_the_first_token(make):
    async with make(slowed(0.05), max_num_queued_reqs=2, max_num_seqs=1) as engine:
        streams = [await engine.submit([5], SamplingParams(**SLOW)) for _ in range(3)]
        begin = time.monotonic()
        with pytest.raises(QueueFullError) as caught:
            await engine.submit([5], SamplingParams(**SLOW))
        assert caught.value.retry_after > 0 and time.monotonic() - begin < 5
        for stream in streams:
            await stream.aclose()


async def test_what_the_scheduler_refuses_is_raised_by_the_stream(make):
    async with make(max_num_queued_tokens=10) as engine:
        with pytest.raises(QueueFullError):
            await collect(engine.generate([5] * 11, SamplingParams(max_tokens=1)))
        assert engine.num_unfinished == 0


async def test_a_failed_step_is_a_finish_reason(make):
    def fail(number, plan):
        if number == 2:
            raise RuntimeError("the fuse blew")

    async with make(FakeExecutor(on_submit=fail)) as engine:
        outputs = await collect(engine.generate([5], SamplingParams(**SLOW)))
        assert outputs[-1].outputs[0].finish_reason == "error"
        assert "the fuse blew" in outputs[-1].outputs[0].stop_reason
        assert await collect(engine.generate([6], SamplingParams(max_tokens=2)))


async def test_a_failed_search_raises(make):
    def fail(number, plan):
        if number == 2:
            raise RuntimeError("the fuse blew")

    async with make(FakeExecutor(on_submit=fail)) as engine:
        params = BeamSearchParams(beam_width=2, max_tokens=8)
        with pytest.raises(StepError, match="the fuse blew"):
            await asyncio.wait_for(engine.beam_search([5], params), 10)
        assert engine.num_unfinished == 0
        assert (await asyncio.wait_for(engine.beam_search([5], params), 10)).sequences
        await until(lambda: engine_stats(engine).kv_used == 0)


async def test_an_aborted_search_raises(make):
    async with make(slowed()) as engine:
        params = BeamSearchParams(beam_width=2, max_tokens=200, ignore_eos=True)
        search = asyncio.create_task(engine.beam_search([5], params, request_id="mine"))
        await until(lambda: engine_stats(engine).num_running > 0)
        await engine.abort("mine")
        with pytest.raises(StepError, match="abort"):
            await asyncio.wait_for(search, 10)
        assert engine.num_unfinished == 0
        await until(lambda: engine_stats(engine).kv_used == 0)


async def test_a_dead_engine_is_told_to_everyone_then_restarted(make):
    def die(number, plan):
        if number == 4:
            raise EngineDeadError("rank 1 was killed by SIGKILL")

    engine = make(FakeExecutor(on_submit=die))
    async with engine:
        readers = [collect(engine.generate([5], SamplingParams(**SLOW))) for _ in range(3)]
        beams = engine.beam_search([5], BeamSearchParams(beam_width=2, max_tokens=50))
        for error in await asyncio.gather(*readers, beams, return_exceptions=True):
            assert isinstance(error, EngineDeadError) and "rank 1 was killed" in error.message
        for use in (engine.submit([5]), engine.reset_prefix_cache()):
            with pytest.raises(EngineDeadError, match="rank 1"):
                await use
        await engine.restart()
        engine.health()


async def test_closing_ends_open_streams(make):
    engine = make(slowed())
    with pytest.raises(EngineDeadError, match="not been started"):
        engine.health()
    await engine.start()
    stream = await engine.submit([5], SamplingParams(**SLOW))
    await engine.close()
    with pytest.raises(EngineDeadError, match="closed"):
        await collect(stream)
    with pytest.raises(EngineDeadError):
        await engine.submit([5])
    await engine.close()


async def test_a_tokenizer_of_another_model_fails_the_start(make, tmp_path):
    backend = byte_level()
    backend.add_tokens([f"<extra {i}>" for i in range(100)])
    engine = make()
    save(backend, tmp_path)
    with pytest.raises(ModelLoadError, match="another model"):
        await engine.start()
    await engine.close()


async def test_many_at_once_each_get_their_own(make):
    async with make(run_ahead=1) as engine:

        async def one(number):
            params = SamplingParams(max_tokens=5 + number % 7, ignore_eos=True)
            outputs = await collect(engine.generate([number % 300] * 3, params))
            expected = continuation([number % 300] * 3, 5 + number % 7)
            return outputs[-1].outputs[0].token_ids == expected

        assert all(await asyncio.gather(*map(one, range(100))))
        assert engine_stats(engine).kv_used == 0


async def test_a_models_own_template_that_loops_holds_up_nobody(make, monkeypatch):
    # As long as they last: the other request's time is measured in theirs.
    monkeypatch.setattr(templates, "RenderPool", functools.partial(RenderPool, time_limit=6))
    async with make() as engine:
        chats = [[{"role": "user", "content": "loop"}]] * MAX_PROCESSES
        looping = [asyncio.create_task(engine.render_chat(chat)) for chat in chats]
        await asyncio.sleep(0.2)
        params = SamplingParams(max_tokens=2, ignore_eos=True)
        outputs = await collect(engine.generate("hello", params))
        assert outputs[-1].finished and not any(task.done() for task in looping)
        for error in await asyncio.gather(*looping, return_exceptions=True):
            assert isinstance(error, InvalidRequestError) and "ended after 6 s" in error.message
        assert await engine.render_chat([{"role": "user", "content": "Hi"}]) == "user: Hi\n"


async def test_a_start_that_is_cancelled_leaves_no_process(make, monkeypatch):
    entered, go, processes = threading.Event(), threading.Event(), []
    load, begin = templates.ChatTemplate.from_path, RenderPool._start

    def load_late(*arguments):
        entered.set()
        go.wait(20)
        return load(*arguments)

    def record(pool):
        worker = begin(pool)
        processes.append(worker.process)
        return worker

    monkeypatch.setattr(templates.ChatTemplate, "from_path", load_late)
    monkeypatch.setattr(RenderPool, "_start", record)
    engine = make()
    starting = asyncio.create_task(engine.start())
    await until(entered.is_set)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    await engine.close()
    go.set()
    await until(lambda: engine._processor is not None)
    assert all(process.poll() is not None for process in processes)


async def test_an_operators_template_also_after_a_restart(make, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("mine: {{ messages[0].content }}")
    async with make(chat_template=str(file)) as engine:
        template = engine.chat_template
        assert await engine.render_chat([{"role": "user", "content": "Hi"}]) == "mine: Hi"
        await engine.restart()
        assert engine.chat_template is template, "and with it its processes"
        assert await engine.render_chat([{"role": "user", "content": "Hi"}]) == "mine: Hi"
    file.write_text("{% if %}")
    with pytest.raises(ModelLoadError, match="mine.jinja"):
        await make(chat_template=str(file)).start()
