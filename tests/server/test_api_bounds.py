"""Every field has bounds: proved by a walk over the models, and tried one beyond each."""

from __future__ import annotations

import time

import pytest

from trimaran.core import sampling_params as core
from trimaran.server.protocol import chat, completions, sampling
from trimaran.server.protocol.base import MAX_TEXT, RequestModel

MODELS = [
    completions.CompletionRequest,
    completions.DetokenizeRequest,
    chat.ChatRequest,
    chat.TokenizeRequest,
    chat.TokenizeChatRequest,
]


def unbounded(schema, definitions, path):
    """Paths of the parts of a JSON schema that any amount of data would fit."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        if name in path:
            return
        yield from unbounded(definitions[name], definitions, (*path, name))
        return
    for key in ("anyOf", "oneOf", "allOf"):
        for number, part in enumerate(schema.get(key, ())):
            yield from unbounded(part, definitions, (*path, f"{key}{number}"))
    kind = schema.get("type")
    fixed = "enum" in schema or "const" in schema
    if kind in ("integer", "number"):
        low = {"minimum", "exclusiveMinimum"} & schema.keys()
        high = {"maximum", "exclusiveMaximum"} & schema.keys()
        if not (low and high):
            yield path
    elif kind == "string" and not fixed and "maxLength" not in schema:
        yield path
    elif kind == "array":
        if "maxItems" not in schema:
            yield path
        yield from unbounded(schema["items"], definitions, (*path, "[]"))
    elif kind == "object":
        yield from unbounded_object(schema, definitions, path)
    elif not (kind or fixed or {"anyOf", "oneOf", "allOf"} & schema.keys()) and (
        path[-1] != "{json}"  # free-form JSON, bounded by the parser
    ):
        yield path


def unbounded_object(schema, definitions, path):
    for name, part in schema.get("properties", {}).items():
        yield from unbounded(part, definitions, (*path, name))
    extra = schema.get("additionalProperties")
    if "properties" not in schema or isinstance(extra, dict):
        if "maxProperties" not in schema:
            yield path
        if isinstance(extra, dict):
            yield from unbounded(extra, definitions, (*path, "{json}"))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_is_bounded(model):
    schema = model.model_json_schema()
    assert list(unbounded(schema, schema.get("$defs", {}), (model.__name__,))) == []


def test_the_walk_finds_what_is_not_bounded():
    class Loose(RequestModel):
        number: int
        text: str | None = None
        items: list[sampling.StopString] = []
        table: dict[str, int] = {}

    schema = Loose.model_json_schema()
    found = {path[1] for path in unbounded(schema, {}, ("Loose",))}
    assert found == {"number", "text", "items", "table"}


def test_all_request_models_are_walked():
    def leaves(model):
        below = [leaf for sub in model.__subclasses__() for leaf in leaves(sub)]
        return below or [model]

    ours = {leaf for leaf in leaves(RequestModel) if leaf.__module__.startswith("trimaran")}
    assert ours == set(MODELS)


BEYOND = {
    "n": [0, core.MAX_N + 1, 10**6, 1.5, "1", True],
    "temperature": [-1e-6, 100.1, "hot"],
    "top_p": [0.0, 1.01, 2],
    "top_k": [-2, 2**31],
    "min_p": [-0.01, 1.01],
    "presence_penalty": [-2.01, 2.01],
    "frequency_penalty": [-2.01, 2.01],
    "repetition_penalty": [0.0, 100.1],
    "seed": [-(2**63) - 1, 2**63],
    "max_tokens": [-1, 2**31],
    "min_tokens": [-1, 2**31],
    "logprobs": [-2, 1_000_001],
    "prompt_logprobs": [-2, 1_000_001],
    "truncate_prompt_tokens": [0, 2**31],
    "priority": [-(2**31), 2**31],
    "timeout_ms": [0, 86_400_001],
    "length_penalty": [-10.1, 10.1],
    "stop": [["x"] * 65, ["x" * 1025], [""], ["x"] * 10**5, 5],
    "stop_token_ids": [[1] * 65, [-1], [2**31]],
    "bad_words": [["x"] * 257, ["x" * 1025]],
    "allowed_token_ids": [[], [-1]],
    "logit_bias": [{"1": 100.1}, {"1": -100.1}, {"x": 1}, {"-1": 1}, dict.fromkeys("1", "a")],
    "request_id": ["", "x" * 129, "a b", "a\n"],
    "cache_salt": ["x" * 257],
    "user": ["x" * 1025],
    "model": ["x" * 257],
    "stream_options": [{"include_usage": 1}, []],
    "echo": ["yes", 1],
    "prompt": [[-1], [2**31], [[2**40]], 5, {}, [1, "a"], ["a", 1], [None]],
}
CHAT_BEYOND = {
    "top_logprobs": [-1, 21],
    "max_completion_tokens": [0, 2**31],
    "messages": [
        [],
        [{"role": "user", "content": "x"}] * 4097,
        [{"role": "robot", "content": "x"}],
        [{"content": "x"}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": "x"}] * 1025}],
        "Hi",
    ],
    "tools": [
        [{"type": "function", "function": {"name": "f"}}] * 257,
        [{"type": "retrieval"}],
        [{"type": "function", "function": {"name": ""}}],
    ],
    "tool_choice": ["sometimes", 5],
    "chat_template": ["{{ 1 }}"],
    "chat_template_kwargs": [{"messages": []}, {"x" * 257: 1}],
}


def cases(table):
    return [
        pytest.param(name, value, id=f"{name}-{number}")
        for name, values in table.items()
        for number, value in enumerate(values)
    ]


async def refused(server, name, response, start):
    seconds = time.perf_counter() - start
    assert response.status_code == 400, response.text[:300]
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"].split("[")[0].split(".")[0] == name
    assert error["type"] == "invalid_request_error" and len(error["message"]) < 500
    assert seconds < 10  # nothing of the size asked for was built
    assert server.engine.submitted == []


@pytest.mark.parametrize(("name", "value"), cases(BEYOND))
async def test_beyond_a_bound(server, name, value):
    start = time.perf_counter()
    response = await server.complete(**{name: value})
    await refused(server, name, response, start)


@pytest.mark.parametrize(("name", "value"), cases(CHAT_BEYOND))
async def test_beyond_a_bound_of_chat(server, name, value):
    start = time.perf_counter()
    response = await server.chat(**{"logprobs": True, name: value})
    await refused(server, name, response, start)


AT_THE_BOUND = {
    "n": [1, 128],
    "temperature": [0, 100],
    "top_p": [1e-6, 1],
    "top_k": [-1, 2**31 - 1],
    "min_p": [0, 1],
    "presence_penalty": [-2, 2],
    "repetition_penalty": [1e-3, 100],
    "seed": [-(2**63), 2**63 - 1],
    "stop": [["x"] * 64, "x" * 1024],
    "logit_bias": [{"1": 100}, {"1": -100}],
    "timeout_ms": [86_400_000],
    "max_tokens": [1],
    "request_id": ["x" * 128],
    "user": ["x" * 1024, None],
}


@pytest.mark.parametrize(("name", "value"), cases(AT_THE_BOUND))
async def test_at_a_bound(server, name, value):
    response = await server.complete(**{name: value})
    assert response.status_code == 200, response.text


LATER = {
    "suffix": "x",
    "best_of": 2,
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a"},
    "deterministic": True,
    "dry_multiplier": 0.8,
    "xtc_probability": 0.5,
    "kv_transfer_params": {},
    "thinking_token_budget": 5,
    "repetition_detection": {},
}


@pytest.mark.parametrize(("name", "value"), LATER.items())
async def test_what_is_not_supported_yet_is_refused(server, name, value):
    response = await server.complete(**{name: value})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == f"{name} is not supported yet."


async def test_what_asks_for_nothing_is_accepted(server):
    for extra in ({"suffix": ""}, {"response_format": {"type": "text"}}, {"best_of": 1}):
        assert (await server.complete(**extra)).status_code == 200
    chat = await server.chat(reasoning_effort=None, include_reasoning=True)
    assert chat.status_code == 200
    refused = await server.chat(reasoning_effort="high")
    assert refused.status_code == 400


async def test_unknown_fields(serve):
    server = serve()
    response = await server.complete(zeta=1, alpha=2, stream_options=None)
    assert response.status_code == 200
    assert response.headers["x-trimaran-ignored"] == "zeta,alpha"
    nested = await server.complete(stream=True, stream_options={"zeta": 1})
    assert nested.headers["x-trimaran-ignored"] == "stream_options.zeta"
    odd = await server.complete(**{"a\r\nb: ü": 1})
    assert odd.headers["x-trimaran-ignored"] == "a??b???"
    assert "x-trimaran-ignored" not in (await server.complete()).headers
    many = await server.complete(**{f"field{number}": 1 for number in range(65)})
    assert many.status_code == 400
    strict = serve(strict_params=True)
    response = await strict.complete(zeta=1)
    assert response.status_code == 400 and response.json()["error"]["param"] == "zeta"
    assert (await strict.complete()).status_code == 200


async def test_unknown_fields_inside_lists(serve):
    part = {"type": "text", "text": "Hi", "theta": 1}
    body = {"messages": [{"role": "user", "content": [part, {**part, "eta": 1}]}]}
    names = [f"messages[0].content{place}" for place in ("[0].theta", "[1].theta", "[1].eta")]
    for path in ("/v1/chat/completions", "/tokenize"):
        response = await serve().post(path, body)
        assert response.headers["x-trimaran-ignored"].split(",") == names
        refused = await serve(strict_params=True).post(path, body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == names[0]
        assert all(name in refused.json()["error"]["message"] for name in names)
    many = await serve().chat([part] * 100)
    assert len(many.headers["x-trimaran-ignored"].split(",")) == 20


async def test_what_the_template_sees_is_not_unknown(serve):
    tool = {"type": "function", "zeta": 1, "function": {"name": "f", "eta": 1}}
    call = {"type": "function", "function": {"name": "f", "iota": 1}, "kappa": 1}
    message = {"role": "assistant", "content": "Hi", "theta": 1, "tool_calls": [call]}
    server = serve(strict_params=True)
    body = {"messages": [message], "tools": [tool]}
    for path in ("/v1/chat/completions", "/tokenize"):
        assert (await server.post(path, body)).status_code == 200
        (rendered,), options = server.engine.rendered[-1]
        call["function"]["arguments"] = {}
        assert rendered == message and options["tools"] == [tool]
        del call["function"]["arguments"]


def test_text_may_be_as_long_as_a_body():
    assert MAX_TEXT == 32 * 2**20
