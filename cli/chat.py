"""`trimaran chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import Any

from ..core.errors import TrimaranError
from .backends import Backend, Messages
from .talk import add_model, add_talk_arguments, emit, open_backend, options

HINT = "Ctrl-C stops an answer, Ctrl-D or /quit ends; /reset forgets the conversation."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("-s", "--system", help="A system message.")
    parser.add_argument("-m", "--message", help="Ask this, print the answer, and end.")
    add_talk_arguments(parser)


def run(namespace: argparse.Namespace) -> int:
    backend = open_backend(namespace)
    messages = [{"role": "system", "content": namespace.system}] if namespace.system else []
    with asyncio.Runner() as runner:
        try:
            runner.run(_start(backend))
            if namespace.message is not None:
                runner.run(_turn(backend, messages, namespace.message, options(namespace)))
            else:
                _converse(runner, backend, messages, options(namespace))
        finally:
            runner.run(backend.close())
    return 0


async def _start(backend: Backend) -> None:
    if not sys.stderr.isatty():
        await backend.start()
        return
    from rich.console import Console

    with Console(stderr=True).status("loading the model"):
        await backend.start()


def _converse(
    runner: asyncio.Runner, backend: Backend, messages: Messages, settings: dict[str, Any]
) -> None:
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    console.print(f"[bold]{backend.name}[/bold]  [dim]{HINT}[/dim]")
    beginning = list(messages)
    while True:
        try:
            text = console.input("[bold cyan]>[/bold cyan] ").strip()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if text in ("/quit", "/exit"):
            return
        if text == "/reset":
            messages[:] = beginning
        elif text == "/help":
            console.print(HINT, style="dim")
        elif text.startswith("/") and len(text.split()) == 1:
            console.print(f"There is no command {text}. {HINT}", style="red", markup=False)
        elif text:
            try:
                runner.run(_turn(backend, messages, text, settings))
            except KeyboardInterrupt:  # this answer only
                emit("\n")
            except TrimaranError as error:
                console.print(error.message, style="red", markup=False)


async def _turn(backend: Backend, messages: Messages, text: str, settings: dict[str, Any]) -> None:
    """One question and its answer. They join the conversation together, even if the answer was cut
    short, or not at all: two questions in a row are refused by strict templates."""
    question = {"role": "user", "content": text}
    pieces: list[str] = []
    try:
        async for piece in backend.chat([*messages, question], settings):
            pieces.append(piece)
            emit(piece)
        emit("\n")
    finally:
        if pieces:
            messages += [question, {"role": "assistant", "content": "".join(pieces)}]
