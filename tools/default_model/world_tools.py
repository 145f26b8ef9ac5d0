"""Conversations with tools: the call in the Hermes form, the result, and plain answers beside."""

from __future__ import annotations

import json
import random
from typing import Any

from world_split import Split, operands_split, pick_phrasing
from world_toolset import TOOL_KINDS, Parameter, ToolKind
from world_turn import Turn

Message = dict[str, Any]
NO_TOOL = "I do not have a tool for that."

_RESULT_KEYS = (
    *("temperature", "condition", "time", "price", "status", "distance", "result", "answer"),
    *("wind", "total", "id", "message", "rate", "color", "size", "level", "score", "name"),
)
_RESULT_WORDS = (
    *("sunny", "cloudy", "rainy", "windy", "ok", "sent", "done", "saved", "failed", "ready"),
    *("green", "high", "low", "open", "closed", "queued", "foggy", "cold", "warm", "busy"),
)
_UNITS = ("degrees", "km", "euros", "minutes", "pages", "points", "percent", "items")


class OfferedTool:
    """A tool as one conversation offers it: one choice of its name and its argument names."""

    def __init__(self, rng: random.Random, kind: ToolKind, split: Split) -> None:
        self.kind = kind
        while True:
            self.name = self._draw_name(rng)
            self.arguments = tuple(rng.choice(p.names) for p in kind.parameters)
            self.key = f"tool|{self.name}|{','.join(self.arguments)}"
            if operands_split(self.key) == split and len(set(self.arguments)) == len(
                self.arguments
            ):
                break
        self.described = rng.random() < 0.25
        self.description = rng.choice(kind.descriptions)
        self.optional = rng.random() < 0.1

    def _draw_name(self, rng: random.Random) -> str:
        name = rng.choice(self.kind.names)
        draw = rng.random()
        if draw < 0.15:
            name += rng.choice(("_v2", "_tool", "_api", "_now", "_1", "_fn", "_service"))
        elif draw < 0.2:
            name = "".join(part.capitalize() for part in name.split("_"))
        elif draw < 0.3:
            name = rng.choice(("home", "my", "app", "user", "fast", "new")) + "_" + name
        elif draw < 0.32:
            letters = "abcdefghijklmnopqrstuvwxyz"
            name = "".join(rng.choice(letters) for _ in range(rng.randint(2, 4)))
        return name

    def _property(self, parameter: Parameter) -> dict[str, Any]:
        described = {"description": parameter.description} if self.described else {}
        return {"type": parameter.kind, **described}

    def schema(self) -> dict[str, Any]:
        """The definition in the form of the OpenAI API."""
        pairs = zip(self.arguments, self.kind.parameters, strict=True)
        properties = {name: self._property(parameter) for name, parameter in pairs}
        if self.optional:
            properties["unit"] = {"type": "string", "enum": ["metric", "imperial"]}
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.description,
                "parameters": {
                    "type": "object",
                    "properties": properties,
                    "required": list(self.arguments),
                },
            },
        }

    def request(self, rng: random.Random, split: Split) -> tuple[str, Message, tuple[str, ...]]:
        """A user's wish, the call that fulfils it, and the keys of the split."""
        phrasing, key = pick_phrasing(rng, f"tool {self.kind.key}", self.kind.queries, split)
        while True:
            values = [parameter.draw(rng) for parameter in self.kind.parameters]
            operands = f"{self.key}|{','.join(map(str, values))}"
            if operands_split(f"{self.kind.key}|{','.join(map(str, values))}") == split:
                break
        call = {
            "name": self.name,
            "arguments": dict(zip(self.arguments, values, strict=True)),
        }
        keys = (key, self.key, operands)
        return phrasing.format(*values), {"type": "function", "function": call}, keys


def call_text(call: Message) -> str:
    """The text of a call, as the chat template writes it."""
    body = json.dumps(call["function"], ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def _value(rng: random.Random) -> str | int:
    draw = rng.random()
    if draw < 0.4:
        return rng.randint(0, 999)
    if draw < 0.6:
        return f"{rng.randint(1, 99)} {rng.choice(_UNITS)}"
    return rng.choice(_RESULT_WORDS)


def tool_result(rng: random.Random, split: Split) -> tuple[str, str, str]:
    """What a tool returns, the sentence that reports it, and its key."""
    while True:
        names = rng.sample(_RESULT_KEYS, rng.choice((1, 1, 1, 2, 2)))
        result = {name: _value(rng) for name in names}
        key = f"result|{json.dumps(result)}"
        if operands_split(key) == split:
            break
    if len(result) == 1 and rng.random() < 0.4:
        value = next(iter(result.values()))
        return str(value), f"The result is {value}.", key
    parts = [f"the {name} is {value}" for name, value in result.items()]
    text = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
    separators = (",", ":") if rng.random() < 0.3 else (", ", ": ")
    return json.dumps(result, separators=separators), text[0].upper() + text[1:] + ".", key


def offer_tools(rng: random.Random, split: Split) -> list[OfferedTool]:
    """One to four different tools, no two of them with the same name."""
    count = rng.choices((1, 2, 3), (5, 4, 1))[0]
    tools = [OfferedTool(rng, kind, split) for kind in rng.sample(TOOL_KINDS, count)]
    return tools if len({tool.name for tool in tools}) == count else offer_tools(rng, split)


def _two_calls(rng: random.Random, tool: OfferedTool) -> tuple[str, list[Message]] | None:
    """One wish that needs two calls of the same tool: the weather or the time in two cities."""
    if tool.kind.key not in ("weather", "time"):
        return None
    draw = tool.kind.parameters[0].draw
    first, second = draw(rng), draw(rng)
    if first == second:
        return None
    question = {"weather": "What is the weather", "time": "What time is it"}[tool.kind.key]
    calls = [
        {"type": "function", "function": {"name": tool.name, "arguments": {tool.arguments[0]: v}}}
        for v in (first, second)
    ]
    return f"{question} in {first} and in {second}?", calls


def tool_round(
    rng: random.Random, tool: OfferedTool, split: Split, with_result: bool
) -> tuple[list[Message], tuple[str, ...]]:
    """User, call and, if wanted, the tool's result and the final answer."""
    text, call, keys = tool.request(rng, split)
    calls = [call]
    double = _two_calls(rng, tool) if split == "train" and rng.random() < 0.15 else None
    if double is not None:
        text, calls = double
    messages: list[Message] = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "", "tool_calls": calls},
    ]
    if not with_result:
        return messages, keys
    answers = []
    for _ in calls:
        content, answer, key = tool_result(rng, split)
        keys = (*keys, key)
        answers.append(answer)
        messages.append({"role": "tool", "content": content})
    messages.append({"role": "assistant", "content": " ".join(answers)})
    return messages, keys


def missing_tool(rng: random.Random, offered: list[OfferedTool], split: Split) -> Turn:
    """A wish for which no offered tool (or none at all) exists."""
    offered_kinds = {tool.kind.key for tool in offered}
    kinds = [kind for kind in TOOL_KINDS if kind.key not in offered_kinds]
    kind = rng.choice(kinds)
    text, _, keys = OfferedTool(rng, kind, split).request(rng, split)
    return Turn("missing tool", text, NO_TOOL, keys[:1])
