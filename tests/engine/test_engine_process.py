"""The engine in its own process: it dies, its parent dies, it cannot load, it is stuck."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import psutil
import pytest
from helpers.dummy_model import dummy_args, make_dummy_model

from trimaran.core.async_engine import AsyncEngine
from trimaran.core.engine.messages import UtilityCall
from trimaran.core.engine.process_client import ProcessClient
from trimaran.core.engine.wire import WireError, decode, encode
from trimaran.core.errors import ConfigError, EngineDeadError, KVMemoryError, ModelLoadError
from trimaran.core.sampling_params import SamplingParams

pytestmark = pytest.mark.real

NOTICED = 2.0  # seconds in which a death has to be noticed
ENDLESS = {"max_tokens": 900, "ignore_eos": True, "output_kind": "delta", "seed": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_dummy_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def sockets(tmp_path, monkeypatch):
    """The folder in which sockets are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@contextlib.asynccontextmanager
async def running(args, **options):
    engine = AsyncEngine(args, **options)
    try:
        await engine.start()
        yield engine
    finally:
        await engine.close()


async def read(engine, prompt, params):
    """(tokens, the error that ended the stream, when)"""
    tokens = []
    try:
        async for output in engine.generate(prompt, params):
            tokens += output.outputs[0].token_ids
    except EngineDeadError as error:
        return tokens, error, time.monotonic()
    return tokens, None, time.monotonic()


def pid_of(engine):
    return engine._link._client.pid


def gone(pid, seconds):
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        deadline = time.monotonic() + seconds
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
    return True


async def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_kill_ends_every_stream_at_once_and_a_restart_serves_again(model, sockets):
    args = dummy_args(model, max_num_seqs=2, max_num_batched_tokens=16)
    async with running(args) as engine:
        greedy = SamplingParams(max_tokens=5, temperature=0.0, output_kind="delta")
        before, _, _ = await read(engine, "hello", greedy)
        streams = [
            asyncio.create_task(read(engine, [5, 6, 7], SamplingParams(**ENDLESS))),  # decodes
            asyncio.create_task(read(engine, [9] * 900, SamplingParams(max_tokens=9))),  # prefills
            asyncio.create_task(read(engine, [8, 7], SamplingParams(**ENDLESS))),  # waits
        ]
        await until(lambda: engine.stats().num_running == 2 and engine.stats().num_waiting == 1)
        assert not any(task.done() for task in streams)
        killed = time.monotonic()
        os.kill(pid_of(engine), signal.SIGKILL)
        for _, error, moment in await asyncio.wait_for(asyncio.gather(*streams), 10):
            assert "SIGKILL" in error.message and moment - killed < NOTICED
            assert error.cause == error.message
        assert engine.num_unfinished == 0
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            engine.health()
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            await engine.submit("hello")
        with pytest.raises(EngineDeadError):
            await engine.reset_prefix_cache()
        await engine.restart()
        engine.health()
        after, _, _ = await read(engine, "hello", greedy)
        assert after == before
    assert list(sockets.iterdir()) == []


async def test_the_engines_own_words_reach_every_reader(model):
    async with running(dummy_args(model)) as engine:
        stream = asyncio.create_task(read(engine, [5, 6, 7], SamplingParams(**ENDLESS)))
        await until(lambda: engine.stats().num_running == 1)
        # What no front end of ours sends: the engine cannot go on, and says why.
        engine._link._client._to_engine.send_multipart([b"?", b"?"])
        _, error, _ = await asyncio.wait_for(stream, 10)
        assert "WireError: unknown message of 2 frames" in error.message
        assert error.cause == "the engine ended with WireError"
        with pytest.raises(EngineDeadError, match="WireError"):
            engine.health()


async def test_a_stuck_engine_counts_as_dead(model):
    async with running(dummy_args(model, step_timeout=1.0)) as engine:
        pid = pid_of(engine)
        await asyncio.sleep(2.5)
        engine.health()  # idle is not stuck
        stream = asyncio.create_task(read(engine, [5, 6, 7], SamplingParams(**ENDLESS)))
        await until(lambda: engine.stats().num_running == 1)
        os.kill(pid, signal.SIGSTOP)
        _, error, _ = await asyncio.wait_for(stream, 10)
        assert "stuck" in error.message and "--step-timeout" in error.message
        assert gone(pid, 2)


async def test_a_step_may_take_its_time(model):
    """Silence up to the time-out is a long step, not the end."""
    async with running(dummy_args(model, step_timeout=30.0)) as engine:
        stream = asyncio.create_task(read(engine, [5, 6, 7], SamplingParams(**ENDLESS)))
        await until(lambda: engine.stats().num_running == 1)
        os.kill(pid_of(engine), signal.SIGSTOP)
        await asyncio.sleep(4)
        os.kill(pid_of(engine), signal.SIGCONT)
        tokens, error, _ = await asyncio.wait_for(stream, 30)
        assert error is None and len(tokens) == ENDLESS["max_tokens"]


async def test_signals_to_the_whole_group_leave_the_draining_to_the_parent(model):
    async with running(dummy_args(model)) as engine:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid_of(engine), number)
        tokens, error, _ = await read(engine, "hello", SamplingParams(max_tokens=3))
        assert error is None and len(tokens) > 0


async def test_nothing_is_left_behind(model, sockets):
    def count():
        me = psutil.Process()
        # The loop's own pool grows as it likes.
        threads = [t.name for t in threading.enumerate() if not t.name.startswith("asyncio")]
        return me.num_fds(), len(threads), len(me.children()), len(os.listdir("/dev/shm"))

    async with running(dummy_args(model)):  # what is made once only is made now
        assert list(sockets.iterdir()) == []  # not even while it runs
    before = count()
    async with running(dummy_args(model)) as engine:
        pid = pid_of(engine)
        await read(engine, "hello", SamplingParams(max_tokens=3))
    assert gone(pid, 1)
    await until(lambda: count() <= before)  # threads that were told to end may take a moment
    assert all(now <= then for now, then in zip(count(), before, strict=True))


async def test_same_tokens_in_this_process_and_in_another(model):
    params = SamplingParams(max_tokens=12, temperature=0.8, seed=7, n=2, logprobs=1)

    async def outputs(**options):
        async with running(dummy_args(model), **options) as engine:
            return [output async for output in engine.generate("hello world", params)][-1].outputs

    ours, theirs = await outputs(in_process=True), await outputs(in_process=False)
    assert [output.token_ids for output in ours] == [output.token_ids for output in theirs]
    assert [output.text for output in ours] == [output.text for output in theirs]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"model": "/no/such/model"}, ModelLoadError, "no/such/model"),
        ({"kv_cache_memory_bytes": "1", "num_gpu_blocks_override": None}, KVMemoryError, "KV"),
        ({"platform": "abacus"}, None, "abacus"),
        ({"max_model_len": "1g"}, ConfigError, "positions"),
    ],
)
async def test_what_loading_raises_keeps_its_class(model, changes, error, words, sockets):
    engine = AsyncEngine(dummy_args(model, **changes))
    with pytest.raises(error or Exception, match=words) as caught:
        await engine.start()
    assert type(caught.value).__module__ == "trimaran.core.errors"
    assert not isinstance(caught.value, EngineDeadError)
    await engine.close()
    assert list(sockets.iterdir()) == []


@pytest.mark.parametrize("at_once", [False, True])
async def test_a_start_that_is_cancelled_leaves_no_process(model, sockets, at_once):
    before = psutil.Process().children()
    engine = AsyncEngine(dummy_args(model))
    start = asyncio.create_task(engine.start())
    await asyncio.sleep(0)
    if not at_once:
        await until(lambda: engine._link._client is not None and pid_of(engine) > 0)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await engine.close()
    await until(lambda: psutil.Process().children() == before, 5)
    assert list(sockets.iterdir()) == []


PARENT = """
    import asyncio, sys, tempfile
    from trimaran.core.async_engine import AsyncEngine
    from trimaran.core.args import EngineArgs

    async def main():
        tempfile.tempdir = sys.argv[2]
        engine = AsyncEngine(EngineArgs(model=sys.argv[1], load_format="dummy", dtype="float32",
                                        max_model_len="1024", num_gpu_blocks_override=128))
        start = asyncio.create_task(engine.start())
        while engine._link._client is None or engine._link._client.pid < 0:
            await asyncio.sleep(0.001)
        if sys.argv[3] == "ready":
            await start
            async def generate():
                async for _ in engine.generate([5, 6, 7]): pass
        print(engine._link._client.pid, flush=True)
        await asyncio.sleep(3600)

    asyncio.run(main())
"""


@pytest.mark.parametrize("phase", ["loading", "ready"])
def test_the_engine_goes_with_its_parent(model, tmp_path, phase):
    command = [sys.executable, "-c", textwrap.dedent(PARENT), str(model), str(tmp_path), phase]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    assert gone(pid, 5)
    deadline = time.monotonic() + 2
    while list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []


def test_the_sockets_folder_is_private_and_short(model, tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    client = ProcessClient(dummy_args(model))
    try:
        assert client._directory.stat().st_mode & 0o777 == 0o700
        assert len(str(client._directory / "out")) < 100
        assert Path(client._directory).parent != deep
    finally:
        client.close()
    assert not client._directory.exists()


@pytest.mark.parametrize("frames", [[], [b"C"], [b"C", b"\x80"], [b"x", b"\x80"], [b"C"] * 3])
def test_only_our_messages_are_understood(frames):
    assert decode(encode(UtilityCall(3, "ping"))) == UtilityCall(3, "ping")
    with pytest.raises(WireError):
        decode(frames)


def test_a_pickle_is_no_message(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    pickled = __import__("pickle").dumps(Bomb())
    for frames in ([pickled], [b"A", pickled], [pickled, pickled]):
        with pytest.raises(WireError):
            decode(frames)
    assert not (tmp_path / "touched").exists()
