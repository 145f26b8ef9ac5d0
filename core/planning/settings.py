"""What an engine would run with on a device: `resolve`'s defaults, from facts alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from ...platforms.interface import Finding
from ..args import EngineArgs, parse_size
from ..dtypes import choose_dtype, choose_kv_dtype, dtype_name
from ..errors import ConfigError
from ..resolve import DEVICE_BATCHED_TOKENS, DEVICE_SEQS, HOST_BATCHED_TOKENS, HOST_SEQS
from .model import ModelFacts
from .targets import Target

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Settings:
    """What the engine would run with: `resolve`'s defaults, without opening or refusing
    anything. Lengths in tokens; `context`: of the sequences that batches are planned for."""

    dtype: torch.dtype
    kv_dtype: torch.dtype
    ranks: int
    max_model_len: int
    num_seqs: int
    batched_tokens: int
    context: int
    block_size: int | None

    def named(self) -> dict[str, object]:
        return {
            "dtype": dtype_name(self.dtype),
            "kv_cache_dtype": dtype_name(self.kv_dtype),
            "tensor_parallel_size": self.ranks,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.num_seqs,
            "max_num_batched_tokens": self.batched_tokens,
            "block_size": self.block_size,
        }


def choose_settings(
    facts: ModelFacts, args: EngineArgs, target: Target, context: int | None
) -> Settings:
    known, name = target.capabilities, target.platform.name
    dtype = choose_dtype(args.dtype, facts.config, known, name)
    on_host = known.unified_memory
    asked = args.max_model_len
    length = facts.max_positions if asked in (None, "auto") else parse_size(asked, "max_model_len")
    if length > facts.max_positions:
        raise ConfigError(
            f"max_model_len is {length}, but the model has {facts.max_positions} positions.",
            param="max_model_len",
        )
    seqs = args.max_num_seqs or (HOST_SEQS if on_host else DEVICE_SEQS)
    tokens = args.max_num_batched_tokens or max(
        HOST_BATCHED_TOKENS if on_host else DEVICE_BATCHED_TOKENS,
        seqs,
        0 if args.enable_chunked_prefill else length,
    )
    limits = target.platform.step_limits(dataclasses.asdict(args))
    bounds = [one for one in (limits.max_tokens, *limits.token_buckets[-1:]) if one is not None]
    return Settings(
        dtype=dtype,
        kv_dtype=choose_kv_dtype(args.kv_cache_dtype, dtype, known, name),
        ranks=args.tensor_parallel_size,
        max_model_len=length,
        num_seqs=seqs,
        batched_tokens=min([tokens, *bounds]),
        context=min(length, context or (DEFAULT_CONTEXT if asked is None else length)),
        block_size=args.block_size,
    )


def review(args: EngineArgs, settings: Settings, target: Target) -> tuple[Finding, ...]:
    """The platform's findings. One that is only described may not answer."""
    try:
        return tuple(target.platform.review(_flat(args, settings)))
    except Exception as error:
        if target.present:
            raise
        # Most platforms ask the device itself, which is not here.
        return (Finding("note", "device", f"not reviewed without the device ({error})"),)


def _flat(args: EngineArgs, settings: Settings) -> dict[str, object]:
    """As `resolve.flat_plan` asks a platform about a resolved configuration."""
    named = settings.named()
    if settings.block_size is None:
        named.pop("block_size")
    return dataclasses.asdict(args) | named
