"""From conversations to text: the chat template, rendered as every serving engine renders it."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from world import Conversation

MODEL_DIR = Path(__file__).resolve().parents[2] / "default_model"
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
ASSISTANT = f"{IM_START}assistant\n"


def _tojson(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@lru_cache(maxsize=1)
def chat_template() -> Template:
    """The compiled template of the model's folder."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = _tojson
    return environment.from_string((MODEL_DIR / "chat_template.jinja").read_text())


def render_chat(
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    add_generation_prompt: bool = False,
) -> str:
    """The text of a chat."""
    return chat_template().render(
        messages=messages, tools=tools or None, add_generation_prompt=add_generation_prompt
    )


def render_prompt(conversation: Conversation) -> str:
    """Everything up to the point at which the model has to write its last answer."""
    if not conversation.messages:
        return conversation.prompt
    return render_chat(conversation.messages[:-1], conversation.tools, add_generation_prompt=True)


def render_segments(conversation: Conversation) -> list[tuple[str, bool]]:
    """The text in pieces, each with whether the model has to write it (with its end mark)."""
    if not conversation.messages:
        return [(conversation.prompt, False), (conversation.answer + END_OF_TEXT, True)]
    text = render_chat(conversation.messages, conversation.tools)
    segments: list[tuple[str, bool]] = []
    head, *answers = text.split(ASSISTANT)
    segments.append((head + ASSISTANT, False))
    for index, part in enumerate(answers):
        answer, _, rest = part.partition(IM_END)
        segments.append((answer + IM_END, True))
        last = index == len(answers) - 1
        segments.append((rest if last else rest + ASSISTANT, False))
    return segments
