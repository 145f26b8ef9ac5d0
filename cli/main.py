"""The command line. Only the standard library and the argument dataclasses are imported here:
each command brings in what it needs when it runs, so that `--help` answers at once."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from ..core.errors import TrimaranError
from .parser import Parser

COMMANDS = {
    "serve": "The OpenAI-compatible server.",
    "chat": "Talk to a model in the terminal.",
    "complete": "Continue a text.",
    "bench": "Measure throughput, latency, or a running server.",
    "conform": "Prove a platform: its contract, its ops, engines and servers on it.",
    "platforms": "What hardware is here, what was chosen, and why not the rest.",
    "plan": "What a model needs and how fast it can be, before anything is loaded.",
    "verify": "Whether two platforms give the same tokens, and where their layers part.",
    "tune": "Measure what the GPU kernels are launched with, and write a table for this card.",
    "doctor": "A report on the environment.",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        status = _run(arguments)
    except TrimaranError as error:
        print(f"trimaran: error: {error.message}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        status = 130
    except BrokenPipeError:  # `trimaran doctor | head`
        status = 0
    _release_output()
    return status


def _run(arguments: list[str]) -> int:
    chosen = next((word for word in arguments if not word.startswith("-")), None)
    namespace = parser(chosen).parse_args(arguments)
    run = import_module(f".{namespace.command}", __package__).run
    return int(run(namespace))


def parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser. Flags of a command are added for `command` alone: the others are not asked."""
    root = Parser(
        prog="trimaran",
        description="An LLM inference engine: one engine on CPUs and accelerators.",
        allow_abbrev=False,
    )
    root.add_argument("--version", action="version", version=f"trimaran {__version__}")
    commands = root.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, help in COMMANDS.items():
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        if name == command:
            import_module(f".{name}", __package__).add_arguments(sub)
    return root


def _release_output() -> None:
    """A closed or full stdout is no failure, and must not become one as the process ends."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
