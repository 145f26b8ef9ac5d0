"""What ends a server, or starts its engine again, is told."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace

import pytest

from trimaran.server import serve as serve_module
from trimaran.server.serve import Service
from trimaran.server.supervisor import Supervisor


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr("trimaran.server.supervisor.FIRST_PAUSE", 0.0)
    monkeypatch.setattr(serve_module, "FAREWELL_SECONDS", 0.0)


@pytest.mark.parametrize("error", [OSError("no memory"), RuntimeError("odd")])
async def test_any_failed_restart_is_an_attempt(server, caplog, error):
    engine, attempts = server.engine, []

    async def restart():
        attempts.append(None)
        if len(attempts) < 3:
            raise error
        engine.dead = False

    engine.dead, engine.restart = True, restart
    task = asyncio.ensure_future(Supervisor(server.model, server.state, 3).run())
    async with asyncio.timeout(5):
        while len(attempts) < 3 or server.model.down:
            await asyncio.sleep(0.01)
    task.cancel()
    assert caplog.text.count(f"did not start again: {error}") == 2
    assert all(f"starting the engine again, {one} of 3" in caplog.text for one in (1, 2, 3))


async def test_attempts_that_fail_count_against_the_limit(server):
    async def restart():
        raise OSError("no memory")

    server.engine.dead, server.engine.restart = True, restart
    await asyncio.wait_for(Supervisor(server.model, server.state, 2).run(), 5)
    assert server.model.down


async def test_what_ends_the_server_is_logged(server, caplog):
    async def fail():
        raise OSError("cannot listen")

    service = Service.__new__(Service)
    service.args, service.state, service.stop = server.args, server.state, asyncio.Event()
    service.supervisor = SimpleNamespace(run=fail)
    http = asyncio.ensure_future(asyncio.sleep(60))
    with caplog.at_level(logging.ERROR):
        assert await service._watch(http) == 1
    http.cancel()
    assert "cannot go on" in caplog.text and "cannot listen" in caplog.text
