"""POST /v1/completions, /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, Tag

from .base import (
    MAX_PROMPTS,
    MAX_TOKENS,
    Name,
    RequestModel,
    Text,
    TokenIds,
)
from .sampling import LATER_SAMPLING, MAX_LOGPROBS, SamplingFields


def _prompt_shape(value: Any) -> str | None:
    """Which of the four shapes of a prompt this is; its first element decides."""
    if isinstance(value, str):
        return "<text>"
    if not isinstance(value, list):
        return None
    first = value[0] if value else 0
    if isinstance(first, str):
        return "<texts>"
    return "<token lists>" if isinstance(first, list) else "<tokens>"


Prompt = Annotated[
    Annotated[Text, Tag("<text>")]
    | Annotated[TokenIds, Tag("<tokens>")]
    | Annotated[Annotated[list[Text], Field(max_length=MAX_PROMPTS)], Tag("<texts>")]
    | Annotated[Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS)], Tag("<token lists>")],
    Discriminator(
        _prompt_shape,
        custom_error_type="prompt_type",
        custom_error_message="must be a string, a list of strings, or lists of token ids",
    ),
]


class CompletionRequest(SamplingFields):
    LATER: ClassVar[dict[str, tuple[Any, ...]]] = {**LATER_SAMPLING, "suffix": ("",)}

    prompt: Prompt
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    logprobs: int | None = Field(None, ge=-1, le=MAX_LOGPROBS)
    add_special_tokens: bool = True


class DetokenizeRequest(RequestModel):
    model: Name | None = None
    tokens: TokenIds
