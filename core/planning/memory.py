"""The bytes one rank holds, by building its decoder on tensors without storage."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...platforms.interface import Capabilities, Communicator, PackedWeight, Platform
from ...platforms.ops import DENSE
from ..args import EngineArgs
from ..config import EngineConfig
from ..lengths import Lengths
from ..models.decoder import Decoder
from ..models.layers import VocabEmbedding
from ..models.registry import decoder_spec
from ..models.spec import DecoderSpec
from ..models.step import StepBuffers, StepGroup, make_groups, slot_dtype
from ..models.weights import WeightSource
from ..ops import OpBinder, WeightUse
from ..quantization.scheme import PLAIN, WeightScheme
from ..runner.recorded import recorded_sizes
from ..runner.rows import SLACK, RowTable
from ..sizing import GroupSize


class ShapesOnly:
    """A device whose tensors have a shape and an element type, and nothing in them."""

    def __init__(self) -> None:
        self._allocated: list[tuple[weakref.ref[Tensor], str]] = []

    def alloc(self, shape: Sequence[int], dtype: torch.dtype, *, tag: str) -> Tensor:
        tensor = torch.empty(tuple(shape), dtype=dtype, device="meta")
        self._allocated.append((weakref.ref(tensor), tag))
        return tensor

    def held(self) -> list[tuple[Tensor, str]]:
        """What was allocated and is still referred to, with its tag."""
        found = ((reference(), tag) for reference, tag in self._allocated)
        return [(tensor, tag) for tensor, tag in found if tensor is not None]


class PlannedRank(Communicator):
    """The first rank of a group that is not there: layers only ask it for its place."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def all_reduce(self, tensor: Tensor) -> Tensor:
        raise NotImplementedError("a planned rank computes nothing")

    def all_gather(self, tensor: Tensor, dim: int) -> Tensor:
        raise NotImplementedError("a planned rank computes nothing")

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        raise NotImplementedError("a planned rank computes nothing")

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass


class PackingSizes(OpBinder):
    """Binds through `real`, whose choices it shares, and weighs what the packer would make."""

    def __init__(self, real: OpBinder, device: Any) -> None:
        super().__init__(real.platform, device, quantization=real.quantization)
        self._real = real
        self.packed = 0  # bytes of packed layouts, beside what the device allocated
        self.experts = 0  # bytes of weights that the op `moe` reads, packed or as they are
        self._kept: list[Tensor] = []

    def bind(self, op: str, dtype: torch.dtype, weight_format: str = DENSE, /, **sizes: int) -> Any:
        return self._real.bind(op, dtype, weight_format, **sizes)

    def bind_chain(
        self,
        dtype: torch.dtype,
        *parts: tuple[str, Mapping[str, int]],
        weight_format: str = DENSE,
    ) -> Any:
        return self._real.bind_chain(dtype, *parts, weight_format=weight_format)

    def remark(self, text: str, level: int) -> None:
        self._real.remark(text, level)

    def pack(
        self,
        weight: Tensor,
        reader: Any = None,
        scheme: WeightScheme = PLAIN,
        *,
        largest: Tensor | None = None,
        shared: bool = False,
        use: WeightUse | None = None,
    ) -> PackedWeight:
        shape = (weight.shape[0], weight.shape[1])
        use = use or WeightUse.by_linear(shape)
        format = self.weight_format(scheme, weight.dtype, use)
        packer = self._real.packer(weight.dtype, use, reader, format)
        size = packer.packed_bytes(weight.dtype, shape)
        if size is None and format == DENSE:
            if shared and scheme != PLAIN:
                weight = self.device.alloc(shape, weight.dtype, tag="weights")
            self._kept.append(weight)
            self._count_experts(use, weight.numel() * weight.element_size())
            return PackedWeight(DENSE, shape, (weight,))
        size = scheme.canonical_bytes(shape) if size is None else size
        self.packed += size
        self._count_experts(use, size)
        return PackedWeight("planned", shape, ())

    def _count_experts(self, use: WeightUse, size: int) -> None:
        if use.op == "moe":
            self.experts += size

    def keeps(self, table: Tensor) -> bool:
        """Was this very tensor to be packed, and is read as it is?"""
        return any(weight is table for weight in self._kept)


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes of one rank. `matrices`: linear layers as the platform holds them; `embedding`: its
    table, 0 where rows are looked up in the packed head. `held_once`: one of the two is both.
    `experts`: of `matrices`, what a mixture's experts take; `vectors`: norms and biases."""

    matrices: int
    experts: int
    embedding: int
    vectors: int
    rope: int
    step: int
    rows: int
    held_once: bool
    shapes: dict[str, tuple[int, ...]]
    """Checkpoint tensor → shape in the whole model."""

    @property
    def weights(self) -> int:
        return self.matrices + self.embedding + self.vectors + self.rope

    @property
    def held(self) -> int:
        """All that a rank holds for as long as it lives, beside the cache."""
        return self.weights + self.step + self.rows

    @property
    def read_per_step(self) -> int:
        """Bytes of weights that every step reads: all but a table that is only looked up in."""
        return self.matrices + self.vectors + (self.embedding if self.held_once else 0)


def shape_groups(
    spec: DecoderSpec,
    platform: Platform,
    sizes: Sequence[GroupSize],
    *,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    ranks: int,
) -> list[StepGroup]:
    """Groups with a rank's share of the heads, for layers that are built and never called: they
    only ask a group for its place, so it needs no implementation."""
    groups = []
    nothing: Any = None
    for size in sizes:
        attention = spec.attention_spec(
            size.group, dtype=dtype, kv_dtype=kv_dtype, block_size=size.block_size, ranks=ranks
        )
        slots = slot_dtype(platform, attention)
        groups.append(StepGroup(size.group.layers, attention, nothing, slots))
    return groups


def rank_memory(
    spec: DecoderSpec,
    binder: OpBinder,
    groups: Sequence[StepGroup],
    *,
    dtype: torch.dtype,
    ranks: int,
    max_tokens: int,
    max_model_len: int,
    num_seqs: int,
) -> RankMemory:
    """What the first of `ranks` ranks holds for steps of `max_tokens` and `num_seqs` rows.
    `groups`: new ones, with this rank's share of the heads."""
    device: Any = ShapesOnly()
    packing = PackingSizes(binder, device)
    buffers = StepBuffers(
        device, groups, max_tokens=max_tokens, max_positions=max_model_len + SLACK
    )
    decoder = Decoder(spec, packing, buffers, PlannedRank(ranks), dtype=dtype)
    shapes = {slot.name: slot.shape for slot in decoder.slots()}
    decoder.load(WeightSource(lambda slot, target: None))
    rows = RowTable(device, num_seqs, max_model_len, [g.spec.block_size for g in groups])
    held = device.held()
    del rows
    sizes: Counter[str] = Counter()
    vectors = 0
    for tensor, tag in held:
        sizes[tag] += tensor.numel() * tensor.element_size()
        if tag == "weights" and tensor.dim() == 1:
            vectors += tensor.numel() * tensor.element_size()
    table = decoder.embed.table if isinstance(decoder.embed, VocabEmbedding) else None
    embedding = 0 if table is None else table.numel() * table.element_size()
    rope = (max_model_len + SLACK) * spec.rope.dim * torch.float32.itemsize
    kept = sizes["weights"] - embedding - rope - vectors
    return RankMemory(
        matrices=kept + packing.packed,
        experts=packing.experts,
        embedding=embedding,
        vectors=vectors,
        rope=rope,
        step=sizes["step"],
        rows=sizes["rows"],
        held_once=table is None or packing.keeps(table),
        shapes=shapes,
    )


def planned_tags(config: EngineConfig, binder: OpBinder) -> dict[str, int]:
    """Tag of the allocator → bytes that one rank of this configuration is to hold."""
    model, scheduler, ranks = config.model, config.scheduler, config.parallel.tensor_parallel_size
    spec = decoder_spec(model.hf_config)
    groups = make_groups(spec, binder, config.cache, dtype=model.dtype, ranks=ranks)
    memory = rank_memory(
        spec,
        binder,
        groups,
        dtype=model.dtype,
        ranks=ranks,
        max_tokens=scheduler.step_tokens,
        max_model_len=scheduler.max_model_len,
        num_seqs=scheduler.max_num_seqs,
    )
    kv = sum(
        group.impl.block_bytes(group.spec) * len(group.layers) * cache.num_blocks
        for group, cache in zip(groups, config.cache.groups, strict=True)
    )
    return {"weights": memory.weights, "kv": kv, "step": memory.step, "rows": memory.rows}


def activation_bytes(
    spec: DecoderSpec, dtype: torch.dtype, *, ranks: int, tokens: int, logits: int
) -> int:
    """The most that intermediate tensors of a step of `tokens` take at once, `logits` rows of
    which yield scores: the widest point of a layer (of experts: with its rows sorted by them), or
    the head. What else an implementation takes inside one op is its own matter and not in it."""
    heads, kv_heads = spec.rank_heads(ranks)
    hidden, width, dim = spec.hidden_size, spec.intermediate_size // ranks, spec.head_dim
    # Each time the residual stream and its normed form live on beside the widest point.
    qkv = (heads + 2 * kv_heads) * dim
    attention = 2 * hidden + qkv + (heads + kv_heads) * dim + heads * dim
    widths = [3 * width] if any(one.feed_forward == "gated" for one in spec.layers) else [0]
    if spec.experts is not None:  # the rows of each token, once for every expert it goes through
        widths.append(spec.experts.top_k * (hidden + spec.experts.width // ranks))
    feed_forward = 2 * hidden + max(widths)
    layer = tokens * max(attention, feed_forward) * dtype.itemsize
    # Scores in the model's dtype, then in fp32.
    scores = dtype.itemsize + torch.float32.itemsize if dtype != torch.float32 else dtype.itemsize
    head = tokens * hidden * dtype.itemsize + logits * spec.vocab_size * scores
    return max(layer, head)


def recorded_rows(
    args: EngineArgs, capabilities: Capabilities, lengths: Lengths, ranks: int
) -> int:
    """Rows of the largest step that is recorded; 0: none is (`runner.recorded.recording_scope` may
    find other reasons, which only the device itself can tell)."""
    if args.enforce_eager or ranks > 1 or not capabilities.graph_replay:
        return 0
    return recorded_sizes(lengths.num_seqs, lengths.step_tokens, lengths.token_buckets)[-1]


def recording_bytes(spec: DecoderSpec, dtype: torch.dtype, rows: int) -> int:
    """What recordings of steps of up to `rows` rows hold, beside what other steps take: recordings
    have a pool of memory of their own, in which the largest is made first and all others find
    room."""
    return activation_bytes(spec, dtype, ranks=1, tokens=rows, logits=rows) if rows else 0
