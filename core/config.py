"""Configuration: what the user asks (`EngineArgs`, see `args`) and what the engine runs with.

Every class here is frozen. `core.resolve.resolve(args)` decides every default once and returns
new objects; nothing is changed afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .args import DEFAULT_MODEL, EngineArgs, ServerArgs, flag_fields, option
from .model_info import ModelInfo

__all__ = [
    "DEFAULT_MODEL",
    "CacheConfig",
    "CacheGroupConfig",
    "EngineArgs",
    "EngineConfig",
    "ModelSpec",
    "ParallelConfig",
    "PlatformChoice",
    "SchedulerConfig",
    "ServerArgs",
    "flag_fields",
    "option",
]


@dataclass(frozen=True, kw_only=True)
class ModelSpec(ModelInfo):
    """The model to run. `hf_config` is config.json after overrides; `packed_cache`: see
    `EngineArgs`."""

    hf_config: dict[str, Any]
    dtype: torch.dtype
    load_format: str
    packed_cache: str = "off"


@dataclass(frozen=True, kw_only=True)
class CacheGroupConfig:
    """One cache group: layers that share block tables. `num_blocks` counts the scratch block."""

    name: str
    layers: tuple[int, ...]
    block_size: int
    num_blocks: int
    sliding_window: int | None = None


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """The KV cache: groups, element type, and whether prefixes are reused."""

    groups: tuple[CacheGroupConfig, ...]
    dtype: torch.dtype
    enable_prefix_caching: bool = True


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits of the scheduler; `run_ahead` is the number of steps in flight beyond the current;
    `mixed_batches` False keeps steps that compute prompts apart from steps that decode;
    `token_buckets`: the sizes that steps are padded to, rising (empty: any size), of which the
    last holds `max_num_batched_tokens`."""

    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    policy: str = "fcfs"
    enable_chunked_prefill: bool = True
    long_prefill_token_threshold: int = 0
    max_num_queued_reqs: int = 4096
    max_num_queued_tokens: int = 8_388_608
    run_ahead: int = 0
    mixed_batches: bool = True
    token_buckets: tuple[int, ...] = ()

    @property
    def step_tokens(self) -> int:
        """Tokens that buffers must have room for: a step's, with its padding."""
        return max(self.max_num_batched_tokens, self.max_num_seqs, *self.token_buckets)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """The parallel group this engine spans; its other ranks are ended when one of them takes
    longer than `step_timeout` seconds for a step."""

    tensor_parallel_size: int = 1
    step_timeout: float = EngineArgs.step_timeout
    low_latency_collectives: bool = False


@dataclass(frozen=True, kw_only=True)
class PlatformChoice:
    """The platform, device and thread count that were resolved. `enforce_eager`: steps are neither
    compiled nor recorded."""

    name: str
    device: int = 0
    num_threads: int | None = None
    enforce_eager: bool = False


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Everything one engine runs with; made by `resolve`, never changed."""

    model: ModelSpec
    cache: CacheConfig
    scheduler: SchedulerConfig
    parallel: ParallelConfig
    platform: PlatformChoice
