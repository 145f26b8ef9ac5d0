"""How long sequences are and how much a step holds: as asked, or defaults within the platform's
limits. Pure, so that an engine (`resolve`) and a plan for a device that is not here agree."""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable
from dataclasses import dataclass

from ..platforms.interface import Capabilities, StepLimits
from .args import EngineArgs, parse_size
from .errors import ConfigError, PlatformError

logger = logging.getLogger("trimaran.resolve")

HOST_SEQS, DEVICE_SEQS = 64, 256
HOST_BATCHED_TOKENS, DEVICE_BATCHED_TOKENS = 2048, 8192


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a sequence and of a step at most, sequences at once, and the sizes that steps are
    padded to (empty: any), the last of them the first that holds `batched_tokens`."""

    max_model_len: int
    batched_tokens: int
    num_seqs: int
    token_buckets: tuple[int, ...] = ()

    @property
    def step_tokens(self) -> int:
        """Tokens that buffers must have room for: a step's, with its padding."""
        return max(self.batched_tokens, self.num_seqs, *self.token_buckets)


def choose_lengths(
    args: EngineArgs,
    capabilities: Capabilities,
    limits: StepLimits,
    positions: int,
    platform: str,
    fit: Callable[[Lengths], int],
) -> Lengths:
    """`positions`: those of the model, tokens. `fit`: the longest sequence that memory holds
    beside all that an engine of such lengths takes; asked for `max_model_len="auto"` alone.
    Raises ConfigError naming the argument, or PlatformError for limits that make no sense."""
    return _Choice(args, capabilities, limits, platform).lengths(positions, fit)


class _Choice:
    def __init__(
        self, args: EngineArgs, capabilities: Capabilities, limits: StepLimits, platform: str
    ) -> None:
        self._args = args
        self._on_host = capabilities.unified_memory
        self._most = limits.max_tokens
        self._buckets = tuple(sorted(set(limits.token_buckets)))
        self._platform = platform
        if self._buckets and self._buckets[0] < 1:
            raise PlatformError(
                f"Platform {platform!r} has a token bucket of {self._buckets[0]} tokens."
            )
        if self._most is not None and self._most < 1:
            raise PlatformError(f"Platform {platform!r} takes {self._most} tokens a step.")

    def lengths(self, positions: int, fit: Callable[[Lengths], int]) -> Lengths:
        self._check_asked()
        num_seqs = self._num_seqs()
        asked = self._args.max_model_len
        if asked is None:
            length = positions
        elif asked == "auto":
            tokens = self._limited(max(self._wanted_tokens(), num_seqs))
            length = fit(Lengths(positions, tokens, num_seqs, self._reached(tokens)))
            logger.info("max_model_len=%d of %d: what memory holds", length, positions)
        else:
            length = parse_size(asked, "max_model_len")
            if length > positions:
                raise ConfigError(
                    f"max_model_len is {length}, but the model has {positions} positions. Lower it "
                    "(or change the model's rope scaling by --hf-overrides).",
                    param="max_model_len",
                )
        tokens = self._batched_tokens(length, num_seqs)
        return Lengths(length, tokens, num_seqs, self._reached(tokens))

    def _check_asked(self) -> None:
        """No sequence may be asked for that a step has no room for; nor a step without a bucket."""
        args, largest = self._args, self._buckets[-1:]
        for name in ("max_num_batched_tokens", "max_num_seqs"):
            if largest and (getattr(args, name) or 0) > largest[0]:
                raise ConfigError(
                    f"{name} is {getattr(args, name)}, but platform {self._platform!r} pads each "
                    f"step to one of {self._buckets} tokens: it can be {largest[0]} at most.",
                    param=name,
                )
        if self._most is not None and (args.max_num_seqs or 0) > self._most:
            raise ConfigError(
                f"max_num_seqs is {args.max_num_seqs}, but platform {self._platform!r} takes "
                f"{self._most} tokens a step: it can be {self._most} at most.",
                param="max_num_seqs",
            )

    def _num_seqs(self) -> int:
        """As asked, or as many as every step has a token for."""
        default = HOST_SEQS if self._on_host else DEVICE_SEQS
        bounds = (self._args.max_num_batched_tokens, self._most, *self._buckets[-1:])
        return self._args.max_num_seqs or min([default, *(b for b in bounds if b is not None)])

    def _wanted_tokens(self) -> int:
        default = HOST_BATCHED_TOKENS if self._on_host else DEVICE_BATCHED_TOKENS
        return self._args.max_num_batched_tokens or default

    def _batched_tokens(self, length: int, num_seqs: int) -> int:
        args, tokens = self._args, self._wanted_tokens()
        if args.max_num_batched_tokens is None:
            tokens = max(tokens, num_seqs, 0 if args.enable_chunked_prefill else length)
        tokens = self._limited(tokens)
        if tokens < num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens is {tokens}, but every one of max_num_seqs={num_seqs} "
                "sequences takes a token of each step. Raise the one or lower the other.",
                param="max_num_batched_tokens",
            )
        if not args.enable_chunked_prefill and tokens < length:
            raise ConfigError(
                f"Without chunked prefill a prompt of max_model_len={length} tokens has to fit "
                f"one step, but max_num_batched_tokens is {tokens}.",
                param="max_num_batched_tokens",
            )
        return tokens

    def _limited(self, tokens: int) -> int:
        """Tokens of a step, within the platform's limits."""
        if self._most is not None and self._most < tokens:
            logger.info("max_num_batched_tokens=%d: the platform's limit", self._most)
            tokens = self._most
        if self._buckets and self._buckets[-1] < tokens:
            tokens = self._buckets[-1]
            logger.info("max_num_batched_tokens=%d: the platform's largest bucket", tokens)
        return tokens

    def _reached(self, tokens: int) -> tuple[int, ...]:
        """The buckets that steps of at most `tokens` are padded to."""
        return self._buckets[: bisect.bisect_left(self._buckets, tokens) + 1]
