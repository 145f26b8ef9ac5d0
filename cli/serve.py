"""`trimaran serve [MODEL]`."""

from __future__ import annotations

import argparse
import signal
import sys

from ..core.args import EngineArgs, ServerArgs
from ..core.errors import ConfigError
from ..core.imports import uncollected
from . import config_file
from .flags import add_flags, build


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--config", metavar="FILE", help="JSON or YAML file with flags.")
    add_flags(parser, ServerArgs)
    add_flags(parser, EngineArgs, skip=("model",))


def add_model(parser: argparse.ArgumentParser) -> None:
    """The model, by position or by flag; left out, it is the one in the box."""
    help = "Directory, hub id in the local cache, or `default` (the model in the box)."
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help=help)
    parser.add_argument("--model", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def take_model(namespace: argparse.Namespace) -> None:
    """Moves a positional model to where its flag would be."""
    given = namespace.positional_model
    if given is not None:
        if getattr(namespace, "model", given) != given:
            raise ConfigError(f"Two models are given: {given} and --model {namespace.model}.")
        namespace.model = given


def run(namespace: argparse.Namespace) -> int:
    take_model(namespace)
    if namespace.config is not None:
        config_file.merge(namespace, namespace.config, EngineArgs, ServerArgs)
    engine_args, args = build(EngineArgs, namespace), build(ServerArgs, namespace)
    try:
        # Keys and port first: whoever gave wrong ones learns it before anything is loaded.
        from ..server.keys import read_keys
        from ..server.listen import open_socket

        keys = read_keys(args)
        sock = open_socket(args)
        # Until the server handles signals itself: leaving while modules load is a clean end, too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
        with uncollected():
            from ..server.serve import serve
    except ImportError as error:
        print(
            f"trimaran: error: the server needs more packages ({error}): "
            "run pip install '.[server]' in trimaran's checkout",
            file=sys.stderr,
        )
        return 1
    serve(engine_args, args, sock, keys)
