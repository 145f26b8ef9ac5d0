"""Steps that a platform compiles whole: one for each of its token buckets, built at start."""

from __future__ import annotations

import logging

from ...platforms.interface import (
    DeviceLost,
    DeviceOutOfMemory,
    Platform,
    StepFn,
    StepGraph,
    StepLimits,
)
from ..config import SchedulerConfig
from ..errors import PlatformError
from ..models.decoder import Decoder
from ..models.trace import StepTracer, TraceError
from .runner import Runner

logger = logging.getLogger("trimaran.runner")


def step_tracer(
    platform: Platform, device: int, scheduler: SchedulerConfig, ranks: int
) -> StepTracer | None:
    """What ops have to be bound through if steps are to be compiled; None if they are not."""
    if not platform.capabilities(device).compiles_steps:
        return None
    if ranks > 1:
        logger.warning("steps run op by op: a compiled one cannot hold a group's collectives")
        return None
    if not scheduler.token_buckets:
        logger.warning(
            "steps run op by op: platform %r has no token buckets to compile for", platform.name
        )
        return None
    return StepTracer()


def compile_steps(
    platform: Platform,
    tracer: StepTracer,
    decoder: Decoder,
    runner: Runner,
    scheduler: SchedulerConfig,
) -> dict[int, StepFn]:
    """Tokens → the compiled step of so many. Steps that are left out run op by op; the log says
    why. Raises PlatformError where the platform fails."""
    limits = StepLimits(
        scheduler.max_num_batched_tokens, scheduler.token_buckets, scheduler.mixed_batches
    )
    steps = {}
    for num_tokens in scheduler.token_buckets:
        try:
            graph = _trace(tracer, decoder, runner, num_tokens)
        except TraceError as error:
            logger.warning("steps run op by op, because this model cannot be traced: %s", error)
            return {}
        step = _build(platform, graph, limits)
        if step is not None:
            steps[num_tokens] = step
    left = [size for size in scheduler.token_buckets if size not in steps]
    if left:
        logger.info("steps of %s tokens run op by op: the platform compiled none", left)
    if steps:
        logger.info("steps of %s tokens are compiled", list(steps))
    return steps


def _trace(tracer: StepTracer, decoder: Decoder, runner: Runner, num_tokens: int) -> StepGraph:
    graphs: list[StepGraph] = []
    runner.run_scratch(num_tokens, lambda: graphs.append(tracer.trace(decoder)))
    return graphs[0]


def _build(platform: Platform, graph: StepGraph, limits: StepLimits) -> StepFn | None:
    try:
        return platform.build_step(graph, limits)
    except (DeviceLost, DeviceOutOfMemory):
        raise  # not the compiler's fault
    except Exception as error:
        raise PlatformError(
            f"Platform {platform.name!r} failed to compile a step of {graph.num_tokens} tokens: "
            f"{type(error).__name__}: {error}"
        ) from error
