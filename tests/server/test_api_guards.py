"""Keys, hosts, headers, bodies: what a request passes before it reaches a handler."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from fake_engine import FakeEngine

from trimaran.server.app import Routes
from trimaran.server.guards.auth import KeyRing

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")
PUBLIC = {"/livez", "/readyz", "/health", "/ping", "/metrics"}


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def paths(server):
    served = {route.path: None for route in Routes(server.state).routes}
    return [path.replace("{model_id:path}", "org/fake") for path in served]


async def test_every_route_and_method_needs_a_key(serve):
    server = serve(api_key=["one", "two"])
    assert len(paths(server)) == 14
    extra = ["/", "/docs", "/openapi.json", "//v1/models", "/v1/models/../livez", "/health/", "/x"]
    for path in paths(server) + extra:
        for method in METHODS:
            response = await server.client.request(method, path)
            public = path in PUBLIC and method in ("GET", "HEAD")
            expected = {200} if public else {401}
            assert response.status_code in expected, (method, path, response.status_code)
            if not public:
                assert response.headers["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    assert response.json()["error"]["code"] == "invalid_api_key"


async def test_keys(serve):
    server = serve(api_key=["one", "zwö"])
    for key in ("one", "zwö"):
        headers = {"authorization": f"Bearer {key}".encode()}
        assert (await server.client.get("/v1/models", headers=headers)).status_code == 200
    bad = [b"", b"Bearer", b"Bearer ", b"Bearer on", b"Bearer one two", b"Basic one", b"one"]
    bad += [b"Bearer \xff\xfe", b"Bearer " + b"x" * 10**6, b"Bearer one\x00", b"bearerone"]
    for value in bad:
        response = await server.client.get("/v1/models", headers={"authorization": value})
        assert response.status_code == 401, value[:30]
    doubled = [("authorization", "Bearer one"), ("authorization", "Bearer one")]
    assert (await server.client.get("/v1/models", headers=doubled)).status_code == 401


async def test_space_around_a_key_is_no_part_of_it(serve):
    server = serve(api_key=[" one\n", "two"])
    for key in ("one", " one", "two ", "\ttwo"):
        assert (await server.client.get("/v1/models", headers=bearer(key))).status_code == 200


async def test_tenants_are_apart(serve):
    server = serve(api_key=["one", "two"])
    for key in ("one", "two", "one"):
        await server.client.post("/v1/completions", json={"prompt": "x"}, headers=bearer(key))
    first, second, third = [request.key_id for request in server.engine.submitted]
    assert first == third != second and len(first) == 32
    await (open_server := serve()).complete()
    assert open_server.engine.submitted[0].key_id == b""


def test_keys_are_held_hashed():
    ring = KeyRing(["secret"])
    assert "secret" not in repr(vars(ring))


async def test_metrics_are_public_on_loopback_only(serve):
    server = serve(api_key=["one"], host="0.0.0.0")
    assert (await server.client.get("/metrics")).status_code == 401
    assert (await server.client.get("/metrics", headers=bearer("one"))).status_code == 200
    assert (await server.client.get("/health")).status_code == 200


async def test_probes_under_a_root_path(serve):
    """The HTTP server puts the root path in front of the path that was sent."""
    server = serve(api_key=["one"], root_path="/api")
    async with server.listen() as url, httpx.AsyncClient(base_url=url) as client:
        for path in sorted(PUBLIC):
            assert (await client.get(path)).status_code == 200, path
        for path in ("/v1/models", "/api/health", "/x/health", "/health/", "/%2fhealth"):
            assert (await client.get(path)).status_code == 401, path
        assert (await client.get("/v1/models", headers=bearer("one"))).status_code == 200
        server.state.draining = True
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/v1/models", headers=bearer("one"))).status_code == 503


async def test_hosts(serve):
    async def status(server, *hosts):
        headers = [("host", host) for host in hosts]
        return (await server.client.get("/livez", headers=headers)).status_code

    server = serve(allowed_hosts=["my.box"])
    for host in ("localhost", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST:1", "my.box", "My.Box:5"):
        assert await status(server, host) == 200, host
    for host in ("evil", "evil.com:8000", "localhost.evil.com", "127.0.0.2", "192.168.0.1"):
        assert await status(server, host) == 403, host
    for host in ("x/health?", "", "a b", "localhost:", "localhost:x", "@localhost", "[localhost]"):
        assert await status(server, host) == 400, host
    assert await status(server, "localhost", "evil") == 400
    elsewhere = serve(host="0.0.0.0")
    assert await status(elsewhere, "any.name:80") == 200
    assert await status(elsewhere, "x/health?") == 400


async def test_no_cors_by_default(serve):
    origin = {"origin": "http://evil", "access-control-request-method": "POST"}
    response = await serve().client.get("/livez", headers=origin)
    assert not [name for name in response.headers if name.startswith("access-control")]
    refused = await serve().client.options("/v1/completions", headers=origin)
    assert refused.status_code == 405
    server = serve(allowed_origins=["http://good"])
    good = await server.client.get("/livez", headers={"origin": "http://good"})
    assert good.headers["access-control-allow-origin"] == "http://good"
    bad = await server.client.get("/livez", headers={"origin": "http://evil"})
    assert "access-control-allow-origin" not in bad.headers


async def exchange(url, request, seconds=5, until=b"HTTP/1.1"):
    """Raw bytes to the server, and what it answers: one body, or until it closes or is silent."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    answer = b""
    try:
        for start in range(0, len(request), 65_536):
            writer.write(request[start : start + 65_536])
            await writer.drain()
        async with asyncio.timeout(seconds):
            while piece := await reader.read(65_536):
                answer += piece
                if until in answer and answer.endswith(b"}"):
                    break
    except (ConnectionError, TimeoutError):
        pass
    finally:
        writer.close()
    return answer


def head(*lines, path=b"/livez"):
    return b"\r\n".join([b"GET " + path + b" HTTP/1.1", b"Host: localhost", *lines, b"", b""])


async def test_headers_have_bounds(server):
    many = [b"a%d: b" % number for number in range(200)]
    async with server.listen() as url:
        assert (await exchange(url, head())).startswith(b"HTTP/1.1 200")
        assert (await exchange(url, head(*many[:90]))).startswith(b"HTTP/1.1 200")
        assert (await exchange(url, head(*many))).startswith(b"HTTP/1.1 431")
        big = await exchange(url, head(b"a: " + b"x" * 70_000))
        assert big.startswith(b"HTTP/1.1 431") and b'"error"' in big
        fits = await exchange(url, head(b"a: " + b"x" * 60_000))
        assert fits.startswith(b"HTTP/1.1 200")
        path = await exchange(url, head(path=b"/" + b"x" * 100_000))
        assert path.startswith(b"HTTP/1.1 431")
        endless = await exchange(url, b"GET / HTTP/1.1\r\na: " + b"x" * 20_000_000)
        assert endless.startswith(b"HTTP/1.1 431") or endless == b"", "cut off while sending"
        for line in (b"GARBAGE", b"GET /\xff HTTP/1.1", b"GET / HTTP/9.9", b"\x16\x03\x01\x02"):
            answer = await exchange(url, line + b"\r\nHost: localhost\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 4") and b'"error"' in answer, (line, answer)
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/health")).status_code == 200


async def test_a_long_body_does_not_count_as_headers(server):
    async with server.listen() as url, httpx.AsyncClient(base_url=url) as client:
        for _ in range(3):  # on one connection
            body = {"prompt": "x", "zeta": "y" * 300_000}
            assert (await client.post("/v1/completions", json=body)).status_code == 200


async def test_a_body_over_the_limit_gets_its_answer(serve):
    server = serve(max_body_bytes=100_000)
    async with server.listen() as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
        response = await client.post("/v1/completions", json={"prompt": "x" * 100_000_000})
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
        assert (await client.get("/health")).status_code == 200


async def test_slow_headers_are_not_waited_for(serve):
    server = serve(receive_timeout=1.0)
    async with server.listen() as url:
        beginnings = (b"", b"GET /livez HT", b"GET /livez HTTP/1.1\r\nHost: loc")
        for answer in await asyncio.gather(*(exchange(url, one, 15) for one in beginnings)):
            assert answer.startswith(b"HTTP/1.1 408"), answer
        async with httpx.AsyncClient(base_url=url) as client:
            for _ in range(3):
                assert (await client.get("/livez")).status_code == 200
                await asyncio.sleep(0.6)  # together longer than one may take


async def test_the_time_for_headers_and_body_is_not_for_answers(serve):
    server = serve(FakeEngine(pause=2.0), receive_timeout=1.0)
    async with server.listen() as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
        assert (await client.post("/v1/completions", json={"prompt": "x"})).status_code == 200


LONG, MANY = [b"a: " + b"x" * 70_000], [b"a%d: b" % number for number in range(200)]


@pytest.mark.parametrize("second", [head(*LONG), head(*MANY), head(*LONG).rstrip()])
async def test_later_requests_on_a_connection_have_bounds_too(server, second):
    async with server.listen() as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        for request, status in ((head(), b"200"), (second, b"431")):
            writer.write(request)
            answer = await asyncio.wait_for(reader.read(65_536), 5)
            assert answer.startswith(b"HTTP/1.1 " + status)
        writer.close()
        pipelined = await exchange(url, head() + second, until=b"never", seconds=1)
        assert pipelined.count(b"HTTP/1.1 200") < 2


async def test_smuggling_shapes_are_refused(server):
    async with server.listen() as url:
        both = [b"Content-Length: 5", b"Transfer-Encoding: chunked"]
        twice = [b"Content-Length: 5", b"Content-Length: 6"]
        for lines in (both, twice, [b"Content-Length: -1"], [b"Content-Length: x"]):
            answer = await exchange(url, head(*lines) + b"12345", seconds=2)
            assert answer.startswith(b"HTTP/1.1 4"), lines


async def test_errors_in_handlers_say_nothing(server, monkeypatch):
    monkeypatch.setattr(server.engine, "stats", lambda: 1 / 0)
    response = await server.client.get("/load")
    assert response.status_code == 500
    assert (
        "division" not in response.text
        and "request id" in json.loads(response.text)["error"]["message"]
    )


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
async def test_a_client_that_leaves_while_sending(server, path):
    async with server.listen() as url:
        host, port = url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        lines = [
            f"POST {path} HTTP/1.1",
            "Host: localhost",
            "Content-Type: application/json",
            "Content-Length: 1000",
        ]
        writer.write("\r\n".join([*lines, "", '{"prompt":']).encode())
        await writer.drain()
        while server.state.num_in_flight == 0:
            await asyncio.sleep(0.005)
        writer.close()
        async with asyncio.timeout(5):
            while server.state.num_in_flight:
                await asyncio.sleep(0.005)
        assert server.engine.submitted == []
