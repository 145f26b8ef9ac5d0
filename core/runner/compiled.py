"""Steps that a platform compiles whole, built at start: one for each of its token buckets, or one
for all."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

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
from ..models.any_size import EXAMPLES, any_size
from ..models.decoder import Decoder
from ..models.trace import StepTracer, TraceError
from .runner import Runner, StepOf, op_by_op

logger = logging.getLogger("trimaran.runner")

Trace = Callable[[int], StepGraph]
Build = Callable[[StepGraph], StepFn | None]


def step_tracer(
    platform: Platform, device: int, scheduler: SchedulerConfig, ranks: int
) -> StepTracer | None:
    """What ops have to be bound through if steps are to be compiled; None if they are not."""
    capabilities = platform.capabilities(device)
    if not capabilities.compiles_steps:
        return None
    if ranks > 1:
        logger.warning("steps run op by op: a compiled one cannot hold a group's collectives")
        return None
    if capabilities.step_sizes == "buckets" and not scheduler.token_buckets:
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
) -> StepOf:
    """The compiled step for a number of tokens. Steps that are left out run op by op; the log says
    why. Raises PlatformError where the platform fails."""
    limits = StepLimits(scheduler.step_tokens, scheduler.token_buckets, scheduler.mixed_batches)
    trace = functools.partial(_trace, tracer, decoder, runner)
    build = functools.partial(_build, platform, limits)
    try:
        if platform.capabilities(decoder.device.index).step_sizes == "any":
            return _compile_for_all(scheduler.step_tokens, trace, build)
        return _compile_each(scheduler.token_buckets, trace, build)
    except TraceError as error:
        logger.warning("steps run op by op, because this model cannot be traced: %s", error)
        return op_by_op


def _compile_each(buckets: Sequence[int], trace: Trace, build: Build) -> StepOf:
    steps = {}
    for num_tokens in buckets:
        step = build(trace(num_tokens))
        if step is not None:
            steps[num_tokens] = step
    left = [size for size in buckets if size not in steps]
    if left:
        logger.info("steps of %s tokens run op by op: the platform compiled none", left)
    if steps:
        logger.info("steps of %s tokens are compiled", list(steps))
    return steps.get


def _compile_for_all(max_tokens: int, trace: Trace, build: Build) -> StepOf:
    if max_tokens < max(EXAMPLES):
        raise TraceError(f"an example has {max(EXAMPLES)} tokens, a step {max_tokens} at most")
    example, other = map(trace, EXAMPLES)
    step = build(any_size(example, other))
    if step is None:
        logger.info("steps run op by op: the platform compiled none")
        return op_by_op
    logger.info("steps of up to %d tokens are compiled as one", max_tokens)
    return lambda num_tokens: step


def _trace(tracer: StepTracer, decoder: Decoder, runner: Runner, num_tokens: int) -> StepGraph:
    graphs: list[StepGraph] = []
    runner.run_scratch(num_tokens, lambda: graphs.append(tracer.trace(decoder)))
    return graphs[0]


def _build(platform: Platform, limits: StepLimits, graph: StepGraph) -> StepFn | None:
    try:
        return platform.build_step(graph, limits)
    except (DeviceLost, DeviceOutOfMemory):
        raise  # not the compiler's fault
    except Exception as error:
        size = "any number of" if graph.any_size else graph.num_tokens
        raise PlatformError(
            f"Platform {platform.name!r} failed to compile a step of {size} tokens: "
            f"{type(error).__name__}: {error}"
        ) from error
