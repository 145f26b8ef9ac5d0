"""Chat templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class ChatTemplate:
    """A Jinja chat template, rendered in the immutable sandbox, bounded in time and size."""

    def __init__(
        self,
        source: str | Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        *,
        isolated: bool = True,
    ) -> None:
        """`source`: the template, or named ones (`default`, `tool_use`). `isolated`: render in a
        process that is killed when it takes too long (for whatever is not the model's own).
        Raises `InvalidRequestError` for a template that does not parse."""
        raise NotImplementedError

    @classmethod
    def from_path(
        cls, path: str | Path, special_tokens: Mapping[str, str] | None = None
    ) -> ChatTemplate | None:
        """The template of a model directory (None if it has none), or of a template file."""
        raise NotImplementedError

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text. `variables` are extra template variables (chat_template_kwargs).

        Raises `InvalidRequestError` for messages or a template that cannot be rendered in
        `TIME_LIMIT` seconds and `MAX_CHARS` characters.
        """
        raise NotImplementedError

    def close(self) -> None:
        """End the rendering process, if one was started."""
        raise NotImplementedError
