"""`resolve(args)`: every default of an engine decided once, with the reasons logged."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch

from ..platforms.interface import Capabilities, Finding, MemoryInfo, Platform, StepLimits
from .args import parse_size
from .config import (
    CacheConfig,
    EngineArgs,
    EngineConfig,
    ModelSpec,
    ParallelConfig,
    PlatformChoice,
    SchedulerConfig,
)
from .dtypes import choose_dtype, choose_kv_dtype, dtype_name
from .errors import ConfigError, PlatformError
from .lengths import Lengths, choose_lengths
from .model_files import read_generation, read_hf_config, resolve_model_path
from .models.registry import decoder_spec
from .models.spec import DecoderSpec
from .ops import OpBinder
from .planning.memory import (
    activation_bytes,
    rank_memory,
    recorded_rows,
    recording_bytes,
    shape_groups,
)
from .platform import make_platform
from .sizing import (
    GroupSize,
    bytes_for_all,
    check_free,
    default_budget,
    longest_that_fits,
    make_cache_groups,
    measure_groups,
    readable,
)

__all__ = ["resolve", "resolve_model_path"]

logger = logging.getLogger("trimaran.resolve")


def resolve(args: EngineArgs) -> EngineConfig:
    """The configuration to run with. Raises ConfigError, ModelLoadError, KVMemoryError or
    PlatformError, each naming what to change."""
    platform = make_platform(args.platform)
    config = _Resolution(args, platform).config()
    adjusted = _review(args, config, platform)
    return _Resolution(adjusted, platform).config() if adjusted != args else config


def objections(args: EngineArgs) -> Sequence[Finding]:
    """What the platform says of an engine with these arguments. Raises as `resolve` does."""
    platform = make_platform(args.platform)
    return platform.review(flat_plan(args, _Resolution(args, platform).config()))


def _review(args: EngineArgs, config: EngineConfig, platform: Platform) -> EngineArgs:
    """The platform's findings on the resolved plan, applied to the arguments by us."""
    for finding in platform.review(flat_plan(args, config)):
        if finding.kind == "reject":
            raise ConfigError(
                f"Platform {platform.name!r} rejects {finding.field}: {finding.reason}",
                param=finding.field,
            )
        if finding.kind == "adjust":
            if finding.field not in {field.name for field in dataclasses.fields(args)}:
                raise PlatformError(
                    f"Platform {platform.name!r} adjusts {finding.field!r}, which is no argument."
                )
            logger.info("%s=%s: %s", finding.field, finding.value, finding.reason)
            args = dataclasses.replace(args, **{finding.field: finding.value})
        else:
            logger.warning("%s: %s", finding.field, finding.reason)
    return args


def flat_plan(args: EngineArgs, config: EngineConfig) -> dict[str, Any]:
    """What platforms are asked about: the arguments by name, with resolved values in place."""
    return dataclasses.asdict(args) | {
        "dtype": dtype_name(config.model.dtype),
        "kv_cache_dtype": dtype_name(config.cache.dtype),
        "max_model_len": config.model.max_model_len,
        "max_num_seqs": config.scheduler.max_num_seqs,
        "max_num_batched_tokens": config.scheduler.max_num_batched_tokens,
        "block_size": config.cache.groups[0].block_size,
    }


class _Resolution:
    """One pass over the arguments; every method decides one thing."""

    def __init__(self, args: EngineArgs, platform: Platform) -> None:
        self._args = args
        self._platform = platform
        self._capabilities: Capabilities = platform.capabilities(args.device)
        self._path = resolve_model_path(args.model, args.revision)
        self._hf_config = read_hf_config(self._path, args.hf_overrides)
        self._spec: DecoderSpec = decoder_spec(self._hf_config)
        self._ranks = self._check_ranks()

    def config(self) -> EngineConfig:
        args = self._args
        name, known = self._platform.name, self._capabilities
        dtype = choose_dtype(args.dtype, self._hf_config, known, name)
        kv_dtype = choose_kv_dtype(args.kv_cache_dtype, dtype, known, name)
        lengths = self._lengths(dtype, kv_dtype)
        cache = self._cache(dtype, kv_dtype, lengths)
        return EngineConfig(
            model=self._model(dtype, lengths.max_model_len),
            cache=cache,
            scheduler=self._scheduler(lengths),
            parallel=ParallelConfig(
                tensor_parallel_size=self._ranks,
                step_timeout=args.step_timeout,
                low_latency_collectives=args.low_latency_collectives,
            ),
            platform=PlatformChoice(
                # A class named by `module:Class` need not be installed under its name.
                name=args.platform if ":" in args.platform else self._platform.name,
                device=args.device,
                num_threads=self._threads(),
                enforce_eager=args.enforce_eager,
            ),
        )

    # -- model ---------------------------------------------------------------------------------

    def _model(self, dtype: torch.dtype, max_model_len: int) -> ModelSpec:
        args = self._args
        generation, eos_ids = read_generation(
            self._path, args.generation_config, args.override_generation_config, self._hf_config
        )
        tokenizer = args.tokenizer
        return ModelSpec(
            path=self._path,
            name=args.served_model_name[0] if args.served_model_name else args.model,
            hf_config=self._hf_config,
            dtype=dtype,
            max_model_len=max_model_len,
            vocab_size=self._spec.vocab_size,
            tokenizer_path=resolve_model_path(tokenizer, None) if tokenizer else self._path,
            generation=generation,
            eos_token_ids=eos_ids,
            load_format=args.load_format,
            packed_cache=args.packed_cache,
            quantization=args.quantization,
            attention_backend=args.attention_backend,
            seed=args.seed,
            max_logprobs=args.max_logprobs,
            logprobs_mode=args.logprobs_mode,
        )

    # -- parallel group ------------------------------------------------------------------------

    def _check_ranks(self) -> int:
        ranks, device = self._args.tensor_parallel_size, self._args.device
        self._spec.rank_heads(ranks)
        name, devices = self._platform.name, self._platform.probe().devices
        if device not in [info.index for info in devices]:
            raise ConfigError(
                f"Platform {name!r} has {len(devices)} devices; device {device} is none of them.",
                param="device",
            )
        if ranks > len(devices) and not self._capabilities.unified_memory:
            raise ConfigError(
                f"tensor_parallel_size is {ranks}, but platform {name!r} has {len(devices)} "
                "devices.",
                param="tensor_parallel_size",
            )
        return ranks

    def _threads(self) -> int | None:
        """Threads of each rank: as asked, or what the platform would give a worker process."""
        if self._args.num_threads is not None or self._ranks == 1:
            return self._args.num_threads
        plan = {"tensor_parallel_size": self._ranks, "num_threads": None}
        threads = self._platform.process_env(0, plan).get("OMP_NUM_THREADS", "")
        return int(threads) if threads.isdigit() else None

    # -- lengths and limits --------------------------------------------------------------------

    @property
    def _on_host(self) -> bool:
        """Does the device share the host's memory, and so must leave some to others?"""
        return self._capabilities.unified_memory

    def _lengths(self, dtype: torch.dtype, kv_dtype: torch.dtype) -> Lengths:
        def fit(longest: Lengths) -> int:
            budget = self._budget(dtype, kv_dtype, longest)
            return longest_that_fits(self._measure(dtype, kv_dtype), budget, longest.max_model_len)

        positions, name = self._spec.max_positions, self._platform.name
        return choose_lengths(self._args, self._capabilities, self._limits, positions, name, fit)

    def _scheduler(self, lengths: Lengths) -> SchedulerConfig:
        args = self._args
        run_ahead = self._capabilities.run_ahead
        if args.async_scheduling == "off":
            run_ahead = 0
        elif args.async_scheduling == "on" and run_ahead == 0:
            logger.warning(
                "async_scheduling=on has no effect: launches on platform %s are synchronous",
                self._platform.name,
            )
        return SchedulerConfig(
            max_model_len=lengths.max_model_len,
            max_num_seqs=lengths.num_seqs,
            max_num_batched_tokens=lengths.batched_tokens,
            policy=args.scheduling_policy,
            enable_chunked_prefill=args.enable_chunked_prefill,
            long_prefill_token_threshold=args.long_prefill_token_threshold,
            max_num_queued_reqs=args.max_num_queued_reqs,
            max_num_queued_tokens=args.max_num_queued_tokens,
            run_ahead=run_ahead,
            mixed_batches=self._limits.mixed_batches,
            token_buckets=lengths.token_buckets,
        )

    # -- KV cache ------------------------------------------------------------------------------

    def _measure(self, dtype: torch.dtype, kv_dtype: torch.dtype) -> list[GroupSize]:
        return measure_groups(
            self._platform,
            self._spec,
            dtype=dtype,
            kv_dtype=kv_dtype,
            block_size=self._args.block_size,
            ranks=self._ranks,
            attention_backend=self._args.attention_backend,
        )

    def _cache(self, dtype: torch.dtype, kv_dtype: torch.dtype, lengths: Lengths) -> CacheConfig:
        args, length, chunk = self._args, lengths.max_model_len, lengths.batched_tokens
        sizes = self._measure(dtype, kv_dtype)
        budget = self._budget(dtype, kv_dtype, lengths)
        if args.kv_cache_memory_bytes is None:
            budget = min(budget, bytes_for_all(sizes, length, lengths.num_seqs, chunk))
        groups = make_cache_groups(
            sizes,
            budget=budget,
            length=length,
            chunk=chunk,
            blocks=args.num_gpu_blocks_override,
        )
        total = sum(g.num_blocks * s.block_bytes for g, s in zip(groups, sizes, strict=True))
        check_free(total * (self._ranks if self._on_host else 1), self._memory.free)
        logger.info(
            "KV cache: %s a rank, %s",
            readable(total),
            "; ".join(f"{g.name}: {g.num_blocks} blocks of {g.block_size} tokens" for g in groups),
        )
        return CacheConfig(
            groups=groups, dtype=kv_dtype, enable_prefix_caching=args.enable_prefix_caching
        )

    def _budget(self, dtype: torch.dtype, kv_dtype: torch.dtype, lengths: Lengths) -> int:
        """Bytes one rank's KV cache may take beside all else that a rank of such lengths holds."""
        args = self._args
        if args.kv_cache_memory_bytes is not None:
            return parse_size(args.kv_cache_memory_bytes, "kv_cache_memory_bytes")
        return default_budget(
            self._memory,
            self._held(dtype, kv_dtype, lengths) * self._ranks,
            share=args.gpu_memory_utilization,
            on_host=self._on_host,
            ranks=self._ranks,
        )

    def _held(self, dtype: torch.dtype, kv_dtype: torch.dtype, lengths: Lengths) -> int:
        """Bytes of one rank's weights, buffers, activations at their widest, and recordings."""
        groups = shape_groups(
            self._spec,
            self._platform,
            self._measure(dtype, kv_dtype),
            dtype=dtype,
            kv_dtype=kv_dtype,
            ranks=self._ranks,
        )
        memory = rank_memory(
            self._spec,
            OpBinder(self._platform, quantization=self._args.quantization),
            groups,
            dtype=dtype,
            ranks=self._ranks,
            max_tokens=lengths.step_tokens,
            max_model_len=lengths.max_model_len,
            num_seqs=lengths.num_seqs,
        )
        activations = activation_bytes(
            self._spec,
            dtype,
            ranks=self._ranks,
            tokens=lengths.step_tokens,
            logits=lengths.num_seqs,
        )
        rows = recorded_rows(self._args, self._capabilities, lengths, self._ranks)
        return memory.held + activations + recording_bytes(self._spec, dtype, rows)

    @functools.cached_property
    def _limits(self) -> StepLimits:
        return self._platform.step_limits(dataclasses.asdict(self._args))

    @functools.cached_property
    def _memory(self) -> MemoryInfo:
        device = self._platform.open(self._args.device, self._args.num_threads)
        try:
            return device.memory()
        finally:
            device.close()
