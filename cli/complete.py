"""`trimaran complete PROMPT`: the continuation of a text."""

from __future__ import annotations

import argparse
import asyncio
import sys

from ..core.errors import InvalidRequestError
from .talk import add_talk_arguments, emit, open_backend, options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "prompt",
        nargs="?",
        metavar="PROMPT",
        help="The text to continue; `-`, or none in a pipe, reads it from standard input.",
    )
    parser.add_argument("--model", default=argparse.SUPPRESS, help="As MODEL of `trimaran serve`.")
    parser.set_defaults(positional_model=None)
    add_talk_arguments(parser)


def run(namespace: argparse.Namespace) -> int:
    prompt = _prompt(namespace.prompt)

    async def main() -> None:
        backend = open_backend(namespace)
        try:
            await backend.start()
            async for piece in backend.complete(prompt, options(namespace)):
                emit(piece)
            emit("\n")
        finally:
            await backend.close()

    asyncio.run(main())
    return 0


def _prompt(given: str | None) -> str:
    """What to continue. Raises `InvalidRequestError` if there is nothing."""
    piped = given is None and not sys.stdin.isatty()
    prompt = sys.stdin.read() if piped or given == "-" else given
    if not prompt:
        raise InvalidRequestError("There is no prompt: give a text to continue.", param="prompt")
    return prompt
