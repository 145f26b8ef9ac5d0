"""What is here: the card, the machine, the packages, and what the platform makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from canary import describe_machine

from trimaran.core.platform import make_platform

from .checks import run_command, trimaran
from .part import Bench, Found, Piece

PACKAGES = ("torch", "triton", "transformers", "flashinfer-python", "numpy", "pytest")


def facts(bench: Bench) -> Iterator[Piece]:
    yield "machine", partial(_machine, bench)
    for words in (["platforms", "--platform", bench.platform], ["doctor"]):
        yield words[0], partial(run_command, bench, trimaran(*words), 200)


def _machine(bench: Bench) -> Found:
    platform = make_platform(bench.platform)
    return {
        "devices": [
            f"{one.name}, {one.memory / 2**30:.0f} GiB" for one in platform.probe().devices
        ],
        "platform": dict(platform.describe()),
        "packages": {name: _version(name) for name in PACKAGES},
        **describe_machine(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
