"""Chat templates: from messages to the text that the model reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import InvalidRequestError, ModelLoadError
from .messages import normalise_messages
from .render_pool import RenderPool
from .sandbox import describe, make_environment, render_bounded

TEMPLATE_FILE = "chat_template.jinja"
CONFIG_FILE = "tokenizer_config.json"
DEFAULT_NAME = "default"
TOOLS_NAME = "tool_use"


class ChatTemplate:
    """A Jinja chat template, rendered in the immutable sandbox, bounded in time and size.

    Whoever wrote it, what it does may depend on the messages: so an `isolated` template is rendered
    in a process that is killed when it takes too long. One that is not is rendered here, at less
    cost and bounded in size only.
    """

    def __init__(
        self,
        source: str | Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        *,
        isolated: bool = True,
        pool: RenderPool | None = None,
    ) -> None:
        """`source`: the template, or named ones (`default`, `tool_use`). `pool`: share another's
        rendering processes. Raises `InvalidRequestError` for a template that does not parse."""
        self.sources = {DEFAULT_NAME: source} if isinstance(source, str) else dict(source)
        if not self.sources:
            raise InvalidRequestError("the chat template is empty.", param="chat_template")
        self._special_tokens = dict(special_tokens or {})
        self._compiled = self._compile()
        self._pool = pool or (RenderPool() if isolated else None)
        self._owns_pool = pool is None

    @classmethod
    def from_path(
        cls,
        path: str | Path,
        special_tokens: Mapping[str, str] | None = None,
        *,
        isolated: bool = True,
    ) -> ChatTemplate | None:
        """A model directory's own template (None if it has none), or a file's.

        Raises `ModelLoadError` naming the file that cannot be read or parsed.
        """
        path = Path(path)
        source, origin = _find_source(path) if path.is_dir() else (_read(path), path)
        if source is None:
            return None
        try:
            return cls(source, special_tokens, isolated=isolated)
        except InvalidRequestError as error:
            raise ModelLoadError(f"{origin}: {error}") from error

    def warm(self) -> None:
        """Start a rendering process, if this template needs one, for no request to wait for."""
        if self._pool is not None:
            self._pool.warm()

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

        Raises `InvalidRequestError` for messages the template refuses, and for a template that
        takes longer than `TIME_LIMIT` seconds or builds more than `MAX_CHARS` characters. Blocks:
        call it off the event loop.
        """
        chat = normalise_messages(messages)
        if continue_final_message and add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message excludes add_generation_prompt: set one of them to false.",
                param="continue_final_message",
            )
        text = self._render_source(
            self._choose(bool(tools)),
            {
                **(variables or {}),
                **self._special_tokens,
                "messages": chat,
                "tools": list(tools) if tools else None,
                "documents": list(documents) if documents else None,
                "add_generation_prompt": add_generation_prompt,
            },
        )
        return _cut_after(text, chat[-1]["content"]) if continue_final_message else text

    def close(self) -> None:
        """End the rendering processes, if any were started for this template."""
        if self._pool is not None and self._owns_pool:
            self._pool.close()

    def _choose(self, with_tools: bool) -> str:
        if with_tools and TOOLS_NAME in self.sources:
            return TOOLS_NAME
        return DEFAULT_NAME if DEFAULT_NAME in self.sources else next(iter(self.sources))

    def _compile(self) -> dict[str, Any]:
        environment = make_environment()
        try:
            return {name: environment.from_string(text) for name, text in self.sources.items()}
        except Exception as error:
            raise InvalidRequestError(
                f"the chat template does not parse: {describe(error)}", param="chat_template"
            ) from error

    def _render_source(self, name: str, variables: dict[str, Any]) -> str:
        if self._pool is not None:
            return self._pool.render(self.sources[name], variables)
        try:
            return render_bounded(self._compiled[name], variables)
        except Exception as error:  # a template may raise anything at all
            raise InvalidRequestError(
                f"the chat template cannot be rendered: {describe(error)}", param="messages"
            ) from error


def _cut_after(text: str, content: str) -> str:
    """The text up to the end of the last message's content, for the model to go on from."""
    stripped = content.strip()
    start = text.rfind(stripped)
    if start < 0:
        raise InvalidRequestError(
            "continue_final_message: the chat template changes the last message, so there is "
            "nothing to go on from.",
            param="continue_final_message",
        )
    end = start + len(stripped)
    tail = content[len(content.rstrip()) :]
    return text[: end + len(tail)] if text.startswith(tail, end) else text[:end]


def _find_source(directory: Path) -> tuple[str | dict[str, str] | None, Path]:
    file = directory / TEMPLATE_FILE
    if file.is_file():
        return _read(file), file
    config = directory / CONFIG_FILE
    if not config.is_file():
        return None, config
    try:
        value = json.loads(_read(config)).get("chat_template")
        if isinstance(value, list):
            return {entry["name"]: entry["template"] for entry in value}, config
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ModelLoadError(f"{config}: chat_template cannot be read: {error!r}") from error
    if value is not None and not isinstance(value, str):
        raise ModelLoadError(f"{config}: chat_template must be a string or a list of named ones.")
    return value, config


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"the chat template {path} cannot be read: {error}") from error
