"""A real server over a tiny model: answers, limits, clients that go away."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
from real_server import RealServer, make_model, wait_until

import trimaran

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(model):
    """Two sequences at once, two waiting; prompts are computed 16 tokens a step."""
    running = RealServer(
        model,
        "--max-num-seqs=2",
        "--max-num-queued-reqs=2",
        "--max-num-batched-tokens=16",
        "--served-model-name=tiny",
    )
    try:
        yield running.start()
    finally:
        running.close()


@pytest.fixture
def idle(server):
    """The server; afterwards no block, request or tenant of the test is left."""
    before = server.canary()
    yield server
    wait_until(lambda: server.load()["num_running"] == 0 and server.load()["num_waiting"] == 0)
    wait_until(lambda: server.load()["kv_used"] == 0)
    assert server.load()["server_load"] == 0
    assert server.canary() == before


def test_the_official_client(idle):
    client = openai.OpenAI(base_url=f"{idle.url}/v1", api_key="none", max_retries=0)
    messages = [{"role": "user", "content": "Hello"}]
    settings = {"model": "tiny", "messages": messages, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**settings, logprobs=True, top_logprobs=2)
    stream = client.chat.completions.create(
        **settings, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for one in chunks for choice in one.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens <= 12
    assert len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens
    many = client.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=3)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    with pytest.raises(openai.BadRequestError, match="context"):
        client.completions.create(model="tiny", prompt="x " * 600)
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


def test_stop_strings_end_text_and_usage_alike(idle):
    free = idle.complete(max_tokens=20).json()["choices"][0]["text"]
    stop = free[4:6]
    cut = idle.complete(max_tokens=20, stop=stop).json()
    assert cut["choices"][0]["text"] == free[: free.index(stop)]
    assert cut["choices"][0]["finish_reason"] == "stop"
    assert cut["usage"]["completion_tokens"] < 20


def test_prefixes_are_reused_within_a_tenant_and_a_salt(idle):
    prompt = list(range(4, 4 + 100))

    def cached(**body):
        usage = idle.complete(prompt=prompt, **body).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    cached()
    assert cached() >= 64
    assert cached(cache_salt="another") == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", ["decode", "prefill", "queue"])
def test_a_client_that_vanishes(idle, phase, stream):
    holders = []
    if phase == "queue":
        for _ in range(2):
            context = idle.stream()
            _, events = context.__enter__()
            next(events)
            holders.append((context, events))  # a dropped iterator would end its stream
    prompt = [5] * 480 if phase == "prefill" else "hello"
    length = 450 if phase == "decode" else 30
    values = {"prompt": prompt, "max_tokens": length, "ignore_eos": True, "stream": stream}
    values["cache_salt"] = f"{phase} {stream}"  # or the second prompt would be computed already
    body = json.dumps(values)
    with socket.create_connection(("127.0.0.1", idle.port)) as sock:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}"
        sock.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n{body}".encode())
        if phase == "queue":
            wait_until(lambda: idle.load()["num_waiting"] == 1)
        elif phase == "decode" and stream:
            wait_until(lambda: b"data: " in sock.recv(65_536))
        else:
            wait_until(lambda: idle.load()["num_running"] == 1, pause=0)
    start = time.monotonic()
    if phase == "queue":
        wait_until(lambda: idle.load()["num_waiting"] == 0)
    else:
        wait_until(lambda: idle.load()["kv_used"] == 0)
    assert time.monotonic() - start < 2
    for context, _ in holders:
        context.__exit__(None, None, None)


def test_a_full_queue_is_refused(idle):
    statuses, lock = [], threading.Lock()

    def ask():
        response = idle.complete(max_tokens=60)
        with lock:
            statuses.append((response.status_code, response.headers.get("retry-after")))

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    codes = [status for status, _ in statuses]
    assert set(codes) == {200, 429} and codes.count(200) >= 2
    assert all(int(after) >= 1 for status, after in statuses if status == 429)


def test_bad_input_leaves_the_server_as_it_was(idle):
    for body in (
        {"prompt": ""},
        {"prompt": []},
        {"prompt": [10**6]},
        {"prompt": [-1]},
        {"n": 10**6},
        {"temperature": -1},
        {"top_p": 2},
        {"stop": ["x"] * 10**5},
        {"max_tokens": 10**6},
        {"logprobs": 21},
        {"prompt": [5] * 600},
        {"allowed_token_ids": [10**6]},
        {"logit_bias": {"1000000": 1}},
        {"stop_token_ids": [10**6]},
    ):
        response = idle.complete(**body)
        assert response.status_code == 400, (body, response.text[:200])
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    long = "x " * 15_000_000
    start = time.monotonic()
    assert idle.complete(prompt=long).json()["error"]["code"] == "context_length_exceeded"
    assert time.monotonic() - start < 3


def test_the_command_line_talks_to_it(idle):
    for command in (["chat", "-m", "Hello"], ["complete", "Hello"]):
        arguments = [*command, "--url", idle.url, "--max-tokens", "5"]
        done = subprocess.run(
            [sys.executable, "-m", "trimaran", *arguments], capture_output=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
    arguments = ["--num-prompts=4", "--max-concurrency=2", "--input-len=8", "--output-len=6"]
    bench = [sys.executable, "-m", "trimaran", "bench", "serve", "--url", idle.url, "--json"]
    done = subprocess.run(
        [*bench, "--vocab-size=300", *arguments], capture_output=True, text=True, timeout=60
    )
    assert '"failed": 0' in done.stdout and '"output_tokens": 24' in done.stdout, done.stderr


def test_the_default_model_answers():
    running = RealServer("default")
    try:
        running.start()
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none")
        name = client.models.list().data[0].id
        stream = client.chat.completions.create(
            model=name,
            messages=[{"role": "user", "content": "Hello!"}],
            stream=True,
            max_tokens=40,
            temperature=0,
        )
        text = "".join(one.choices[0].delta.content or "" for one in stream if one.choices)
        assert text.strip().isprintable() and text.strip()
        assert httpx.get(f"{running.url}/version").json()["version"] == trimaran.__version__
    finally:
        running.close()
