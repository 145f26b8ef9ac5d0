"""Tool calls out of what a model writes, whole or in pieces."""

import time

import pytest

from trimaran.core.text.tool_calls import HermesParser

CALLS = (
    'Let me see. <tool_call>\n{"name": "weather", "arguments": {"city": "Köln", "days": [1, 2.5]}}'
    '\n</tool_call>\n<tool_call>{"name": "time", "parameters": {}}</tool_call> '
)


def parse(text, size=None, **options):
    parser, content, calls = HermesParser(**options), "", []
    size = size or len(text) or 1
    for start in range(0, len(text), size):
        more, found = parser.feed(text[start : start + size])
        content, calls = content + more, calls + found
    more, found = parser.feed("", last=True)
    return content + more, [(one.index, one.name, one.arguments) for one in calls + found]


@pytest.mark.parametrize("size", [None, 1, 2, 3, 7, 50])
def test_pieces_give_what_the_whole_gives(size):
    assert parse(CALLS, size) == (
        "Let me see.",
        [(0, "weather", '{"city":"Köln","days":[1,2.5]}'), (1, "time", "{}")],
    )


def test_the_last_call_may_lack_its_end():
    assert parse(CALLS.rstrip().removesuffix("</tool_call>"))[1][1] == (1, "time", "{}")


def test_calls_beyond_the_limit_are_dropped():
    assert [call[1] for call in parse(CALLS, limit=1)[1]] == ["weather"]


def test_arguments_as_text_stay_as_they_are():
    text = '<tool_call>{"name": "f", "arguments": "{\\"x\\":  1}"}</tool_call>'
    assert parse(text) == ("", [(0, "f", '{"x":  1}')])


@pytest.mark.parametrize(
    "body",
    [
        "",
        "not json",
        "[]",
        '{"name": 1}',
        '{"name": ""}',
        '{"arguments": {}}',
        '{"name": "f", "arguments": {"x": NaN}}',
        '{"name": "f", "arguments": {"x": 1e999}}',
        '{"name": "f", "arguments": {"x": "\\ud800"}}',
        '{"name": "\\udfff"}',
        '{"name": "f", "arguments": "\\ud800"}',
        '{"name": "f", "arguments": ' + "[" * 100_000,
        '{"name": "f", "arguments": ' + "9" * 5_000 + "}",
    ],
)
def test_what_is_no_call_stays_text(body):
    text = f"a <tool_call>{body}</tool_call> b"
    assert parse(text) == (text, [])


@pytest.mark.parametrize("piece", ["<tool_call>", "<tool_cal", "</tool_call>", " ", "<", "{", '"'])
@pytest.mark.parametrize("inside", [False, True])
def test_hostile_text_takes_linear_time(piece, inside):
    text = (("<tool_call>" if inside else "") + piece * 131_072)[:131_072]
    start = time.process_time()
    content, calls = parse(text, 1)
    assert time.process_time() - start < 2
    assert calls == []
