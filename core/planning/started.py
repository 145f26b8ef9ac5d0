"""After start: what is really held, beside what was planned."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ...platforms.interface import Device
from ..config import EngineConfig
from ..ops import OpBinder
from ..sizing import readable
from .memory import planned_tags

logger = logging.getLogger("trimaran.plan")

TOLERANCE = 0.05
"""Share of the plan by which the whole may be off before it is worth a warning."""

SLACK_BYTES = 1 << 20
"""Of models so small that rounding decides."""


def compare_with_plan(
    config: EngineConfig, binder: OpBinder, device: Device
) -> dict[str, dict[str, int]]:
    """`planned` and `actual` bytes by the allocator's tags; logged in one line, as a warning where
    they disagree. An engine that runs is never ended by a plan that cannot be made."""
    actual = dict(device.memory().by_tag)
    try:
        planned = planned_tags(config, binder)
    except Exception as error:
        logger.warning("memory was not planned: %s: %s", type(error).__name__, error)
        return {"planned": {}, "actual": actual}
    off = [tag for tag, size in planned.items() if differs(size, actual.get(tag, 0))]
    level = logging.WARNING if off else logging.INFO
    logger.log(level, "memory: %s", describe_memory(planned, actual))
    return {"planned": planned, "actual": actual}


def differs(planned: int, actual: int) -> bool:
    """Is the actual size off by more than the tolerance?"""
    return abs(actual - planned) > max(TOLERANCE * planned, SLACK_BYTES)


def describe_memory(planned: Mapping[str, int], actual: Mapping[str, int]) -> str:
    """`weights 1.402 GiB (planned 1.402 GiB), kv …`."""
    parts = []
    for tag in dict.fromkeys((*planned, *actual)):
        size = planned.get(tag)
        wanted = "not planned" if size is None else f"planned {readable(size)}"
        parts.append(f"{tag} {readable(actual.get(tag, 0))} ({wanted})")
    return ", ".join(parts)
