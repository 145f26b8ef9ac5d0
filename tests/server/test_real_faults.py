"""Faults with real processes: killed engines and parents, signals, ports, closed outputs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
from real_server import RealServer, broken_pipe, gone, make_model, wait_until

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def launch(model):
    running = []

    def start(*flags, wait=True, **options):
        server = RealServer(model, *flags, **options)
        running.append(server)
        return server.start() if wait else server

    yield start
    for server in running:
        server.close()


def test_a_killed_engine_is_started_again(launch):
    server = launch()
    before, engine = server.canary(), server.engine()
    with server.stream() as (_, events):
        next(events)
        engine.kill()
        start = time.monotonic()
        last = list(events)[-1]
        assert time.monotonic() - start < 2.5
    assert last["error"]["code"] == "engine_dead"
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert "killed by SIGKILL" in last["error"]["message"]
    wait_until(lambda: server.status("/health") == 503, 2)
    refused = server.complete()
    assert refused.status_code == 503 and refused.headers["retry-after"]
    wait_until(server.healthy, 60)
    assert server.canary() == before
    assert server.load()["kv_used"] == 0
    metrics = httpx.get(server.url + "/metrics").text
    assert "trimaran:engine_restarts_total{" in metrics
    assert server.terminate() == 0


def test_a_killed_engine_ends_the_server_if_told_so(launch):
    server = launch("--engine-restarts=0")
    children = server.children()
    server.engine().kill()
    assert server.process.wait(10) == 1
    assert gone(children)


def test_a_killed_parent_leaves_no_child(launch):
    server = launch()
    children = server.children()
    assert children
    with server.stream() as (_, events):
        next(events)
        server.process.kill()
        server.process.wait()
        assert gone(children, 5)


def test_sigterm_lets_streams_end(launch):
    server = launch()
    children = server.children()
    with server.stream(max_tokens=150) as (_, events):
        next(events)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.status("/health") == 503, 5)
        assert server.complete().status_code == 503
        assert server.status("/livez") == 200
        last = list(events)[-1]
    assert last["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(10) == 0
    assert gone(children)


def test_a_drain_has_its_time(launch):
    server = launch("--shutdown-timeout=0.3")
    with server.stream() as (_, events):
        next(events)
        server.process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        last = list(events)[-1]
    assert "error" in last or last["choices"][0]["finish_reason"] == "abort"
    assert server.process.wait(10) == 0
    assert time.monotonic() - start < 8


def test_a_second_signal_is_immediate(launch):
    server = launch()
    children = server.children()
    with server.stream() as (_, events):
        next(events)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.status("/health") == 503, 5)
        start = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 143
        assert time.monotonic() - start < 1
    assert gone(children)


@pytest.mark.parametrize("when", ["importing", "starting", "loading"])
def test_sigterm_while_loading(launch, when):
    server = launch(wait=False)
    if when == "importing":
        wait_until(lambda: server.listening(), 30)
    else:
        wait_until(lambda: server.status("/livez") == 200, 30)
        time.sleep(0.0 if when == "starting" else 0.7)
    children = server.children()
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(5) == 0
    assert gone(children)


def serve_in_vain(*arguments, seconds=60):
    """Runs a server that ought not to start; (status, stderr, seconds)."""
    start = time.monotonic()
    command = [sys.executable, "-m", "trimaran", "serve", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    return done.returncode, done.stderr, time.monotonic() - start


def test_a_port_in_use(model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, error, seconds = serve_in_vain(str(model), f"--port={port}")
    assert status == 1 and seconds < 2
    assert str(port) in error and "--port" in error
    assert "Traceback" not in error and "KV cache" not in error


@pytest.mark.parametrize("flag", ["--max-model-len=abc", "--api-key-file=/no/such/file"])
def test_a_wrong_value_is_found_at_once(model, flag):
    status, error, seconds = serve_in_vain(str(model), "--port=0", flag)
    assert status == 1 and seconds < 2
    assert error.startswith("trimaran: error: ") and len(error.splitlines()) == 1


def test_a_model_that_is_not_there(tmp_path):
    status, error, _ = serve_in_vain(str(tmp_path / "none"), "--port=0")
    assert status == 1 and "ERROR" not in error and "Traceback" not in error
    assert error.splitlines()[-1].startswith("trimaran: error: ") and "none" in error
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    status, error, _ = serve_in_vain(str(tmp_path / "broken"), "--port=0")
    assert status == 1 and "config.json" in error


def test_a_platform_that_is_not_there(model):
    status, error, _ = serve_in_vain(str(model), "--port=0", "--platform=quantum")
    assert status == 1 and "\ntrimaran: error: There is no platform 'quantum'." in "\n" + error
    assert "\n  cpu: " in error and "Traceback" not in error


def test_too_little_memory_for_the_cache(model):
    status, error, _ = serve_in_vain(str(model), "--port=0", "--kv-cache-memory-bytes=1k")
    assert status == 1 and "--kv-cache-memory-bytes" in error.replace("_", "-")


@pytest.mark.parametrize("output", ["/dev/full", "broken pipe"])
def test_a_closed_output_kills_no_request(launch, output):
    target = broken_pipe() if output == "broken pipe" else os.open(output, os.O_WRONLY)
    server = launch(stdout=target, stderr=target)
    os.close(target)
    for _ in range(3):
        assert server.complete().status_code == 200
    wait_until(lambda: b"log_lines_dropped_total 0.0" not in metrics(server))
    assert server.terminate() == 0


def metrics(server):
    return httpx.get(server.url + "/metrics").content


def test_an_output_that_nobody_reads_stops_nothing(launch):
    reading, writing = os.pipe()
    server = launch(stdout=writing, stderr=writing)
    os.close(writing)
    fill = "x" * 100
    for _ in range(400):  # more than fits in a pipe
        headers = {"x-request-id": fill}
        assert httpx.get(server.url + "/v1/models", headers=headers).status_code == 200
    assert server.terminate() == 0
    os.close(reading)


def test_servers_start_together(model):
    """Nothing they open collides."""
    servers = [RealServer(model) for _ in range(3)]
    try:
        threads = [threading.Thread(target=server.start) for server in servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(server.healthy() for server in servers)
    finally:
        for server in servers:
            server.close()
