"""Who executes step plans: one process, or a group of them behind the same call."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from typing import Any, Protocol

from ..platforms.interface import Device, DeviceOutOfMemory, GroupSpec, Platform
from .config import EngineConfig, SchedulerConfig
from .distributed.group import open_group
from .errors import ConfigError, KVMemoryError, PlatformError
from .models.decoder import Decoder
from .models.loader import fill
from .models.packed_cache import open_cache
from .models.registry import decoder_spec
from .models.step import StepBuffers, make_groups
from .models.trace import StepTracer
from .ops import OpBinder
from .plan import StepOutput, StepPlan
from .planning.started import compare_with_plan
from .platform import make_platform
from .runner.compiled import compile_steps, step_tracer
from .runner.recorded import recording_scope
from .runner.rows import SLACK
from .runner.runner import Runner

logger = logging.getLogger("trimaran.executor")


class StepHandle(Protocol):
    """A submitted step."""

    def result(self) -> StepOutput:
        """Block until the step is over. What it raised is the output's `error`."""

    def done(self) -> bool: ...


class Executor(Protocol):
    """Runs plans in the order they are submitted."""

    description: Mapping[str, Any]

    def submit(self, plan: StepPlan) -> StepHandle: ...

    def close(self) -> None:
        """Free every device byte and process. Idempotent."""


class Rank:
    """One rank of one engine: platform, device, model and runner, built from the configuration."""

    def __init__(self, config: EngineConfig, group: GroupSpec) -> None:
        platform = make_platform(config.platform.name)
        self.device: Device = platform.open(
            _device_index(platform, config, group.rank), config.platform.num_threads
        )
        with contextlib.ExitStack() as undo:
            undo.callback(self.device.close)
            self.comm = open_group(platform, self.device, group)
            undo.callback(self.comm.close)
            self._eager = config.platform.enforce_eager
            self._tracer = self._step_tracer(platform, config.scheduler, group.size)
            self.binder = OpBinder(
                platform,
                self.device,
                self._tracer.wrap if self._tracer else None,
                config.model.quantization,
                config.model.attention_backend,
            )
            try:
                self.runner = self._build(config)
            except DeviceOutOfMemory as error:
                raise KVMemoryError(
                    f"The device has no room for the model and its KV cache: {error} Lower "
                    "--kv-cache-memory-bytes (or --num-gpu-blocks-override), or --max-model-len."
                ) from error
            self.description: dict[str, Any] = {
                **_facts(platform),
                **_bindings(self.binder),
                "memory": compare_with_plan(config, self.binder, self.device),
            }
            undo.pop_all()

    def _build(self, config: EngineConfig) -> Runner:
        model, scheduler = config.model, config.scheduler
        spec = decoder_spec(model.hf_config)
        groups = make_groups(
            spec, self.binder, config.cache, dtype=model.dtype, ranks=self.comm.size
        )
        if self._tracer:
            self._tracer.watch(groups)
        buffers = StepBuffers(
            self.device,
            groups,
            max_tokens=scheduler.step_tokens,
            max_positions=scheduler.max_model_len + SLACK,
        )
        decoder = Decoder(spec, self.binder, buffers, self.comm, dtype=model.dtype)
        kept = open_cache(model, self.binder, rank=self.comm.rank, ranks=self.comm.size)
        fill(decoder, model.path, load_format=model.load_format, seed=model.seed, kept=kept)
        self.decoder = decoder
        runner = Runner(
            device=self.device,
            decoder=decoder,
            buffers=buffers,
            binder=self.binder,
            cache=config.cache,
            scheduler=scheduler,
            model=model,
        )
        if self._tracer:
            runner.compiled = compile_steps(
                self.binder.platform, self._tracer, decoder, runner, scheduler
            )
        if not self._eager:
            scope = recording_scope(self.binder, buffers, scheduler, self.comm.size)
            if scope is not None:
                runner.record(scope)
        return runner

    def _step_tracer(
        self, platform: Platform, scheduler: SchedulerConfig, ranks: int
    ) -> StepTracer | None:
        if self._eager:
            logger.info("enforce_eager: steps run op by op, and none is recorded")
            return None
        return step_tracer(platform, self.device.index, scheduler, ranks)

    def close(self) -> None:
        try:
            self.comm.close()
        finally:
            self.device.close()


def _device_index(platform: Platform, config: EngineConfig, rank: int) -> int:
    """Ranks take devices in turn, from the configured one on; on a host they share the one."""
    indices = [info.index for info in platform.probe().devices]
    if config.platform.device not in indices:  # `resolve` found it, in another process perhaps
        raise PlatformError(
            f"rank {rank} does not see device {config.platform.device} of platform "
            f"{config.platform.name!r}, only {indices}. The platform's process_env must leave the "
            "devices of a rank as the first process sees them, neither hidden nor renumbered.",
            param="device",
        )
    first = indices.index(config.platform.device)
    return indices[(first + rank) % len(indices)]


def _facts(platform: Platform) -> dict[str, str]:
    """What the platform says of itself; an engine starts without it, too."""
    try:
        return dict(platform.describe())
    except Exception as error:  # a vendor's
        return {"describe": f"{type(error).__name__}: {error}"}


def _bindings(binder: OpBinder) -> dict[str, str]:
    """Op → the implementations it is bound to."""
    chosen: dict[str, dict[str, None]] = {}
    for binding in binder.report():
        chosen.setdefault(binding.op, {})[binding.chosen] = None
    return {f"op {op}": ", ".join(names) for op, names in chosen.items()}


class UniExecutor:
    """Everything in this process."""

    def __init__(self, config: EngineConfig) -> None:
        self._rank: Rank | None = Rank(config, GroupSpec())
        self.description: Mapping[str, Any] = self._rank.description

    @property
    def model(self) -> Decoder:
        assert self._rank is not None, "the executor is closed"
        return self._rank.decoder

    @property
    def device(self) -> Device:
        assert self._rank is not None, "the executor is closed"
        return self._rank.device

    def submit(self, plan: StepPlan) -> StepHandle:
        assert self._rank is not None, "the executor is closed"
        return self._rank.runner.submit(plan)

    def close(self) -> None:
        rank, self._rank = self._rank, None
        if rank is not None:
            rank.close()


def open_executor(config: EngineConfig) -> Executor:
    """The executor that the configuration asks for."""
    if config.parallel.tensor_parallel_size == 1:
        return UniExecutor(config)
    try:
        from .executor_group import GroupExecutor  # lazy: msgspec belongs to the server extra
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"tensor_parallel_size > 1 needs {error.name}: pip install '.[server]'.",
            param="tensor_parallel_size",
        ) from None
    return GroupExecutor(config)
