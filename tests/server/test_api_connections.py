"""Connections that send slowly, and more of them than are taken."""

from __future__ import annotations

import asyncio
import contextlib
import resource

import httpx
import pytest
from conftest import eventually

from trimaran.core.args import ServerArgs
from trimaran.core.errors import ConfigError
from trimaran.server import http_protocol
from trimaran.server.http_protocol import open_files_limit, protocol_class

JSON = ["Content-Type: application/json", "Content-Length: 1000"]


def head(*lines, method="POST", path="/v1/completions"):
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


async def connect(url):
    host, port = url.removeprefix("http://").split(":")
    return await asyncio.open_connection(host, int(port))


async def read_answer(reader):
    """Status and the rest of what comes until the connection is closed; it must be, some time."""
    answer = await asyncio.wait_for(reader.read(), 15)
    return int(answer[9:12]), answer


async def trickle(writer, piece, pause=0.05):
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)


@pytest.mark.parametrize("piece", [b"", b" "])
async def test_a_slow_body_is_not_waited_for(serve, piece):
    server = serve(receive_timeout=0.3)
    async with server.listen() as url:
        reader, writer = await connect(url)
        writer.write(head(*JSON) + b'{"prompt":')
        task = asyncio.ensure_future(trickle(writer, piece))
        status, answer = await read_answer(reader)
        assert status == 408 and b"body_too_slow" in answer
        task.cancel()
        writer.close()
        await eventually(lambda: server.state.num_in_flight == 0)
        assert (await server.complete()).status_code == 200


async def test_what_has_come_of_a_body_buys_time(serve, monkeypatch):
    monkeypatch.setattr("trimaran.server.guards.body.SLOWEST_BYTES_PER_SECOND", 10)
    server = serve(receive_timeout=0.5)
    async with server.listen() as url:
        reader, writer = await connect(url)
        body = b'{"prompt": "Hi"}'
        # The first bytes are there when the body is first asked for, and buy ten seconds.
        writer.write(head(JSON[0], f"Content-Length: {110 + len(body)}") + b" " * 100)
        await asyncio.sleep(0.7)
        writer.write(b" " * 10)
        await asyncio.sleep(0.2)
        writer.write(body)
        assert (await asyncio.wait_for(reader.read(100), 15)).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_the_rest_of_a_refused_request_is_not_read_for_ever(serve, monkeypatch):
    monkeypatch.setattr(http_protocol, "LINGER_SECONDS", 0.3)
    server = serve(api_key=["one"])
    async with server.listen() as url:
        reader, writer = await connect(url)
        writer.write(head(*JSON))
        task = asyncio.ensure_future(trickle(writer, b" "))
        with contextlib.suppress(ConnectionError):  # there was more to read
            assert (await read_answer(reader))[0] == 401
        task.cancel()
        writer.close()


async def test_empty_lines_do_not_keep_a_connection(serve):
    server = serve(receive_timeout=0.3)
    async with server.listen() as url:
        reader, writer = await connect(url)
        writer.write(head(method="GET", path="/livez"))
        await asyncio.wait_for(reader.readuntil(b"}"), 5)
        task = asyncio.ensure_future(trickle(writer, b"\r\n"))
        assert (await read_answer(reader))[0] == 408
        task.cancel()
        writer.close()


async def test_connections_beyond_the_limit(serve, monkeypatch):
    monkeypatch.setattr(http_protocol, "LINGER_SECONDS", 0.3)
    server = serve(max_connections=8)
    async with server.listen() as url:
        taken = [await connect(url) for _ in range(8)]
        async with httpx.AsyncClient(base_url=url) as client:
            refused = await client.post("/v1/completions", json={"prompt": "x" * 100_000})
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            assert refused.json()["error"]["code"] == "too_many_connections"
            assert (await client.get("/health")).status_code == 200
        reader, writer = taken[0]
        writer.write(head(method="GET", path="/v1/models"))
        assert (await reader.read(100)).startswith(b"HTTP/1.1 200"), "it was there before"
        surplus = [await connect(url) for _ in range(3)]
        assert await asyncio.wait_for(surplus[2][0].read(), 5) == b"", "too many to be told"
        # A silent one is not in the way for the whole of `receive_timeout`.
        assert (await read_answer(surplus[0][0]))[0] == 408
        for _, writer in [*taken, *surplus]:
            writer.close()
        await asyncio.sleep(0.1)
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/v1/models")).status_code == 200


async def test_connections_closed_without_an_answer_are_counted_in_the_log(
    serve, caplog, monkeypatch
):
    monkeypatch.setattr(http_protocol, "TURNED_AWAY_SECONDS", 0.5)
    server = serve(max_connections=4)

    def counts():
        return [line.args[0] for line in caplog.records if "closed without" in line.msg]

    async with server.listen() as url:
        taken = [await connect(url) for _ in range(5)]
        for _ in range(2):
            del caplog.records[:]
            more = [await connect(url) for _ in range(20)]
            closed = [asyncio.wait_for(reader.read(), 15) for reader, _ in more]
            await asyncio.gather(*closed, return_exceptions=True)
            await eventually(lambda: sum(counts()) == 20)
            assert counts()[0] == 1 and len(counts()) < 10, "the rest together"
            await asyncio.sleep(1)  # and nothing more to tell
            assert sum(counts()) == 20
        for _, writer in [*taken, *more]:
            writer.close()


@pytest.mark.parametrize(
    ("soft", "hard", "room", "raised"),
    [
        (100_000, 100_000, 1_000, None),
        (1_024, resource.RLIM_INFINITY, 1_000, 1_762),
        (1_024, 1_137, 500, 1_137),
        (256, 256, 102, 256),  # less than what is kept for other files
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, 1_000, None),
    ],
)
def test_connections_for_which_there_are_files(monkeypatch, soft, hard, room, raised):
    set_limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: set_limits.append(limits))
    assert protocol_class(ServerArgs(max_connections=1_000)).max_connections == room
    assert set_limits == ([(raised, hard)] if raised else [])


@pytest.mark.parametrize("name", ["max_connections", "receive_timeout", "max_header_bytes"])
@pytest.mark.parametrize("value", [0, -1, float("nan")])
def test_limits_that_refuse_everything_are_refused(name, value):
    with pytest.raises(ConfigError, match=f"{name} is {value}"):
        ServerArgs(**{name: value})


@pytest.mark.parametrize(("asked", "level"), [({}, "DEBUG"), ({"max_connections": 500}, "WARNING")])
def test_fewer_connections_are_worth_a_warning_to_who_asked(monkeypatch, caplog, asked, level):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 256))
    caplog.set_level("DEBUG")
    assert protocol_class(ServerArgs(**asked)).max_connections == 102
    assert [one.levelname for one in caplog.records if "ulimit" in one.message] == [level]


def test_no_more_connections_than_files(caplog, request):
    files, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    request.addfinalizer(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard)))
    assert protocol_class(ServerArgs(max_connections=100)).max_connections == 100
    assert protocol_class(ServerArgs(max_connections=10**9)).max_connections < hard
    assert "ulimit -n" in caplog.text
    assert open_files_limit(1) == resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= files
