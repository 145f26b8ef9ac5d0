"""The shapes of answers, as the official client reads them."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest
from conftest import eventually
from fake_engine import FakeEngine

from trimaran.core.errors import QueueFullError, StepError

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Kiel"}}\n</tool_call>'
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def openai_client(server):
    return openai.AsyncOpenAI(
        base_url="http://localhost/v1",
        api_key="none",
        max_retries=0,
        http_client=httpx.AsyncClient(transport=httpx.ASGITransport(server.app)),
    )


def events_of(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


async def test_chat_answer(server):
    client = openai_client(server)
    answer = await client.chat.completions.create(
        model="org/fake",
        messages=[{"role": "user", "content": "Hi"}],
        logprobs=True,
        top_logprobs=2,
    )
    choice = answer.choices[0]
    assert choice.message.content == "Hello there!" and choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == len("<user>Hi")
    assert answer.usage.total_tokens == 12 + len("<user>Hi")
    assert [one.token for one in choice.logprobs.content] == list("Hello there!")
    assert choice.logprobs.content[0].bytes == [72]
    assert [one.logprob for one in choice.logprobs.content[0].top_logprobs] == [-0.5, -9999.0]


async def test_chat_stream(server):
    response = await server.chat(stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events_of(response)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-2]["choices"][0]["delta"] == {}
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 12
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks[:-2])
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    text = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks[:-2])
    assert text == "Hello there!"


async def test_chat_stream_through_the_official_client(server):
    client = openai_client(server)
    stream = await client.chat.completions.create(
        model="org/fake", messages=[{"role": "user", "content": "Hi"}], stream=True, n=2
    )
    texts = ["", ""]
    async for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
        assert chunk.usage is None
    assert texts == ["Hello there!"] * 2


async def test_continuous_usage(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events_of(await server.complete(stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == [3, 6, 9, 12, 12]


async def test_completion_answer(server):
    client = openai_client(server)
    answer = await client.completions.create(
        model="org/fake", prompt=["Hi", "You"], n=2, max_tokens=5, logprobs=2, echo=True
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == ["HiHello"] * 2 + ["YouHello"] * 2
    logprobs = answer.choices[2].logprobs
    assert logprobs.tokens == list("YouHello")
    assert logprobs.token_logprobs[0] is None and logprobs.token_logprobs[1] == -0.5
    assert logprobs.text_offset == list(range(8))
    assert answer.usage.prompt_tokens == 5 and answer.usage.completion_tokens == 20
    assert answer.choices[0].finish_reason == "length"


async def test_completion_stream(server):
    chunks = events_of(
        await server.complete(prompt=["a", "b"], stream=True, echo=True, logprobs=0, max_tokens=4)
    )
    texts, offsets = {}, {}
    for chunk in chunks:
        choice = chunk["choices"][0]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        offsets.setdefault(choice["index"], []).extend(choice["logprobs"]["text_offset"])
    assert texts == {0: "aHell", 1: "bHell"}
    assert offsets == {0: [0, 1, 2, 3, 4], 1: [0, 1, 2, 3, 4]}
    assert [chunk["object"] for chunk in chunks] == ["text_completion"] * len(chunks)


async def test_scoring_a_prompt_computes_nothing_that_is_billed(server):
    answer = (await server.complete(max_tokens=0, echo=True, logprobs=1)).json()
    assert answer["choices"][0]["text"] == "Hi"
    assert answer["choices"][0]["logprobs"]["tokens"] == ["H", "i"]
    assert answer["usage"]["completion_tokens"] == 0
    refused = await server.complete(max_tokens=0)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "max_tokens"


async def test_prompts_as_token_ids(server):
    await server.complete(prompt=[1, 2, 3])
    await server.complete(prompt=[[4], [5, 6]])
    assert [one.prompt for one in server.engine.submitted] == [[1, 2, 3], [4], [5, 6]]
    await server.complete(prompt=[1, 2, 3], truncate_prompt_tokens=2)
    assert server.engine.submitted[-1].prompt == [2, 3]


async def test_extra_response_fields(server):
    server.engine.num_cached = 1
    answer = (await server.complete(return_token_ids=True, prompt_logprobs=1)).json()
    choice = answer["choices"][0]
    assert choice["token_ids"] == [ord(char) for char in "Hello there!"]
    assert choice["prompt_token_ids"] == [72, 105]
    assert choice["prompt_logprobs"][0] is None
    assert choice["prompt_logprobs"][1] == {
        "105": {"logprob": -0.5, "rank": 1, "decoded_token": "i"}
    }
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


async def test_chat_echo_continues_the_last_message(server):
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, "}]
    body = {"messages": messages, "echo": True, "continue_final_message": True}
    answer = (await server.post("/v1/chat/completions", body)).json()
    assert answer["choices"][0]["message"]["content"] == "Well, Hello there!"
    _, options = server.engine.rendered[-1]
    assert options["continue_final_message"] and not options["add_generation_prompt"]
    chunks = events_of(await server.post("/v1/chat/completions", {**body, "stream": True}))
    assert chunks[0]["choices"][0]["delta"]["content"] == "Well, "


async def test_sampling_fields_reach_the_engine(server):
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "min_p": 0.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
        "seed": 11,
        "stop": "x",
        "stop_token_ids": [3],
        "bad_words": ["no"],
        "min_tokens": 2,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "allowed_token_ids": [1, 2],
        "max_tokens": 9,
    }
    await server.complete(logit_bias={"5": -100}, **given)
    params = server.engine.submitted[-1].params
    for name, value in given.items():
        assert getattr(params, name) == ([value] if name == "stop" else value), name
    assert params.logit_bias == {5: -100.0}
    assert params.top_k == 7, "what the request leaves out comes from the model's defaults"
    await server.complete(top_k=-1)
    assert server.engine.submitted[-1].params.top_k == 0


async def test_default_lengths(server):
    await server.complete()
    assert server.engine.submitted[-1].params.max_tokens == 16
    await server.chat("Hi")
    assert server.engine.submitted[-1].params.max_tokens == 512 - len("<user>Hi")
    await server.chat("Hi", max_completion_tokens=5, max_tokens=6)
    assert server.engine.submitted[-1].params.max_tokens == 5


@pytest.mark.parametrize("piece", [1, 2, 5, 1000])
async def test_streamed_tool_calls_equal_those_that_are_not(serve, piece):
    server = serve(FakeEngine(f"Let me see.\n{CALL}\n{CALL}", piece))
    whole = (await server.chat(tools=TOOLS)).json()["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] == "Let me see."
    calls = [call["function"] for call in whole["message"]["tool_calls"]]
    assert calls == [{"name": "weather", "arguments": '{"city":"Kiel"}'}] * 2
    chunks = events_of(await server.chat(tools=TOOLS, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == "Let me see."
    streamed = [call for delta in deltas for call in delta.get("tool_calls", [])]
    assert [call["function"] for call in streamed] == calls
    assert [call["index"] for call in streamed] == [0, 1]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_tool_choice(serve):
    server = serve(FakeEngine(CALL + CALL))
    answer = (await server.chat(tools=TOOLS, tool_choice="none")).json()["choices"][0]
    assert answer["message"]["content"] == CALL + CALL and answer["finish_reason"] == "stop"
    assert server.engine.rendered[-1][1]["tools"] is None
    one = (await server.chat(tools=TOOLS, parallel_tool_calls=False)).json()["choices"][0]
    assert len(one["message"]["tool_calls"]) == 1 and one["message"]["content"] is None
    assert server.engine.rendered[-1][1]["tools"] == TOOLS
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        refused = await server.chat(tools=TOOLS, tool_choice=choice)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "tool_choice"


async def test_what_only_looks_like_a_call_stays_text(serve):
    text = '<tool_call>not json</tool_call> and <tool_call>{"name": 1}'
    server = serve(FakeEngine(text, 4))
    assert (await server.chat(tools=TOOLS)).json()["choices"][0]["message"]["content"] == text
    chunks = events_of(await server.chat(tools=TOOLS, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == text


async def test_messages_reach_the_template_as_it_expects_them(server):
    messages = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
        },
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "2", "extra": True},
    ]
    await server.post("/v1/chat/completions", {"messages": messages})
    rendered, _ = server.engine.rendered[-1]
    assert rendered[0] == {"role": "system", "content": "a\nb"}
    assert rendered[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert rendered[2] == {"role": "tool", "tool_call_id": "1", "content": "2", "extra": True}
    messages[1]["tool_calls"][0]["function"]["arguments"] = "{"
    refused = await server.post("/v1/chat/completions", {"messages": messages})
    assert refused.status_code == 400


async def test_beam_search(server):
    answer = (await server.complete(use_beam_search=True, n=3, temperature=0)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["a", "aa", "aaa"]
    assert answer["usage"]["completion_tokens"] == 6
    chat = (await server.chat(use_beam_search=True, n=2)).json()
    assert [choice["message"]["content"] for choice in chat["choices"]] == ["a", "aa"]
    for extra in ({"stream": True}, {"top_p": 0.5}, {"logprobs": 1}):
        assert (await server.complete(use_beam_search=True, **extra)).status_code == 400


async def test_a_beam_search_is_counted_as_any_request(server):
    engine = server.engine
    engine.submit_error = QueueFullError("full", retry_after=1)
    assert (await server.complete(use_beam_search=True)).status_code == 429
    engine.submit_error, engine.hold = None, asyncio.Event()
    first = asyncio.ensure_future(server.chat(use_beam_search=True, n=2, request_id="mine"))
    await eventually(lambda: server.state.request_ids == {"chatcmpl-mine"})
    second = await server.chat(use_beam_search=True, request_id="mine")
    assert second.status_code == 400 and second.json()["error"]["param"] == "request_id"
    engine.hold.set()
    assert (await first).status_code == 200 and server.state.request_ids == set()
    text = (await server.client.get("/metrics")).text
    labels = 'engine="0",model_name="org/fake"'
    for line in (
        f'admission_rejections_total{{{labels},reason="queue_full"}} 1.0',
        f"prompt_tokens_total{{{labels}}} {len('<user>Hi')}.0",
        f"generation_tokens_total{{{labels}}} 3.0",
        f"request_success_total{{{labels.replace(',', ',finished_reason=#length#,')}}} 2.0",
        f"e2e_request_latency_seconds_count{{{labels}}} 1.0",
    ):
        assert line.replace("#", '"') in text


@pytest.mark.parametrize(("how", "reason"), [("deadline", "abort"), ("failure", "error")])
async def test_a_beam_search_that_ends_early_is_counted_as_any_request(serve, how, reason):
    """The same metrics, line by line, as the sampling that ends in the same way."""

    async def counts(**body):
        server = serve()
        engine = server.engine
        if how == "deadline":
            engine.hold = asyncio.Event()
            assert (await server.complete(n=2, timeout_ms=50, **body)).status_code == 504
        else:
            engine.answer, engine.end_reason = "", "error"
            engine.submit_error = StepError("the fuse blew") if body else None
            assert (await server.complete(n=2, **body)).status_code == (500 if body else 200)
        text = (await server.client.get("/metrics")).text
        words = ("_tokens_total", "request_success_total", "tokens_count", "latency_seconds_count")
        return [line for line in text.splitlines() if any(f"{word}{{" in line for word in words)]

    beams = await counts(use_beam_search=True)
    assert beams == await counts()
    assert any(f'finished_reason="{reason}"' in line and line.endswith(" 2.0") for line in beams)


async def test_tokenize_and_detokenize(server):
    answer = (await server.post("/tokenize", {"prompt": "Hi", "return_token_strs": True})).json()
    assert answer == {
        "count": 2,
        "max_model_len": 512,
        "tokens": [72, 105],
        "token_strs": ["H", "i"],
    }
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    assert (await server.post("/tokenize", chat)).json()["count"] == len("<user>Hi")
    assert (await server.post("/detokenize", {"tokens": [72, 105]})).json() == {"prompt": "Hi"}
    refused = await server.post("/detokenize", {"tokens": [1000]})
    assert refused.status_code == 400


async def test_models(server):
    client = openai_client(server)
    models = await client.models.list()
    assert [model.id for model in models.data] == ["org/fake"]
    assert (await server.client.get("/v1/models/org/fake")).json()["max_model_len"] == 512
    missing = await server.client.get("/v1/models/org/other")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="other", prompt="x")


async def test_probes_and_metrics(server):
    for path in ("/livez", "/readyz", "/health", "/ping", "/version", "/load"):
        assert (await server.client.get(path)).status_code == 200, path
    await server.complete(stream=True)
    text = (await server.client.get("/metrics")).text
    labels = '{engine="0",model_name="org/fake"'
    assert f"trimaran:generation_tokens_total{labels}}} 12.0" in text
    assert 'trimaran:request_success_total{engine="0",finished_reason="stop"' in text
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "num_preemptions_total",
        "prefix_cache_queries_total",
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count",
        "e2e_request_latency_seconds_count",
        "request_queue_time_seconds_count",
    ):
        assert f"trimaran:{name}{{" in text, name
    server.engine.dead = True
    assert (await server.client.get("/health")).status_code == 503
    assert (await server.client.get("/livez")).status_code == 200


async def test_openapi_describes_every_route_and_body(serve):
    document = (await serve().client.get("/openapi.json")).json()
    chat = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    schema = chat["content"]["application/json"]["schema"]
    name = schema["$ref"].rpartition("/")[2]
    fields = document["components"]["schemas"][name]["properties"]
    assert {"messages", "temperature", "stream", "tools"} <= fields.keys()
    assert {"/v1/completions", "/tokenize", "/metrics"} <= document["paths"].keys()
