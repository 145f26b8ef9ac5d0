"""The layers of the decoder, each one rank's share of a parallel group.

Linear layers are split by columns (outputs) or rows (inputs, whose partial sums are reduced);
embedding and head by vocabulary (Megatron-LM, arXiv:1909.08053, section 3). With a group of one
the same code holds everything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...platforms.interface import DENSE, Communicator, LayerKV, PackedWeight
from ..errors import ModelLoadError
from ..ops import OpBinder, WeightUse
from ..quantization.codes import NotFiniteError, largest_of_rows
from ..quantization.scheme import PLAIN, WeightScheme
from .spec import DecoderSpec
from .step import StepBuffers
from .weights import Layer, Read, WeightSlot, WeightSource


@dataclass(frozen=True, slots=True)
class BuildContext:
    """What a layer is built with. `cos_sin`: the rope table, fp32 `[positions, rope dim]`."""

    spec: DecoderSpec
    binder: OpBinder
    buffers: StepBuffers
    comm: Communicator
    dtype: torch.dtype
    cos_sin: Tensor

    def alloc(self, *shape: int) -> Tensor:
        return self.binder.device.alloc(shape, self.dtype, tag="weights")

    def bind(self, op: str, weight_format: str = DENSE, /, **sizes: int) -> Callable[..., Any]:
        return self.binder.bind(op, self.dtype, weight_format, **sizes)


class Linear(Layer):
    """`x @ weight.T + bias` through the bound op; how weights fill it is the subclass's matter.

    `use`: another op that reads the weight, and gets it by `packed`; then the layer itself is not
    called. `scheme`: how the weight is quantized, where that is not the binder's choice.
    """

    is_head = False

    def __init__(
        self,
        context: BuildContext,
        in_features: int,
        out_features: int,
        use: WeightUse | None = None,
        scheme: WeightScheme | None = None,
    ) -> None:
        self._context = context
        self._in_features, self._out_features = in_features, out_features
        self._use = use or WeightUse.by_linear((out_features, in_features))
        self._scheme = scheme or context.binder.scheme(in_features, head=self.is_head)
        self._format = context.binder.weight_format(self._scheme, context.dtype, self._use)
        self._op = context.bind(self._use.op, self._format, **self._use.sizes)
        self._packed: PackedWeight | None = None
        self._bias: Tensor | None = None

    @property
    def packed(self) -> PackedWeight:
        """The weight as its op reads it, after `load`."""
        assert self._packed is not None, "load comes before the first forward"
        return self._packed

    def _origin(self, row: int) -> tuple[str, int]:
        """The tensor of the checkpoint that a row of the weight comes from, and its row there."""
        raise NotImplementedError

    def _plain(self) -> Tensor:
        """`[out, in]`, to be filled and packed."""
        return self._context.alloc(self._out_features, self._in_features)

    def _restore(self, source: WeightSource) -> bool:
        """Take the packed weight of an earlier start, where one is kept."""
        if source.kept is not None:
            shape = (self._out_features, self._in_features)
            self._packed = source.kept.get(self._origin(0)[0], shape)
        return self._packed is not None

    def _pack(
        self,
        plain: Tensor,
        source: WeightSource,
        *,
        largest: Tensor | None = None,
        shared: bool = False,
    ) -> None:
        """See `OpBinder.pack`."""
        try:
            self._packed = self._context.binder.pack(
                plain, self._op, self._scheme, largest=largest, shared=shared, use=self._use
            )
        except NotFiniteError as error:
            name, row = self._origin(error.row)
            raise ModelLoadError(
                f"row {row} of {name} holds a NaN or an infinity: such a weight cannot be "
                "quantized. Leave --quantization out, or mend the checkpoint."
            ) from None
        if source.kept is not None:
            source.kept.add(self._origin(0)[0], self._packed)


class Part(NamedTuple):
    """One projection of a merged linear: rows [start, stop) of its `out_features` are ours."""

    name: str
    out_features: int
    start: int
    stop: int

    def weight(self, in_features: int) -> WeightSlot:
        shape = (self.out_features, in_features)
        return WeightSlot(f"{self.name}.weight", shape, self.start, self.stop)

    def bias(self) -> WeightSlot:
        return WeightSlot(f"{self.name}.bias", (self.out_features,), self.start, self.stop)

    @classmethod
    def of_rank(cls, name: str, out_features: int, comm: Communicator) -> Part:
        width = out_features // comm.size
        return cls(name, out_features, comm.rank * width, (comm.rank + 1) * width)


class ColumnLinear(Linear):
    """Projections of one input, merged: `[tokens, in]` → `[tokens, sum of our parts]`.

    `then`: an op on the result alone, which a platform may have fused with the product.
    """

    def __init__(
        self,
        context: BuildContext,
        in_features: int,
        parts: Sequence[Part],
        *,
        bias: bool,
        then: tuple[str, Mapping[str, int]] | None = None,
        use: WeightUse | None = None,
        scheme: WeightScheme | None = None,
    ) -> None:
        self._parts = tuple(parts)
        out_features = sum(part.stop - part.start for part in parts)
        super().__init__(context, in_features, out_features, use, scheme)
        if then is not None:
            sizes = {"in_features": in_features, "out_features": out_features}
            self._op = context.binder.bind_chain(
                context.dtype, ("linear", sizes), then, weight_format=self._format
            )
        if bias:
            self._bias = context.alloc(out_features)

    def slots(self) -> Iterator[WeightSlot]:
        for part in self._parts:
            yield part.weight(self._in_features)
            if self._bias is not None:
                yield part.bias()

    def load(self, source: WeightSource) -> None:
        plain, row = None if self._restore(source) else self._plain(), 0
        for part in self._parts:
            rows = slice(row, row + part.stop - part.start)
            if plain is not None:
                source.read(part.weight(self._in_features), plain[rows])
            if self._bias is not None:
                source.read(part.bias(), self._bias[rows])
            row = rows.stop
        if plain is not None:
            self._pack(plain, source)

    def _origin(self, row: int) -> tuple[str, int]:
        for part in self._parts:
            if row < part.stop - part.start:
                return f"{part.name}.weight", part.start + row
            row -= part.stop - part.start
        raise IndexError(row)

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._op(hidden, self._packed, self._bias)


class RowLinear(Linear):
    """This rank's inputs `[tokens, in / ranks]` → the group's sum `[tokens, sum of all parts]`.
    Each of the projections `names` has `part_features` outputs."""

    def __init__(
        self,
        context: BuildContext,
        names: Sequence[str],
        in_features: int,
        part_features: int,
        *,
        bias: bool,
        use: WeightUse | None = None,
        scheme: WeightScheme | None = None,
    ) -> None:
        self._comm = context.comm
        self._names, self._part_features = tuple(names), part_features
        share = in_features // self._comm.size
        super().__init__(context, share, len(names) * part_features, use, scheme)
        start = self._comm.rank * share
        self._shape = (part_features, in_features)
        self._share = slice(start, start + share)
        # All ranks take a row's one scale, as a single rank would: that wants all of the row.
        self._reads_whole = self._comm.size > 1 and self._scheme.by_row
        self._read = slice(0, in_features) if self._reads_whole else self._share
        self._whole_bias = context.alloc(self._out_features) if bias else None
        # One rank adds the bias, so that the sum has it once.
        self._bias = self._whole_bias if self._comm.rank == 0 else None

    def _weight_slot(self, name: str) -> WeightSlot:
        return WeightSlot(f"{name}.weight", self._shape, self._read.start, self._read.stop, dim=1)

    def _bias_slot(self, name: str) -> WeightSlot:
        return WeightSlot(f"{name}.bias", self._shape[:1], 0, self._part_features)

    def slots(self) -> Iterator[WeightSlot]:
        for name in self._names:
            yield self._weight_slot(name)
            if self._whole_bias is not None:
                yield self._bias_slot(name)

    def load(self, source: WeightSource) -> None:
        if self._whole_bias is not None:
            for name, part in zip(self._names, self._of_parts(self._whole_bias), strict=True):
                source.read(self._bias_slot(name), part)
        if self._restore(source):
            return
        plain, largest = self._plain(), []
        for name, part in zip(self._names, self._of_parts(plain), strict=True):
            slot = self._weight_slot(name)
            if not self._reads_whole:
                source.read(slot, part)
                continue
            whole = self._context.alloc(*slot.shape)
            source.read(slot, whole)
            largest.append(largest_of_rows(whole))
            part.copy_(whole[:, self._share])
            del whole
        self._pack(plain, source, largest=torch.cat(largest) if largest else None)

    def _of_parts(self, stacked: Tensor) -> tuple[Tensor, ...]:
        return stacked.split(self._part_features)

    def _origin(self, row: int) -> tuple[str, int]:
        part, row = divmod(row, self._part_features)
        return f"{self._names[part]}.weight", row

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._comm.all_reduce(self._op(hidden, self._packed, self._bias))


class VocabShare(NamedTuple):
    """One rank's rows of a vocabulary-split table: `rows` from `start`, `filled` of them real.

    Every rank has as many rows, so that logits gather evenly; those past the vocabulary are 0.
    """

    start: int
    rows: int
    filled: int

    @classmethod
    def of_rank(cls, vocab_size: int, comm: Communicator) -> VocabShare:
        rows = -(-vocab_size // comm.size)
        start = comm.rank * rows
        return cls(start, rows, max(0, min(rows, vocab_size - start)))

    def pad(self, table: Tensor) -> Tensor:
        """Zero the rows past the vocabulary."""
        table[self.filled :].zero_()
        return table

    def slots(self, name: str, shape: tuple[int, int]) -> Iterator[WeightSlot]:
        """The one of a table `[vocab, hidden]`; none where its rows are all of other ranks."""
        if self.filled:
            yield WeightSlot(f"{name}.weight", shape, self.start, self.start + self.filled)

    def fill(self, table: Tensor, slots: Iterator[WeightSlot], read: Read) -> None:
        for slot in slots:
            read(slot, table[: self.filled])


class Embedding(Layer):
    """Token ids `[tokens]` → `[tokens, hidden]`, split by vocabulary. `op` looks the rows up in
    `weight`, which is the subclass's matter."""

    def __init__(self, context: BuildContext, op: str) -> None:
        vocab, hidden = context.spec.vocab_size, context.spec.hidden_size
        self._comm = context.comm
        self._share = VocabShare.of_rank(vocab, context.comm)
        self._embed = context.bind(op, vocab=self._share.rows, hidden=hidden)

    @property
    def weight(self) -> Tensor | PackedWeight:
        """This rank's rows, after `load`."""
        raise NotImplementedError

    def __call__(self, token_ids: Tensor) -> Tensor:
        if self._comm.size == 1:
            return self._embed(token_ids, self.weight)
        local = token_ids - self._share.start
        ours = (local >= 0) & (local < self._share.rows)
        hidden = self._embed(local * ours, self.weight)
        return self._comm.all_reduce(hidden.masked_fill(~ours.unsqueeze(-1), 0))


class VocabEmbedding(Embedding):
    """One with a table of its own, which a tied head may read."""

    def __init__(self, context: BuildContext, name: str) -> None:
        super().__init__(context, "embed")
        self._name = name
        self._shape = (context.spec.vocab_size, context.spec.hidden_size)
        self.table = self._share.pad(context.alloc(self._share.rows, self._shape[1]))

    @property
    def weight(self) -> Tensor:
        return self.table

    def slots(self) -> Iterator[WeightSlot]:
        return self._share.slots(self._name, self._shape)

    def load(self, source: WeightSource) -> None:
        self._share.fill(self.table, self.slots(), source.read)


class PackedEmbedding(Embedding):
    """One that reads the packed weight of a tied head, so that it is held once."""

    def __init__(self, context: BuildContext, head: LmHead) -> None:
        super().__init__(context, "embed_packed")
        self._head = head

    @staticmethod
    def fits(context: BuildContext) -> bool:
        """Does the head keep the table's values, packed so that rows can be looked up?"""
        binder, hidden = context.binder, context.spec.hidden_size
        rows = VocabShare.of_rank(context.spec.vocab_size, context.comm).rows
        plain = binder.scheme(hidden, head=True) == PLAIN
        return plain and binder.looks_up_packed(context.dtype, (rows, hidden))

    @property
    def weight(self) -> PackedWeight:
        return self._head.packed


class LmHead(Linear):
    """`[rows, hidden]` → fp32 logits `[rows, vocab]` on every rank. `tied`: the embedding's table
    of this rank, when it serves as head too."""

    is_head = True

    def __init__(self, context: BuildContext, name: str, tied: Tensor | None = None) -> None:
        self._name = name
        self._tied = tied
        self._comm = context.comm
        self._vocab_size = context.spec.vocab_size
        self._share = VocabShare.of_rank(self._vocab_size, context.comm)
        super().__init__(context, context.spec.hidden_size, self._share.rows)

    def slots(self) -> Iterator[WeightSlot]:
        if self._tied is None:
            yield from self._share.slots(self._name, (self._vocab_size, self._in_features))

    def load(self, source: WeightSource) -> None:
        if self._restore(source):
            return
        if self._tied is not None:
            self._pack(self._tied, source, shared=True)  # the embedding has filled it
            return
        plain = self._share.pad(self._plain())
        self._share.fill(plain, self.slots(), source.read)
        self._pack(plain, source)

    def _origin(self, row: int) -> tuple[str, int]:
        return f"{self._name}.weight", self._share.start + row

    def __call__(self, rows: Tensor) -> Tensor:
        logits = self._op(rows, self._packed, None)
        if self._comm.size > 1:
            logits = self._comm.all_gather(logits, -1)[:, : self._vocab_size]
        return logits.float()


class RMSNorm(Layer):
    """Root-mean-square norm over the last dimension (arXiv:1910.07467)."""

    def __init__(self, context: BuildContext, name: str, size: int) -> None:
        self._name = name
        self._weight = context.alloc(size)
        self._eps = context.spec.rms_eps
        self._norm = context.bind("rms_norm", size=size)
        self._add_norm = context.bind("add_rms_norm", size=size)

    def slots(self) -> Iterator[WeightSlot]:
        size = len(self._weight)
        yield WeightSlot(f"{self._name}.weight", (size,), 0, size, init="ones")

    def load(self, source: WeightSource) -> None:
        for slot in self.slots():
            source.read(slot, self._weight)

    def __call__(self, x: Tensor) -> Tensor:
        return self._norm(x, self._weight, self._eps)

    def add(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """(norm(x + residual), x + residual); without a residual, `x` begins one."""
        if residual is None:
            return self._norm(x, self._weight, self._eps), x
        return self._add_norm(x, residual, self._weight, self._eps)


class Attention(Layer):
    """Grouped-query attention over the paged cache, `[tokens, hidden]` → the same.

    Writes this step's keys and values, then attends; slots and metadata are its group's.
    """

    kv: LayerKV | None = None

    def __init__(self, context: BuildContext, layer: int) -> None:
        spec, comm = context.spec, context.comm
        names, head_dim = spec.names, spec.head_dim
        self._heads, self._kv_heads = spec.rank_heads(comm.size)
        # With fewer kv heads than ranks, neighbours hold the same one.
        first_kv = comm.rank * spec.num_kv_heads // comm.size
        kv_rows = first_kv * head_dim, (first_kv + self._kv_heads) * head_dim
        kv_width = spec.num_kv_heads * head_dim
        parts = (
            Part.of_rank(names.of("q_proj", layer), spec.num_heads * head_dim, comm),
            Part(names.of("k_proj", layer), kv_width, *kv_rows),
            Part(names.of("v_proj", layer), kv_width, *kv_rows),
        )
        self.qkv = ColumnLinear(context, spec.hidden_size, parts, bias=spec.qkv_bias)
        self.out = RowLinear(
            context,
            [names.of("o_proj", layer)],
            spec.num_heads * head_dim,
            spec.hidden_size,
            bias=spec.o_bias,
        )
        self.children = (self.qkv, self.out)
        self._qk_norm = spec.qk_norm
        if spec.qk_norm:
            self.q_norm = RMSNorm(context, names.of("q_norm", layer), head_dim)
            self.k_norm = RMSNorm(context, names.of("k_norm", layer), head_dim)
            self.children += (self.q_norm, self.k_norm)
        self._heads_shape = (-1, self._heads + 2 * self._kv_heads, head_dim)
        self._split = [self._heads, self._kv_heads, self._kv_heads]
        self._rope = context.bind("rope", head_dim=head_dim, rope_dim=spec.rope.dim)
        self._cos_sin = context.cos_sin
        self._buffers = context.buffers
        self._group = context.buffers.group_of(layer)

    def __call__(self, hidden: Tensor) -> Tensor:
        group, kv = self._group, self.kv
        assert kv is not None, "bind_kv comes before the first forward"
        query, key, value = self.qkv(hidden).view(self._heads_shape).split(self._split, dim=1)
        if self._qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key = self._rope(query, key, self._buffers.positions, self._cos_sin)
        group.impl.write(key, value, kv, group.slots)
        attended = group.impl.run(query, kv, group.spec, group.metadata)
        return self.out(attended.flatten(1))


class GatedMLP(Layer):
    """`down(activation(gate(x)) * up(x))`, gate and up merged, the activation chained to them."""

    def __init__(self, context: BuildContext, layer: int) -> None:
        spec, comm = context.spec, context.comm
        names, width = spec.names, spec.intermediate_size
        parts = [
            Part.of_rank(names.of(name, layer), width, comm) for name in ("gate_proj", "up_proj")
        ]
        self.gate_up = ColumnLinear(
            context,
            spec.hidden_size,
            parts,
            bias=spec.mlp_bias,
            then=(spec.activation, {"size": width // comm.size}),
        )
        self.down = RowLinear(
            context, [names.of("down_proj", layer)], width, spec.hidden_size, bias=spec.mlp_bias
        )
        self.children = (self.gate_up, self.down)

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.down(self.gate_up(hidden))
