"""Bad input: a clear error in OpenAI's shape, and the server serves on."""

from __future__ import annotations

import json
import time

import pytest
from fake_engine import FakeEngine

from trimaran.core.args import EngineArgs
from trimaran.core.errors import (
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    QueueFullError,
    StepError,
)

JSON = {"content-type": "application/json"}


async def still_serves(server):
    response = await server.complete()
    assert response.status_code == 200
    assert response.json()["choices"][0]["text"] == "Hello there!"
    assert (await server.client.get("/health")).status_code == 200


def error_of(response, status, code=None):
    assert response.status_code == status, response.text[:300]
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    if code is not None:
        assert body["error"]["code"] == code
    for secret in ("Traceback", ".py", "0x"):
        assert secret not in response.text
    assert response.headers["x-request-id"]
    return body["error"]


DEEP = b'{"prompt": ' + b"[" * 10**5 + b"]" * 10**5 + b"}"
KEYS = b'{"prompt": "x", ' + b",".join(b'"k%d": 1' % number for number in range(10**6)) + b"}"
DIGITS = b'{"prompt": "x", "n": ' + b"9" * 10**5 + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"null",
        b'{"prompt": "x",}',
        b'{"prompt": "x"} x',
        b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        "{}".encode("utf-16"),
        DEEP,
        KEYS,
        DIGITS,
        b'{"messages": [], "prompt": ' + b'{"a":' * 100 + b"1" + b"}" * 100 + b"}",
    ],
    ids=range(17),
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
async def test_bad_json(server, path, body):
    start = time.perf_counter()
    response = await server.client.post(path, content=body, headers=JSON)
    error_of(response, 400, "invalid_json")
    assert time.perf_counter() - start < 20  # about a second on a quiet machine
    await still_serves(server)


@pytest.mark.parametrize("body", [b"", b" \r\n"])
async def test_an_empty_body_is_called_empty(server, body):
    response = await server.client.post("/v1/completions", content=body, headers=JSON)
    assert "body is empty" in error_of(response, 400, "invalid_json")["message"]


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "json"])
async def test_wrong_content_type(server, kind):
    headers = {"content-type": kind} if kind else {}
    response = await server.client.post("/v1/completions", content=b"{}", headers=headers)
    error_of(response, 415, "unsupported_media_type")
    await still_serves(server)


async def test_content_type_with_parameters(server):
    headers = {"content-type": "application/json; charset=utf-8"}
    body = json.dumps({"prompt": "x"})
    response = await server.client.post("/v1/completions", content=body, headers=headers)
    assert response.status_code == 200


async def test_unknown_model_path_and_method(server):
    error = error_of(await server.complete(model="nope"), 404, "model_not_found")
    assert error["param"] == "model" and "org/fake" in error["message"]
    error_of(await server.client.get("/v1/nothing"), 404, "not_found")
    error_of(await server.client.get("//v1/models"), 404)
    error_of(await server.client.get("/v1/models/"), 404)
    error_of(await server.client.get("/v1/completions"), 405, "method_not_allowed")
    error_of(await server.client.delete("/v1/models"), 405)


@pytest.mark.parametrize("prompt", ["", [], [[]], [""], ["a", ""], [[1], []]])
async def test_empty_prompt(server, prompt):
    error = error_of(await server.complete(prompt=prompt), 400)
    assert error["param"] == "prompt" and server.engine.submitted == []
    await still_serves(server)


@pytest.mark.parametrize("prompt", [[1000], [[1], [1000]], [2**31 - 1]])
async def test_token_ids_out_of_range(server, prompt):
    assert error_of(await server.complete(prompt=prompt), 400)["param"] == "prompt"
    await still_serves(server)


async def test_prompt_longer_than_the_context(server):
    error_of(await server.complete(prompt=[1] * 512), 400, "context_length_exceeded")
    error_of(await server.complete(prompt=[1] * 510, max_tokens=3), 400, "context_length_exceeded")
    start = time.perf_counter()
    error_of(await server.complete(prompt="x " * 15_000_000), 400, "context_length_exceeded")
    assert time.perf_counter() - start < 15
    await still_serves(server)


async def test_body_over_the_limit(serve):
    server = serve(max_body_bytes=1_000)
    assert (await server.complete(prompt="x" * 400)).status_code == 200
    error_of(await server.complete(prompt="x" * 1_000), 413, "body_too_large")

    async def pieces():
        for _ in range(300):
            yield b"123456"

    response = await server.client.post("/v1/completions", content=pieces(), headers=JSON)
    error_of(response, 413, "body_too_large")
    await still_serves(server)


async def test_a_body_in_tiny_pieces_is_fine(server):
    body = json.dumps({"prompt": "x", "user": "u", "zz": "y" * 600_000}).encode()

    async def pieces():
        for start in range(0, len(body), 6):
            yield body[start : start + 6]

    response = await server.client.post("/v1/completions", content=pieces(), headers=JSON)
    assert response.status_code == 200


async def test_a_template_that_takes_too_long(server):
    error_of(await server.chat("loop"), 400)
    await still_serves(server)


async def test_a_model_without_a_template(server):
    server.engine.chat_template = None
    assert "chat template" in error_of(await server.chat("x"), 400)["message"]
    await still_serves(server)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (QueueFullError("The queue is full.", retry_after=2.5), 429, "queue_full"),
        (ContextLengthError("too long", param="prompt"), 400, "context_length_exceeded"),
        (InvalidRequestError("bad", param="stop"), 400, "invalid_value"),
        (EngineDeadError("it died at /some/place.py"), 503, "engine_dead"),
        (StepError("RuntimeError at /some/place.py 0xdeadbeef"), 500, "step_failed"),
        (RuntimeError("secret /some/place.py"), 500, "internal_error"),
    ],
)
@pytest.mark.parametrize("when", ["submit_error", "fail_first"])
@pytest.mark.parametrize("stream", [False, True])
async def test_errors_of_the_engine(server, error, status, code, when, stream):
    setattr(server.engine, when, error)
    for response in (await server.complete(stream=stream), await server.chat(stream=stream)):
        error_of(response, status, code)
        if status == 429:
            assert response.headers["retry-after"] == "3"
        if status == 503:
            assert int(response.headers["retry-after"]) >= 1
    setattr(server.engine, when, None)
    await still_serves(server)
    assert server.engine.open == set() and server.state.request_ids == set()
    if status == 429:
        metrics = (await server.client.get("/metrics")).text
        assert 'admission_rejections_total{engine="0",model_name="org/fake"' in metrics


async def test_one_refused_prompt_takes_the_others_along(server):
    response = await server.complete(prompt=[[1], [1] * 600])
    error_of(response, 400, "context_length_exceeded")
    assert len(server.engine.aborted) == 1 and server.engine.open == set()


async def test_an_error_in_mid_stream(server):
    server.engine.fail_later = RuntimeError("secret /some/place.py")
    for response in (await server.complete(stream=True), await server.chat(stream=True)):
        assert response.status_code == 200
        events = response.text.split("\n\n")
        assert events[-2] == "data: [DONE]"
        body = json.loads(events[-3][6:])
        assert body["error"]["code"] == "internal_error" and "secret" not in response.text
    server.engine.fail_later = None
    await still_serves(server)


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_dies_tells_why(server, caplog, stream):
    cause = "the engine process was killed by SIGKILL"
    when = "fail_later" if stream else "fail_first"
    setattr(server.engine, when, EngineDeadError("/some/place.py", cause=cause))
    response = await server.complete(stream=stream)
    assert f"The engine is not running: {cause}. " in response.text
    assert '"code":"engine_dead"' in response.text and "place" not in response.text
    (line,) = [one for one in caplog.records if "failed" in one.message]
    assert line.levelname == "WARNING" and line.exc_info is None


@pytest.mark.parametrize("error", [RuntimeError("odd"), StepError("known")])
async def test_what_nobody_foresaw_is_logged_with_its_place(server, caplog, error):
    server.engine.fail_first = error
    await server.complete()
    (line,) = [one for one in caplog.records if "failed" in one.message]
    assert line.levelname == "ERROR" and bool(line.exc_info) == isinstance(error, RuntimeError)


async def test_a_deadline(serve, caplog):
    caplog.set_level("INFO")
    server = serve(FakeEngine(pause=0.05, piece=1))
    error_of(await server.complete(timeout_ms=20), 504, "deadline_exceeded")
    response = await server.complete(timeout_ms=120, stream=True)
    assert '"code":"deadline_exceeded"' in response.text
    lines = [one for one in caplog.records if "failed" in one.message]
    assert [(one.levelname, one.exc_info) for one in lines] == [("INFO", None)] * 2
    assert (await server.complete(timeout_ms=10_000, max_tokens=2)).status_code == 200
    assert server.engine.open == set()


async def test_a_request_id_in_use(serve):
    server = serve()
    server.state.request_ids.add("cmpl-mine")
    assert error_of(await server.complete(request_id="mine"), 400)["param"] == "request_id"
    assert "cmpl-mine" in server.state.request_ids, "it is still the other request's"
    server.state.request_ids.clear()
    assert (await server.complete(request_id="mine")).json()["id"] == "cmpl-mine"
    assert (await server.complete(request_id="mine")).status_code == 200


async def test_priority_needs_its_policy(serve):
    assert error_of(await serve().complete(priority=1), 400)["param"] == "priority"
    server = serve(engine_args=EngineArgs(scheduling_policy="priority"))
    assert (await server.complete(priority=1)).status_code == 200


async def test_contradictions(server):
    for body in (
        {"stream_options": {"include_usage": True}},
        {"length_penalty": 1.0},
        {"min_tokens": 5, "max_tokens": 4},
    ):
        error_of(await server.complete(**body), 400)
    error_of(await server.chat(top_logprobs=3), 400)
    error_of(await server.chat(continue_final_message=True, add_generation_prompt=True), 400)


async def test_while_loading_and_draining(server):
    server.model.ready = False
    for path in ("/readyz", "/health", "/ping", "/v1/models", "/v1/models/x"):
        response = await server.client.get(path)
        error_of(response, 503, "model_loading")
        assert response.headers["retry-after"]
    for path in ("/livez", "/version", "/load", "/metrics", "/openapi.json"):
        assert (await server.client.get(path)).status_code == 200
    response = await server.complete()
    error_of(response, 503, "model_loading")
    assert response.headers["retry-after"]
    server.model.ready = True
    server.state.draining = True
    error_of(await server.complete(), 503, "shutting_down")
    error_of(await server.client.get("/health"), 503, "shutting_down")
    assert (await server.client.get("/metrics")).status_code == 200


async def test_request_ids(server):
    response = await server.client.get("/livez", headers={"x-request-id": "abc.1"})
    assert response.headers["x-request-id"] == "abc.1"
    for bad in ("a b", "x" * 129, "a;b"):
        response = await server.client.get("/livez", headers={"x-request-id": bad})
        assert response.headers["x-request-id"] != bad
        assert len(response.headers["x-request-id"]) == 32
