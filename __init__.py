"""Trimaran: one LLM inference engine with all hardware behind one contract.

The public names are loaded on first use, so that `import trimaran` stays instant and touches
neither torch nor a device.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .core.imports import uncollected

if TYPE_CHECKING:
    from .core.async_engine import AsyncEngine
    from .core.llm import LLM
    from .core.sampling_params import BeamSearchParams, SamplingParams
    from .platforms.interface import PLATFORM_API, Platform

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "PLATFORM_API",
    "AsyncEngine",
    "BeamSearchParams",
    "Platform",
    "SamplingParams",
    "__version__",
]

_HOMES = {
    "AsyncEngine": ".core.async_engine",
    "BeamSearchParams": ".core.sampling_params",
    "LLM": ".core.llm",
    "PLATFORM_API": ".platforms.interface",
    "Platform": ".platforms.interface",
    "SamplingParams": ".core.sampling_params",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with uncollected():
        value = getattr(import_module(home, __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
