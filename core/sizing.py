"""How large the KV cache is: bytes a token, blocks a group, what fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..platforms.interface import AttentionSpec, KVConstraints, LayerKV, MemoryInfo, Platform
from .config import CacheGroupConfig
from .errors import ConfigError, KVMemoryError, PlatformError
from .models.spec import DecoderSpec, LayerGroup
from .ops import OpBinder

HOST_SHARE = 0.5
"""Most of a host's free memory that a KV cache takes unasked: others live there too."""

HEADROOM = 0.1
"""Share of a device's memory that a KV cache leaves free, however much others hold."""


def readable(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"


@dataclass(frozen=True, slots=True)
class GroupSize:
    """One cache group's figures on one rank. `block_bytes`: of one block in all its layers."""

    group: LayerGroup
    block_size: int
    block_bytes: int

    def blocks_for(self, length: int, chunk: int = 1) -> int:
        """The most blocks that one sequence of `length` tokens holds at once, when it is computed
        in steps of `chunk`: what window + chunk - 1 positions in a row can touch."""
        whole = -(-length // self.block_size)
        window = self.group.sliding_window
        if window is None:
            return whole
        return min(whole, -(-(window + chunk - 2) // self.block_size) + 1)


def measure_groups(
    platform: Platform,
    spec: DecoderSpec,
    *,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    block_size: int | None,
    ranks: int,
    attention_backend: str = "auto",
) -> list[GroupSize]:
    """Each cache group with its block size (the platform's choice where None) and bytes."""
    binder = OpBinder(platform, attention_backend=attention_backend)
    sizes = []
    for group in spec.cache_groups():

        def attention_spec(tokens: int, group: LayerGroup = group) -> AttentionSpec:
            return spec.attention_spec(
                group, dtype=dtype, kv_dtype=kv_dtype, block_size=tokens, ranks=ranks
            )

        def layer_bytes_of(tokens: int) -> int:
            attention = attention_spec(tokens)
            return binder.attention(attention).block_bytes(attention)

        constraints = platform.kv_constraints(attention_spec(block_size or 1))
        chosen = _block_size(block_size, constraints, platform.name, layer_bytes_of)
        layer_bytes = layer_bytes_of(chosen)
        sizes.append(GroupSize(group, chosen, layer_bytes * len(group.layers)))
    return sizes


def _block_size(
    asked: int | None,
    constraints: KVConstraints,
    platform: str,
    layer_bytes_of: Callable[[int], int],
) -> int:
    """Tokens a block: as asked, or the first size from the platform's preferred one on that keeps
    its constraints."""
    multiple, alignment = constraints.block_multiple, constraints.alignment
    first = -(-constraints.preferred_block_size // multiple) * multiple
    sizes = range(first, first + multiple * alignment, multiple) if asked is None else (asked,)
    for size in sizes:
        if size > 0 and size % multiple == 0 and layer_bytes_of(size) % alignment == 0:
            return size
    aligned = f", and its bytes in a layer of {alignment}" if alignment > 1 else ""
    raise ConfigError(
        f"block_size is {asked or first}; on platform {platform!r} it must be a positive multiple "
        f"of {multiple}{aligned}.",
        param="block_size",
    )


def check_alignment(platform: Platform, attention: str, spec: AttentionSpec, kv: LayerKV) -> None:
    """Do blocks lie as `KVConstraints.alignment` asks? `_block_size` knows the bytes of a block
    in a layer, but not into how many regions (keys, values) an implementation splits them."""
    alignment = platform.kv_constraints(spec).alignment
    for number, region in enumerate(kv.regions):
        if region.stride % alignment or region.bytes % alignment:
            raise PlatformError(
                f"Platform {platform.name!r} wants the pieces of KV blocks to be multiples of "
                f"{alignment} bytes, but attention {attention!r} lays out region {number} in "
                f"pieces of {region.bytes} bytes every {region.stride}, with a block_size of "
                f"{spec.block_size} tokens. Use a larger power of two as block_size, or another "
                "attention; the platform can ask for it by KVConstraints.block_multiple.",
                param="block_size",
            )


def sequence_bytes(sizes: Sequence[GroupSize], length: int) -> int:
    """Bytes of the blocks that one sequence of `length` tokens holds at most."""
    return sum(size.blocks_for(length) * size.block_bytes for size in sizes)


def _scratch_bytes(sizes: Sequence[GroupSize]) -> int:
    return sum(size.block_bytes for size in sizes)


def longest_that_fits(sizes: Sequence[GroupSize], budget: int, limit: int) -> int:
    """The longest sequence, at most `limit` tokens, whose blocks fit `budget` bytes; at least 1."""
    low, high = 1, limit
    while low < high:
        middle = (low + high + 1) // 2
        if sequence_bytes(sizes, middle) + _scratch_bytes(sizes) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def _chunk_blocks(size: GroupSize, chunk: int) -> int:
    """Blocks a window group needs beyond its windows, for the prompt that a step computes."""
    return 0 if size.group.sliding_window is None else -(-chunk // size.block_size)


def bytes_for_all(sizes: Sequence[GroupSize], length: int, sequences: int, chunk: int) -> int:
    """What `sequences` sequences of `length` tokens can use at most, in steps of `chunk`."""
    chunks = sum(_chunk_blocks(size, chunk) * size.block_bytes for size in sizes)
    return sequences * sequence_bytes(sizes, length) + _scratch_bytes(sizes) + chunks


def make_cache_groups(
    sizes: Sequence[GroupSize], *, budget: int, length: int, chunk: int, blocks: int | None
) -> tuple[CacheGroupConfig, ...]:
    """Split `budget` bytes over the groups in the proportion in which sequences of `length` use
    them, computed in steps of `chunk` (or give each group exactly `blocks`). KVMemoryError if not
    even one such sequence fits."""
    one = sequence_bytes(sizes, length)
    extra = [_chunk_blocks(size, chunk) for size in sizes]
    if bytes_for_all(sizes, length, 1, chunk) > budget:
        extra = [0] * len(sizes)  # a tight cache computes long prompts in small steps instead
    reserved = sum((more + 1) * size.block_bytes for more, size in zip(extra, sizes, strict=True))
    share = (budget - reserved) / one
    groups = []
    for size, more in zip(sizes, extra, strict=True):
        needed = size.blocks_for(length)
        count = blocks if blocks is not None else int(share * needed) + more + 1
        if count < needed + 1:
            raise KVMemoryError(_does_not_fit(sizes, size, length, budget, blocks))
        groups.append(
            CacheGroupConfig(
                name=size.group.name,
                layers=size.group.layers,
                block_size=size.block_size,
                num_blocks=count,
                sliding_window=size.group.sliding_window,
            )
        )
    return tuple(groups)


def _does_not_fit(
    sizes: Sequence[GroupSize], size: GroupSize, length: int, budget: int, blocks: int | None
) -> str:
    if blocks is not None:
        return (
            f"{blocks} KV blocks (one of them scratch) cannot hold one sequence of {length} tokens"
            f" in group {size.group.name!r}: {size.blocks_for(length) + 1} of {size.block_size} "
            "tokens are needed. Raise --num-gpu-blocks-override or lower --max-model-len."
        )
    needed = sequence_bytes(sizes, length) + _scratch_bytes(sizes)
    fits = longest_that_fits(sizes, budget, length)
    return (
        f"The KV cache of one sequence of {length} tokens needs {readable(needed)}, but "
        f"{readable(max(0, budget))} are available. Lower --max-model-len (about {fits} tokens "
        f"fit), or raise --kv-cache-memory-bytes to at least {needed}."
    )


def default_budget(
    memory: MemoryInfo, held: int, *, share: float, on_host: bool, ranks: int
) -> int:
    """Bytes for one rank's KV cache: what is left of its `share` of the memory beside the `held`
    bytes that all ranks take for other things.

    Of what is free now, 1 - `share` of the whole stays so, HEADROOM at most: for what is not
    counted, and for others on the device. (All of 1 - `share` would leave the second of two
    engines with a share of 0.45 each nothing.) On a host, where all ranks share what is free, at
    most HOST_SHARE of that."""
    if on_host:
        return int((memory.free - held) * min(share, HOST_SHARE)) // ranks
    left = memory.free - memory.total * min(1 - share, HEADROOM)
    return int(min(memory.total * share, left) - held / ranks)


def check_free(wanted: int, free: int) -> None:
    """A host would promise more memory than it has, and end the process when it is used."""
    if wanted > free:
        raise KVMemoryError(
            f"The KV cache needs {readable(wanted)}, but only {readable(free)} of memory are free. "
            "Lower --kv-cache-memory-bytes or --num-gpu-blocks-override."
        )
