"""Chat templates: what they may do, what they may not, and how long they may take."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from trimaran.core.errors import InvalidRequestError, ModelLoadError
from trimaran.core.text.messages import normalise_messages
from trimaran.core.text.render_pool import MAX_PROCESSES, START_LIMIT, RenderPool
from trimaran.core.text.sandbox import MAX_CHARS
from trimaran.core.text.templates import ChatTemplate

USER = [{"role": "user", "content": "Hi"}]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HOSTILE = {
    "mro": "{{ ''.__class__.__mro__ }}",
    "subclasses": "{{ messages.__class__.__base__.__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "import": "{% include '/etc/passwd' %}",
    "change": "{{ messages.append(1) }}",
    "range": "{{ range(10**9) | list }}",
    "long text": "{{ 'a' * 10**10 }}",
    "padded text": "{{ 'a' | center(10**10) }}",
    "many pieces": "{% set x = 'a' * 10**6 %}{% for i in range(10**5) %}{{ x }}{% endfor %}",
    "loops": "{% for i in range(10**5) %}{% for j in range(10**5) %}{% endfor %}{% endfor %}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "syntax": "{% for %}",
    "undefined": "{{ nothing.at.all }}",
}


@pytest.fixture(scope="module")
def pool():
    pool = RenderPool()
    yield pool
    pool.close()


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_an_error_within_three_seconds(name, pool):
    begin = time.monotonic()
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplate(HOSTILE[name], pool=pool).render(USER)
    assert time.monotonic() - begin < 3
    assert "chat template" in caught.value.message and len(caught.value.message) < 2_000
    # The next one is served as ever.
    assert ChatTemplate(CHATML, pool=pool).render(USER).startswith("<|im_start|>user\nHi")


@pytest.mark.parametrize("name", ["mro", "globals", "change", "range", "syntax", "many pieces"])
def test_a_models_own_template_is_in_the_sandbox_too(name):
    with pytest.raises(InvalidRequestError):
        ChatTemplate(HOSTILE[name], isolated=False).render(USER)


def test_parsing_a_models_own_template_evaluates_nothing():
    begin = time.monotonic()
    ChatTemplate(
        "{% if false %}{{ 'a' * 10**11 }}{{ 9 ** (9 ** 9) }}{{ 'a' | center(10**11) }}"
        "{% set x = 9 ** (9 ** 9) %}{% endif %}",
        isolated=False,
    )
    assert time.monotonic() - begin < 1


def test_as_many_processes_as_allowed_and_no_more(pool):
    assert ChatTemplate(CHATML, pool=pool).render(USER) == ChatTemplate(
        CHATML, isolated=False
    ).render(USER)
    assert len(pool._idle) <= MAX_PROCESSES


def test_the_processes_end_with_the_pool():
    pool = RenderPool()
    pool.render("x", {})
    (worker,) = pool._idle
    pool.close()
    assert worker.process.poll() is not None


def test_the_terminals_signals_do_not_reach_the_processes():
    pool = RenderPool()
    pool.warm()
    (worker,) = pool._idle
    assert os.getpgid(worker.process.pid) != os.getpgrp()
    pool.close()


def test_a_process_at_work_ends_with_its_job_when_the_pool_is_closed():
    pool = RenderPool()
    pool.render("x", {})
    (worker,) = pool._idle
    busy = "{% for i in range(1000) %}{% for j in range(1000) %}{% endfor %}{% endfor %}done"
    with ThreadPoolExecutor(1) as threads:
        job = threads.submit(pool.render, busy, {})
        while pool._idle:
            time.sleep(0.001)
        pool.close()
        assert job.result() == "done"
    assert worker.process.poll() is not None


def test_a_warm_process_is_the_first_jobs():
    template = ChatTemplate(CHATML)
    template.warm()
    (worker,) = template._pool._idle
    assert worker.limit == START_LIMIT, "it may still be starting"
    template.render(USER)
    assert template._pool._idle == [worker] and worker.limit < START_LIMIT
    template.close()


def test_a_long_chat_renders_in_the_other_process(pool):
    content = "é" * 1_000_000
    assert content in ChatTemplate(CHATML, pool=pool).render([{"role": "user", "content": content}])
    assert len(content) < MAX_CHARS


def test_helpers_that_templates_count_on():
    template = ChatTemplate(
        "{% for i in range(5) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}"
        "{% endif %}{{ i }}{% endfor %}\n"
        "{% generation %}{{ {'b': 'é<', 'a': 1} | tojson }}{% endgeneration %}\n"
        "{{ strftime_now('%Y') | length }}{{ bos_token }}{{ enable_thinking }}",
        {"bos_token": "<s>"},
        isolated=False,
    )
    text = template.render(USER, variables={"enable_thinking": False, "messages": "mine"})
    assert text == '013{"b": "é<", "a": 1}4<s>False'
    assert ChatTemplate("{{ [1] | tojson(indent=2) }}", isolated=False).render(USER) == "[\n  1\n]"


def test_what_the_template_itself_refuses_reaches_the_user(pool):
    source = "{{ raise_exception('only one system message') }}"
    for template in (ChatTemplate(source, pool=pool), ChatTemplate(source, isolated=False)):
        with pytest.raises(InvalidRequestError, match="only one system message"):
            template.render(USER)


def test_named_templates_and_tools():
    template = ChatTemplate(
        {"default": "plain", "tool_use": "{{ tools[0].function.name }}"}, isolated=False
    )
    assert template.render(USER) == "plain"
    assert template.render(USER, tools=[{"function": {"name": "f"}}]) == "f"


def test_content_parts_and_tool_arguments_are_normalised():
    call = {"id": "1", "function": {"name": "f", "arguments": '{"x": [1]}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "assistant", "tool_calls": None},
        {"role": "developer", "content": "c"},
    ]
    plain = normalise_messages(messages)
    assert [message["content"] for message in plain] == ["a\nb", "", "", "c"]
    assert plain[3]["role"] == "system"
    assert plain[1]["tool_calls"][0]["function"]["arguments"] == {"x": [1]}
    assert "tool_calls" not in plain[2]
    assert messages[1]["tool_calls"][0]["function"]["arguments"] == '{"x": [1]}'  # untouched


@pytest.mark.parametrize(
    ("messages", "where"),
    [
        ([], "messages"),
        ("text", "messages"),
        ({"role": "user"}, "messages"),
        ([{"content": "x"}], "messages[0]"),
        ([*USER, {"role": "user", "content": 5}], "messages[1].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        *(
            (
                [{"role": "assistant", "tool_calls": [{"function": {"arguments": arguments}}]}],
                "messages[0].tool_calls[0].function.arguments",
            )
            for arguments in ("{", "[1]", "1", "[" * 10**5, "9" * 5000, 5)
        ),
    ],
)
def test_bad_messages_are_named(messages, where):
    with pytest.raises(InvalidRequestError) as caught:
        ChatTemplate(CHATML, isolated=False).render(messages)
    assert caught.value.param == where


def test_continuing_the_last_message():
    template = ChatTemplate(CHATML, isolated=False)
    messages = [*USER, {"role": "assistant", "content": "Well, "}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert template.render(messages, **options).endswith("<|im_start|>assistant\nWell, ")
    with pytest.raises(InvalidRequestError, match="excludes"):
        template.render(messages, continue_final_message=True)


def test_templates_of_a_directory_and_errors_that_name_the_file(tmp_path):
    assert ChatTemplate.from_path(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": [{"name": "default", "template": "listed"}]}))
    assert ChatTemplate.from_path(tmp_path, isolated=False).render(USER) == "listed"
    file = tmp_path / "chat_template.jinja"
    file.write_text("{{ messages[0].content }}")
    assert ChatTemplate.from_path(tmp_path, isolated=False).render(USER) == "Hi"
    operators = ChatTemplate.from_path(file)
    assert operators.render(USER) == "Hi"
    operators.close()
    file.write_text("{% if %}")
    for place in (tmp_path, file):
        with pytest.raises(ModelLoadError, match="chat_template.jinja"):
            ChatTemplate.from_path(place)
    file.unlink()
    config.write_text(json.dumps({"chat_template": 5}))
    with pytest.raises(ModelLoadError, match="tokenizer_config.json"):
        ChatTemplate.from_path(tmp_path)


def test_the_rendered_text_is_bounded_piece_by_piece():
    source = "{% set x = 'a' * 10**6 %}{% for i in range(40) %}{{ x }}{% endfor %}"
    with pytest.raises(InvalidRequestError, match="characters"):
        ChatTemplate(source, isolated=False).render(USER)


def test_the_memory_of_the_other_process_is_bounded(pool):
    with pytest.raises(InvalidRequestError, match="memory"):
        ChatTemplate("{{ ('a' * 10**9) | length }}", pool=pool).render(USER)


@pytest.mark.parametrize("name", ["loops", "power"])
def test_the_kernel_itself_ends_a_job_that_takes_too_long(name):
    # So that it ends even if nobody is left to end it; the pool alone would wait much longer.
    pool = RenderPool(time_limit=0.3)
    begin = time.monotonic()
    with pytest.raises(InvalidRequestError, match="ended after"):
        pool.render(HOSTILE[name], {"messages": USER})
    assert time.monotonic() - begin < START_LIMIT / 2
    pool.close()
