"""`trimaran complete PROMPT`: the continuation of a text."""

from __future__ import annotations

import argparse
import asyncio
import sys

from .talk import add_talk_arguments, emit, open_backend, options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="The text to continue; `-` reads it from standard input.")
    parser.add_argument("--model", default=argparse.SUPPRESS, help="As for `trimaran serve`.")
    parser.set_defaults(positional_model=None)
    add_talk_arguments(parser)


def run(namespace: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if namespace.prompt == "-" else namespace.prompt

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
