"""Big bodies keep no one else waiting."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from trimaran.core.errors import InvalidRequestError
from trimaran.server.json_body import INLINE_BYTES, INLINE_TOKENS
from trimaran.server.protocol.base import parse_request
from trimaran.server.protocol.completions import DetokenizeRequest
from trimaran.server.serving import common

BIG = [1] * (INLINE_BYTES + 1)


def recorded(monkeypatch, owner, name):
    """The idents of the threads that call `owner.name` from now on."""
    original, threads = getattr(owner, name), []

    def record(*args, **options):
        threads.append(threading.get_ident())
        return original(*args, **options)

    monkeypatch.setattr(owner, name, record)
    return threads


@pytest.mark.parametrize(
    ("path", "big", "small"),
    [
        ("/v1/completions", {"prompt": BIG}, {"prompt": [1]}),
        ("/tokenize", {"prompt": "a" * INLINE_BYTES}, {"prompt": "a"}),
        ("/detokenize", {"tokens": BIG}, {"tokens": [1]}),
    ],
)
async def test_big_bodies_are_validated_in_a_thread(server, monkeypatch, path, big, small):
    threads = recorded(monkeypatch, common, "parse_request")
    await server.post(path, small)
    await server.post(path, big)
    here = threading.get_ident()
    assert len(threads) == 2
    assert threads[0] == here != threads[1]


async def test_many_tokens_become_text_in_a_thread(server, monkeypatch):
    server.engine.model.max_model_len = INLINE_TOKENS
    strings = {"return_token_strs": True}
    tokenizer, here = server.engine.tokenizer, threading.get_ident()
    for name, path, body in (
        ("decode", "/detokenize", lambda count: {"tokens": [65] * count}),
        ("token_text", "/tokenize", lambda count: {"prompt": "A" * count, **strings}),
    ):
        threads = recorded(monkeypatch, tokenizer, name)
        for count, elsewhere in ((2, False), (INLINE_TOKENS + 1, True)):
            threads.clear()
            assert (await server.post(path, body(count))).status_code == 200
            assert threads and {thread != here for thread in threads} == {elsewhere}


@pytest.mark.parametrize("token", [-1, 1])
async def test_the_loop_goes_on_beside_a_big_body(server, token):
    gaps, body = [], b'{"tokens": [%d%s]}' % (token, b",%d" % token * 999_999)

    async def tick():
        while True:
            start = time.monotonic()
            await asyncio.sleep(0.005)
            gaps.append(time.monotonic() - start)

    ticking = asyncio.ensure_future(tick())
    json = {"content-type": "application/json"}
    response = await server.client.post("/detokenize", content=body, headers=json)
    ticking.cancel()
    assert response.status_code == (200 if token == 1 else 400)
    assert gaps and max(gaps) < 1


def test_the_first_of_many_faults_is_enough():
    with pytest.raises(InvalidRequestError) as error:
        parse_request(DetokenizeRequest, {"tokens": [-1, -1, -1]})
    assert "more problems" not in str(error.value)
