"""Clients that go away, and clients that read too slowly."""

from __future__ import annotations

import asyncio
import json
import socket

import pytest
from conftest import eventually
from fake_engine import FakeEngine


async def connect(url, body, path="/v1/completions", receive_buffer=None):
    """Sends a request over a raw socket and returns reader and writer."""
    host, port = url.removeprefix("http://").split(":")
    sock = socket.socket()
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=sock, limit=16_384)
    data = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    ]
    writer.write("\r\n".join([*lines, "", ""]).encode() + data)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["x", ["x", "y", "z"]])
@pytest.mark.parametrize("n", [1, 2])
async def test_leaving_before_the_first_token(serve, stream, prompt, n):
    engine = FakeEngine()
    engine.hold = asyncio.Event()
    server = serve(engine)
    async with server.listen() as url:
        _, writer = await connect(url, {"prompt": prompt, "stream": stream, "n": n})
        count = 1 if isinstance(prompt, str) else 3
        await eventually(lambda: len(engine.open) == count)
        writer.close()
        await eventually(lambda: engine.open == set() and server.state.num_in_flight == 0)
        assert len(engine.aborted) == count
        assert server.state.request_ids == set()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_leaving_in_mid_stream(serve, path):
    engine = FakeEngine("word " * 100_000, piece=5, pause=0.01)
    server = serve(engine)
    async with server.listen() as url:
        body = {"prompt": "x", "max_tokens": 500, "stream": True}
        if "chat" in path:
            body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        reader, writer = await connect(url, body, path)
        await reader.readuntil(b"data: ")
        assert len(engine.open) == 1
        writer.close()
        await eventually(lambda: engine.open == set() and server.state.num_in_flight == 0)
        assert len(engine.aborted) == 1


async def test_leaving_while_the_headers_wait(serve, monkeypatch):
    monkeypatch.setattr("trimaran.server.serving.streams.SETTLE_SECONDS", 30)
    engine = FakeEngine()
    engine.hold = asyncio.Event()
    server = serve(engine)
    async with server.listen() as url:
        _, writer = await connect(url, {"prompt": "x", "stream": True})
        await eventually(lambda: engine.open)
        writer.close()
        await eventually(lambda: engine.open == set() and server.state.num_in_flight == 0)


async def test_a_stream_begins_before_its_first_token(serve, monkeypatch):
    monkeypatch.setattr("trimaran.server.serving.streams.SETTLE_SECONDS", 0.05)
    engine = FakeEngine()
    engine.hold = asyncio.Event()
    server = serve(engine)
    async with server.listen() as url:
        body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
        reader, writer = await connect(url, body, "/v1/chat/completions")
        first = await asyncio.wait_for(reader.readuntil(b"\n\n"), 5)
        assert b"200 OK" in first
        assert b'"role":"assistant"' in first
        engine.hold.set()
        rest = await asyncio.wait_for(reader.readuntil(b"[DONE]"), 5)
        assert b"Hel" in rest
        writer.close()


async def test_a_slow_reader_is_cut_off(serve):
    engine = FakeEngine("word " * 2_000_000, piece=50_000, pause=0.001)
    engine.model.max_model_len = 10**8
    server = serve(engine, max_stream_buffer=100_000)
    async with server.listen() as url:
        body = {"prompt": "x", "stream": True, "max_tokens": 10_000_000}
        reader, writer = await connect(url, body, receive_buffer=4_096)
        await eventually(lambda: engine.submitted)
        fast = (await server.client.get("/livez")).status_code
        await eventually(lambda: engine.open == set(), seconds=20)
        assert fast == 200
        await eventually(lambda: server.state.num_in_flight == 0)
        assert len(engine.aborted) == 1
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            while True:  # what was on its way may still come, then the connection is gone
                await asyncio.wait_for(reader.readexactly(1024), 5)
        writer.close()
        metrics = (await server.client.get("/metrics")).text
        assert 'trimaran:slow_readers_total{engine="0",model_name="org/fake"} 1.0' in metrics


async def test_a_reader_that_takes_nothing_is_cut_off(serve, monkeypatch):
    monkeypatch.setattr("trimaran.server.sse.STALL_SECONDS", 0.4)
    engine = FakeEngine("word " * 200, piece=1, pause=0.0)
    server = serve(engine)
    sent = []

    async def send(message):
        sent.append(message)
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    cut = []
    body = json.dumps({"prompt": "x", "stream": True, "max_tokens": 400}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        return messages.pop() if messages else await asyncio.Event().wait()

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        "trimaran.cut_off": lambda: cut.append(True),
    }
    await asyncio.wait_for(server.app(scope, receive, send), 5)
    assert cut == [True] and engine.open == set()


async def test_a_quick_reader_is_not(serve):
    engine = FakeEngine("word " * 80, piece=1)
    server = serve(engine, max_stream_buffer=20_000)
    async with server.listen() as url:
        reader, writer = await connect(url, {"prompt": "x", "stream": True, "max_tokens": 400})
        text = await asyncio.wait_for(reader.read(1), 5)
        while not text.endswith(b"[DONE]\n\n\r\n0\r\n\r\n"):
            piece = await asyncio.wait_for(reader.read(4096), 5)
            assert piece, "cut off"
            text += piece
        writer.close()
    assert engine.aborted == []
