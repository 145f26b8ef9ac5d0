"""Jinja as chat templates need it, in the immutable sandbox."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_CHARS = 33_554_432  # rendered text; as many as the largest request body has bytes


class TooLarge(Exception):
    """The rendered text passes `MAX_CHARS`."""


class GenerationTag(Extension):
    """`{% generation %}` marks what a model wrote, for training; here its body is just rendered."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class NoFolding(CodeGenerator):
    """Evaluates nothing while a template is parsed: `{{ 'a' * 10**10 }}` is a constant too."""

    def _output_child_to_const(self, node: nodes.Expr, frame: Frame, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return super()._output_child_to_const(node, frame, finalize)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    code_generator_class = NoFolding


def make_environment() -> TemplateEnvironment:
    environment = TemplateEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,
        extensions=[GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def render_bounded(template: jinja2.Template, variables: Mapping[str, Any]) -> str:
    """The rendered text. Raises `TooLarge` as soon as it passes `MAX_CHARS`."""
    pieces = []
    size = 0
    for piece in template.generate(variables):
        size += len(piece)
        if size > MAX_CHARS:
            raise TooLarge(f"the rendered text has more than {MAX_CHARS} characters")
        pieces.append(piece)
    return "".join(pieces)


def describe(error: BaseException) -> str:
    """One line for the user: what the template itself raised, or what went wrong in it."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    text = str(error)
    return text if isinstance(error, jinja2.TemplateError | TooLarge) and text else repr(error)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes for HTML, which would change what a model reads."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
