"""What an engine would run with on a device: `resolve`'s choices, from facts alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ...platforms.interface import Finding
from ..args import EngineArgs
from ..dtypes import choose_dtype, choose_kv_dtype, dtype_name
from ..errors import ConfigError
from ..lengths import Lengths, choose_lengths
from .model import ModelFacts
from .targets import Target

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class Settings:
    """What the engine would run with. `context`: tokens of the sequences that batches are planned
    for."""

    dtype: torch.dtype
    kv_dtype: torch.dtype
    quantization: str | None
    ranks: int
    lengths: Lengths
    context: int
    block_size: int | None

    def named(self) -> dict[str, object]:
        return {
            "dtype": dtype_name(self.dtype),
            "kv_cache_dtype": dtype_name(self.kv_dtype),
            "quantization": self.quantization,
            "tensor_parallel_size": self.ranks,
            "max_model_len": self.lengths.max_model_len,
            "max_num_seqs": self.lengths.num_seqs,
            "max_num_batched_tokens": self.lengths.batched_tokens,
            "block_size": self.block_size,
        }


def choose_settings(
    facts: ModelFacts,
    args: EngineArgs,
    target: Target,
    context: int | None,
    fit: Callable[[Settings], int],
) -> Settings:
    """Nothing is opened. `fit`: the longest sequence that memory holds beside such settings.
    Raises ConfigError or PlatformError where `resolve` would."""
    known, name = target.capabilities, target.platform.name
    dtype = choose_dtype(args.dtype, facts.config, known, name)
    kv_dtype = choose_kv_dtype(args.kv_cache_dtype, dtype, known, name)

    def settings(lengths: Lengths) -> Settings:
        length = lengths.max_model_len
        if context is not None and context > length:
            raise ConfigError(
                f"context is {context}, but a sequence has at most {length} tokens here.",
                param="context",
            )
        wanted = context or (DEFAULT_CONTEXT if args.max_model_len is None else length)
        return Settings(
            dtype=dtype,
            kv_dtype=kv_dtype,
            quantization=args.quantization,
            ranks=args.tensor_parallel_size,
            lengths=lengths,
            context=min(length, wanted),
            block_size=args.block_size,
        )

    limits = target.platform.step_limits(dataclasses.asdict(args))
    return settings(
        choose_lengths(
            args, known, limits, facts.max_positions, name, lambda one: fit(settings(one))
        )
    )


def review(args: EngineArgs, settings: Settings, target: Target) -> Sequence[Finding]:
    """The platform's findings on a device that is here. A described one cannot be named to a
    platform, whose answer would be about the card in this machine."""
    if target.present:
        return tuple(target.platform.review(_flat(args, settings)))
    return (Finding("note", "device", "described only, so its platform has not reviewed the plan"),)


def _flat(args: EngineArgs, settings: Settings) -> dict[str, object]:
    """As `resolve.flat_plan` asks a platform about a resolved configuration."""
    named = settings.named()
    if settings.block_size is None:
        named.pop("block_size")
    return dataclasses.asdict(args) | named
