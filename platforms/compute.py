"""The part of the contract that computes: ops, attention over the paged cache, weight layouts, and
whole steps for devices that compile them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .api import Contract
from .facts import Support

if TYPE_CHECKING:
    from .interface import Device


DENSE = "dense"
"""Format of a weight left as it is: `tensors[0]` is `[out_features, in_features]`."""

INT8 = "int8"
"""Format of a weight in 8 bits, symmetric, with a scale for each output: `codes` int8 `[out, in]`
in [-127, 127] and `scales` fp32 `[out]`; a value is code * scale. A row of zeros has scale 0."""

FP8 = "fp8"
"""Format of a weight in float8 with a scale for each output: `codes` float8_e4m3fn `[out, in]`, all
finite, and `scales` fp32 `[out]`; a value is code * scale. A row of zeros has scale 0. A platform
whose units read another encoding turns the codes into that one."""

INT4 = "int4"
"""Format of a weight in 4 bits, with a scale and a zero for each group of inputs: `codes` uint8
`[out, in]` in 0..15 (one a byte), `scales` fp32 and `zeros` uint8 `[out, in / group]`; a value is
(code - zero) * scale. Weights quantized at load have groups of `ops.int4_group(in)`."""

W4A16 = "w4a16"
"""Format of weights in the form of INT4 that are multiplied by activations as they are: a `linear`
that supports INT4 may round them, one that supports this does not."""

INT4_GROUPS = (128, 64, 32)
"""Inputs in a group of int4 weights quantized at load: the first of these that divides them."""


@dataclass(frozen=True, slots=True)
class OpSignature:
    """What is known of an op's use when the model is built: dtype and the static sizes
    (`in_features`, `out_features`, `head_dim`…), by which an implementation accepts or refuses.
    `weight_format`: the canonical form that the weights which the op reads (`linear`, `moe`) were
    packed from; other than dense only where the platform has a packer for it."""

    op: str
    dtype: torch.dtype
    sizes: Mapping[str, int] = field(default_factory=dict)
    weight_format: str = DENSE


class OpImpl(Contract):
    """One implementation of one op. The call has the signature of the op's reference, and at
    least one token. `recordable`: what it launches depends on shapes alone, so that
    `Device.capture` can record it; False where the host reads what the device computed."""

    op: str
    name: str
    priority: int = 0
    recordable: bool = True

    @abstractmethod
    def supports(self, sig: OpSignature) -> Support: ...

    @abstractmethod
    def __call__(self, *args: Any) -> Any: ...


@dataclass(frozen=True, slots=True)
class Fusion:
    """A vendor's own fused op: `impl` equals running `composition`, standard ops, as a chain.

    The first op of a chain takes the call's first arguments; each later one the result before it,
    and its own remaining arguments from those that follow (see `ops.chain`). So
    `("linear", "silu_mul")` is called as `impl(x, weight, bias)`. Models ask for the chains that
    `ops.CHAINS` lists; `impl.op` is the composition joined by `+`, and the sizes of its signature
    are those of all parts.
    """

    name: str
    composition: tuple[str, ...]
    impl: OpImpl


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One layer's attention. `scale` multiplies q·k; `sliding_window` counts the keys a query
    sees, itself included (None: all); `softcap` 0 is none. `kv_dtype` int8 is a quantized cache,
    whose scales are the implementation's own matter: `block_bytes` and the regions hold them too.
    A float8 (e4m3fn, e5m2; e4m3fnuz where the card has that one) has no scale: keys and values are
    rounded to it, what is beyond its range becomes its largest number, and they are widened to
    `dtype` before anything is computed.

    `alibi_slopes`, one a query head (of this rank's heads, where ranks share them; (): none): a
    score is lowered by slope * |query position - key position| (ALiBi, Press et al. 2022, section
    3), after the softcap and between any two positions, as FlashAttention 2 has it
    (`csrc/flash_attn/src/mask.h`). ValueError where they are not as many as the heads.

    What an implementation does not compute, it refuses by `supports`; it never leaves it out.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    dtype: torch.dtype
    kv_dtype: torch.dtype
    block_size: int
    causal: bool = True
    sliding_window: int | None = None
    softcap: float = 0.0
    alibi_slopes: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.alibi_slopes) not in (0, self.num_heads):
            raise ValueError(
                f"{len(self.alibi_slopes)} ALiBi slopes for {self.num_heads} heads: give each head "
                "of this rank one, or none at all."
            )


@dataclass(slots=True)
class AttentionBatch:
    """The batch of one step for one cache group, as the runner hands it to `plan`.

    Lists are on the host, tensors on the device. Sequence i has queries
    [query_starts[i], query_starts[i+1]) of the packed token axis and, this step included,
    `seq_lens[i]` tokens in the cache; its last query is at position seq_lens[i] - 1.
    `block_tables`: int32 `[seqs, max_blocks]`; entries before a sliding window may be the scratch
    block 0 and must not be read. `slots`: `[tokens]`, block * block_size + offset, in the element
    type that `KVConstraints.slot_dtype` asks for.
    """

    query_starts: list[int]
    seq_lens: list[int]
    block_tables: Tensor
    slots: Tensor


class KVRegion(NamedTuple):
    """A block is one contiguous piece of `tensor` per region: `tensor[block]`, `stride` bytes
    from one block to the next, `bytes` long. Of a type that torch fills and copies by index; that
    is not so of float8, whose region is its bytes."""

    tensor: Tensor
    stride: int
    bytes: int


class LayerKV(NamedTuple):
    """The cache of one layer as an attention implementation laid it out.

    `tensors` are what the implementation reads; `regions` how blocks are moved; a block is zeroed
    by filling its regions with 0.
    """

    tensors: tuple[Tensor, ...]
    regions: tuple[KVRegion, ...]


class AttentionImpl(Contract):
    """Paged attention over mixed prefill and decode. Stateless between steps. `layout` names the
    cache's layout, for devices whose `KVConstraints` take only some."""

    name: str
    priority: int = 0
    layout: str = "own"

    @abstractmethod
    def supports(self, spec: AttentionSpec) -> Support: ...

    @abstractmethod
    def alloc(self, device: Device, spec: AttentionSpec, num_blocks: int) -> LayerKV:
        """Allocate one layer's cache, zeroed, through `device.alloc_kv`."""

    @abstractmethod
    def block_bytes(self, spec: AttentionSpec) -> int:
        """Bytes one block takes in one layer."""

    @abstractmethod
    def plan(self, spec: AttentionSpec, batch: AttentionBatch) -> Any:
        """Per-step metadata, made once and used by every layer of the group."""

    def plan_recorded(self, spec: AttentionSpec, block_tables: Tensor, seq_lens: Tensor) -> Any:
        """As `plan`, of sequences with one query each, by what is on the device alone:
        `block_tables` int32 `[seqs, max_blocks]`, `seq_lens` int32 `[seqs]`, this step included and
        at most max_blocks * block_size. It runs inside `Device.capture`, and what it returns serves
        `run` and a compiled step there: neither may depend on values. None: it cannot, and steps
        are not recorded."""
        return None

    @abstractmethod
    def write(self, key: Tensor, value: Tensor, kv: LayerKV, slots: Tensor) -> None:
        """Store `[tokens, kv_heads, head_dim]` keys and values at `slots` (the kv_write op)."""

    @abstractmethod
    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Any) -> Tensor:
        """Attend `[tokens, heads, head_dim]` queries to the cache (already written for this
        step); returns the same shape and dtype."""

    @abstractmethod
    def export_blocks(self, kv: LayerKV, spec: AttentionSpec, blocks: Tensor) -> Tensor:
        """The blocks (ids, int64 `[n]`, on the device) in the canonical form, a new tensor
        `[2, n, block_size, kv_heads, head_dim]`, keys first, in `spec.kv_dtype`; of a quantized
        cache the values that its codes stand for, in fp32."""

    @abstractmethod
    def import_blocks(
        self, kv: LayerKV, spec: AttentionSpec, blocks: Tensor, canonical: Tensor
    ) -> None:
        """Overwrite the blocks with what `export_blocks` gave, here or on another platform; what
        is quantized again may be off by a rounding of fp32."""


@dataclass(frozen=True, slots=True, weakref_slot=True)
class PackedWeight:
    """A linear layer's weight in a platform's own layout; `tensors` (or a library's own objects)
    belong to `format`'s packer. `shape` is (out_features, in_features). `extra_bytes`: memory that
    it holds beside the canonical tensors it was made from and the device's own allocations; with
    those it is what the packer's `packed_bytes` says."""

    format: str
    shape: tuple[int, int]
    tensors: tuple[Any, ...]
    extra_bytes: int = 0


class WeightPacker(Contract):
    """Turns canonical tensors (for `dense`: `weight`, `[out, in]`; for quantized weights what
    their format names) into a layout that every `linear` of the same platform reads which supports
    that `OpSignature.weight_format`; the dense one is read by `embed_packed`, too. `format` names
    the canonical form it takes. `layout`: name and version of the layout where packed weights are
    plain tensors, which may be kept in a file and given back at another start; empty: they are
    not."""

    format: str
    layout: str = ""

    @abstractmethod
    def pack(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedWeight: ...

    def packed_bytes(self, dtype: torch.dtype, shape: tuple[int, int]) -> int | None:
        """What a weight `[out, in]` of `dtype` takes once packed; None: it is kept as it is, so
        that a table which serves twice (tied embeddings) is held once. (One that is packed is held
        once where the platform has an `embed_packed`.) Of a quantized format `dtype` is what the
        layer computes in."""
        return None


# ---------------------------------------------------------------------------------------------
# A whole step, for devices that compile one
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Value:
    """Output number `position` of node number `node`."""

    node: int
    position: int = 0


@dataclass(frozen=True, slots=True)
class View:
    """A strided view of a value; sizes, strides and offset count elements of the value laid out
    contiguously, from its first one."""

    base: Value
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True, eq=False)
class StepInput:
    """The first tokens of a persistent tensor `[..., max_tokens]` (token ids, positions, slots), as
    many of its last dimension as the step being run has: `tensor[..., :num_tokens]`. Its address
    and strides stay, and so may be compiled in; its content is another in each step."""

    tensor: Tensor


@dataclass(frozen=True, slots=True)
class StepMetadata:
    """What `AttentionImpl.plan` returned for cache group `group` in the step being run."""

    group: int


class Output(NamedTuple):
    """What a node makes."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class StepNode:
    """One call of an op: a name of `ops.OPS`, a chain of them joined by `+`, `attention` or
    `kv_write`. `call` is the implementation the op is bound to. `arguments`: `Value`, `View`,
    `StepInput` and `StepMetadata` stand for what they say; all else is constant: weights, packed
    weights, numbers, and a layer's cache, whose address stays while its content changes."""

    op: str
    call: Callable[..., Any]
    arguments: tuple[Any, ...]
    outputs: tuple[Output, ...]


@dataclass(frozen=True, slots=True)
class StepGraph:
    """The forward of one step, from the token ids in the step buffers to the hidden states
    `result`, `[num_tokens, hidden]`. Nodes in an order that runs.

    The step has exactly `num_tokens` tokens; or, where `any_size`, any number of them from 1 on.
    Then `num_tokens` is only that of the example which was traced: the first dimension of every
    output and of every view counts tokens, and nothing else depends on their number, neither the
    strides nor the offset of a view.
    """

    num_tokens: int
    nodes: tuple[StepNode, ...]
    result: Value | View
    any_size: bool = False


StepFn = Callable[[Sequence[Any], int], Tensor]
"""A compiled step: takes the metadata of each cache group and the number of tokens (that of its
graph, unless the graph is for any size), returns the hidden states. It is called inside a launch,
where what it returns is read: the next call may use the same memory again."""
