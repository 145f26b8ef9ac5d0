"""The line of statistics: what is in it, and when there is none."""

from __future__ import annotations

import asyncio
import functools
import logging
from types import SimpleNamespace

import pytest
from conftest import eventually

from trimaran.core.engine.messages import EngineStats
from trimaran.server.serve import Service
from trimaran.server.stats_log import StatsLog


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def lines(server, caplog, monkeypatch):
    """Writes after 10 s with these statistics; returns the lines."""
    caplog.set_level(logging.INFO)
    clock = Clock()
    log = StatsLog(server.state.router, clock=clock)

    def write(**values):
        stats = EngineStats(kv_total=200, **values)
        monkeypatch.setattr(server.engine, "stats", lambda: stats)
        clock.now += 10
        caplog.clear()
        log.write()
        return caplog.messages

    return write


def test_a_line_tells_of_its_interval(lines):
    assert lines() == []
    first = {"prompt_tokens": 1_000, "generation_tokens": 50, "prefix_queries": 1_000}
    (line,) = lines(**first, prefix_hits=250, num_running=3, num_waiting=2, kv_used=50)
    assert line == (
        "org/fake: prompt 100.0 tokens/s, generation 5.0 tokens/s, running 3, waiting 2, "
        "KV cache 25.0 % used, prefix cache 25.0 % hits"
    )
    (second,) = lines(**{**first, "generation_tokens": 150}, prefix_hits=250, num_running=1)
    assert "prompt 0.0 tokens/s, generation 10.0 tokens/s, running 1" in second
    assert "prefix cache 0.0 %" in second


def test_nothing_is_said_of_nothing(lines):
    assert len(lines(generation_tokens=10)) == 1
    assert lines(generation_tokens=10) == []
    assert len(lines(generation_tokens=10, num_waiting=1)) == 1


def test_a_new_engine_counts_from_zero(lines, server):
    lines(generation_tokens=1_000)
    assert "generation 2.0 tokens/s" in lines(generation_tokens=20)[0]
    server.model.ready = False
    assert lines(generation_tokens=1_000) == []


async def test_a_line_that_fails_is_told_once_and_the_next_comes(server, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    answers = iter([RuntimeError("no stats"), RuntimeError("no stats")])

    def stats():
        for error in answers:
            raise error
        return EngineStats(num_running=1)

    monkeypatch.setattr(server.engine, "stats", stats)
    task = asyncio.ensure_future(StatsLog(server.state.router, interval=0.01).run())
    await eventually(lambda: task.done() or "running 1" in caplog.text)
    assert not task.done() and caplog.text.count("no stats") == 1
    task.cancel()


@pytest.mark.parametrize("disabled", [False, True])
async def test_the_server_writes_it_unless_told_not_to(serve, caplog, monkeypatch, disabled):
    monkeypatch.setattr(
        "trimaran.server.serve.StatsLog", functools.partial(StatsLog, interval=0.01)
    )
    caplog.set_level(logging.INFO)
    server = serve(disable_log_stats=disabled)
    server.engine.stats = lambda: EngineStats(num_running=1)
    service = Service.__new__(Service)
    service.args, service.state, service.stop = server.args, server.state, asyncio.Event()
    service.supervisor = SimpleNamespace(run=asyncio.Event().wait)
    http = asyncio.ensure_future(asyncio.sleep(60))
    asyncio.get_running_loop().call_later(0.2, service.stop.set)
    assert await service._watch(http) == 0
    http.cancel()
    assert ("running 1" in caplog.text) != disabled
