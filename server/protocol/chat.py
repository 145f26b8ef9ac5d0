"""POST /v1/chat/completions, and the chat form of /tokenize."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from .base import MAX_TOKENS, JsonObject, Label, Name, Part, RequestModel, Text
from .sampling import LATER_SAMPLING, SamplingFields

MAX_MESSAGES = 4_096
MAX_PARTS = 1_024
MAX_TOOLS = 256
MAX_DOCUMENTS = 256
# Variables that a request may set in the template. Others could switch off what the operator
# relies on (a system prompt, a date), so they are refused.
TEMPLATE_VARIABLES = frozenset({"enable_thinking", "thinking", "date_string", "custom_tools"})


class ContentPart(Part):
    type: Literal["text"]
    text: Text


def _content_shape(value: Any) -> str | None:
    if isinstance(value, str):
        return "<text>"
    return "<parts>" if isinstance(value, list) else None


Content = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[Annotated[list[ContentPart], Field(max_length=MAX_PARTS)], Tag("<parts>")],
    Discriminator(
        _content_shape,
        custom_error_type="content_type",
        custom_error_message="must be a string or a list of text parts",
    ),
]


class CalledFunction(Part):
    EXTRAS_USED = True

    name: Name
    arguments: Text = "{}"


class ToolCall(Part):
    EXTRAS_USED = True

    id: Label | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Part):
    """One message. Fields beyond these reach the template as they are, and are not reported."""

    EXTRAS_USED = True

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Label | None = None
    tool_calls: list[ToolCall] | None = Field(None, max_length=MAX_TOOLS)
    tool_call_id: Label | None = None


class ToolFunction(Part):
    EXTRAS_USED = True

    name: str = Field(min_length=1, max_length=256)
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: bool | None = None


class Tool(Part):
    """One tool, which the template sees as it was sent."""

    EXTRAS_USED = True

    type: Literal["function"]
    function: ToolFunction


class NamedFunction(Part):
    name: Name


class NamedTool(Part):
    type: Literal["function"]
    function: NamedFunction


def _choice_shape(value: Any) -> str | None:
    if isinstance(value, str):
        return "<word>"
    return "<named>" if isinstance(value, dict) else None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<word>")]
    | Annotated[NamedTool, Tag("<named>")],
    Discriminator(
        _choice_shape,
        custom_error_type="tool_choice_type",
        custom_error_message="must be none, auto, required, or a named function",
    ),
]


class TemplateFields(RequestModel):
    """What a chat template is given."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    documents: list[JsonObject] | None = Field(None, max_length=MAX_DOCUMENTS)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template: Text | None = None
    chat_template_kwargs: JsonObject = Field({}, max_length=32)


class ChatRequest(SamplingFields, TemplateFields):
    LATER: ClassVar[dict[str, tuple[Any, ...]]] = {
        **LATER_SAMPLING,
        "reasoning_effort": (),
        "include_reasoning": (True,),
        "functions": (),
        "function_call": ("none",),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
    }

    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    parallel_tool_calls: bool = True


class TokenizeRequest(RequestModel):
    """A `prompt`, or `messages` as in chat."""

    model: Name | None = None
    prompt: Text
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(TemplateFields):
    model: Name | None = None
    return_token_strs: bool = False
