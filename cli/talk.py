"""What `chat` and `complete` share: flags, the choice of a backend, and safe printing."""

from __future__ import annotations

import argparse
import re
import sys
from typing import Any

from ..core.args import EngineArgs
from ..core.sampling_params import SamplingParams
from .backends import Backend, LocalBackend, RemoteBackend
from .flags import add_flags, build
from .http_client import Client
from .serve import add_model, take_model

# A model may write anything; a terminal must not obey it.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def add_talk_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="Talk to this server instead of loading a model.")
    parser.add_argument("--api-key", help="Its API key (or TRIMARAN_API_KEY).")
    for name, kind, help in (
        ("temperature", float, "0 takes the most probable token (default: the model's own)."),
        (
            "top-p",
            float,
            "Sample among the likeliest tokens of this share (default: the model's own).",
        ),
        ("max-tokens", int, "Most tokens to generate."),
    ):
        parser.add_argument(f"--{name}", type=kind, metavar=kind.__name__.upper(), help=help)
    add_flags(parser, EngineArgs, skip=("model",))


def open_backend(namespace: argparse.Namespace) -> Backend:
    """Raises before anything is loaded if a sampling option is out of bounds."""
    take_model(namespace)
    SamplingParams(**options(namespace))
    if namespace.url:
        return RemoteBackend(Client.from_flags(namespace), getattr(namespace, "model", None))
    return LocalBackend(build(EngineArgs, namespace))


def options(namespace: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given. A seed alone would be the engine's."""
    names = ("temperature", "top_p", "max_tokens")
    given = {name: getattr(namespace, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def safe(text: str) -> str:
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def emit(text: str) -> None:
    sys.stdout.write(safe(text))
    sys.stdout.flush()


__all__ = ["add_model", "add_talk_arguments", "emit", "open_backend", "options", "safe"]
