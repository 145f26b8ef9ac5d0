"""The decoder: embedding, layers, norm and head, or a pipeline stage's share of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ...platforms.interface import Communicator, LayerKV
from ..ops import OpBinder
from .experts import SparseMLP
from .layers import (
    Attention,
    BuildContext,
    Embedding,
    GatedMLP,
    LmHead,
    PackedEmbedding,
    RMSNorm,
    VocabEmbedding,
)
from .rope import cos_sin_table
from .spec import DecoderSpec
from .step import StepBuffers
from .weights import Layer

MIXERS: Mapping[str, Callable[[BuildContext, int], Attention]] = {"attention": Attention}
FEED_FORWARDS: Mapping[str, Callable[[BuildContext, int], GatedMLP | SparseMLP]] = {
    "gated": GatedMLP,
    "experts": SparseMLP,
}
"""The names that a LayerSpec uses → the classes behind them."""


class LayerRange(NamedTuple):
    """The layers [start, stop) that a pipeline stage holds."""

    start: int
    stop: int


class DecoderLayer(Layer):
    """One pre-norm block: `(hidden, residual)` → `(hidden, residual)`, both `[tokens, hidden]`.

    The sum of the two is the stream; it is added up where a norm reads it next.
    """

    def __init__(self, context: BuildContext, index: int) -> None:
        spec = context.spec
        layer = spec.layers[index]
        self.input_norm = RMSNorm(context, spec.names.of("input_norm", index), spec.hidden_size)
        self.mixer = MIXERS[layer.mixer](context, index)
        self.post_norm = RMSNorm(context, spec.names.of("post_norm", index), spec.hidden_size)
        self.feed_forward = FEED_FORWARDS[layer.feed_forward](context, index)
        self.children = (self.input_norm, self.mixer, self.post_norm, self.feed_forward)

    def __call__(self, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        hidden, residual = self.input_norm.add(hidden, residual)
        hidden, residual = self.post_norm.add(self.mixer(hidden), residual)
        return self.feed_forward(hidden), residual


class Decoder(Layer):
    """The layers of `layer_range` on one rank. The first stage holds the embedding, the last the
    final norm and the head."""

    def __init__(
        self,
        spec: DecoderSpec,
        binder: OpBinder,
        buffers: StepBuffers,
        comm: Communicator,
        *,
        dtype: torch.dtype,
        layers: LayerRange | None = None,
    ) -> None:
        self.spec = spec
        self.dtype = dtype
        self.buffers = buffers
        self.device = binder.device
        self.layer_range = layers or LayerRange(0, spec.num_layers)
        table = cos_sin_table(spec.rope, buffers.max_positions)
        cos_sin = self.device.alloc(table.shape, table.dtype, tag="weights").copy_(table)
        context = BuildContext(spec, binder, buffers, comm, dtype, cos_sin)
        self.layers = [DecoderLayer(context, index) for index in range(*self.layer_range)]
        self.embed, self.head = self._build_ends(context)
        self.norm: RMSNorm | None = None
        if self.is_last:
            self.norm = RMSNorm(context, spec.names.of("norm"), spec.hidden_size)
        self._add = context.bind("add", size=spec.hidden_size)
        # Loaded in this order: what packing takes besides is most for the largest tables, and gone
        # before the layers are there.
        parts = (self.embed, self.head, *self.layers, self.norm)
        self.children = tuple(part for part in parts if part is not None)

    def _build_ends(self, context: BuildContext) -> tuple[Embedding | None, LmHead | None]:
        """What this stage has of embedding and head. Tied ones are held once: the embedding reads
        what the head has packed, or the head what the embedding has."""
        tied, table = self.spec.tie_embeddings, self.spec.names.of("embed")
        if tied and self.is_first and self.is_last and PackedEmbedding.fits(context):
            head = LmHead(context, table)
            return PackedEmbedding(context, head), head
        embed = VocabEmbedding(context, table) if self.is_first else None
        if not self.is_last:
            return embed, None
        if not tied:
            return embed, LmHead(context, self.spec.names.of("head"))
        # A last stage that is not the first one reads the embedding's tensor for itself.
        return embed, LmHead(context, table, embed.table if embed else None)

    @property
    def is_first(self) -> bool:
        return self.layer_range.start == 0

    @property
    def is_last(self) -> bool:
        return self.layer_range.stop == self.spec.num_layers

    def bind_kv(self, layer_kvs: Mapping[int, LayerKV]) -> None:
        """Give every layer of this stage its cache, by the layer's index in the whole model."""
        for index, layer in enumerate(self.layers, self.layer_range.start):
            layer.mixer.kv = layer_kvs[index]

    def forward(self, hidden: Tensor | None = None) -> Tensor:
        """Run the step that stands in the buffers; returns `[tokens, hidden]`.

        `hidden` is what the stage before returned (the first stage reads the token ids instead).
        The last stage's result is normed and ready for `logits`.
        """
        if self.embed is not None:
            hidden = self.embed(self.buffers.token_ids)
        assert hidden is not None, "a later stage continues the hidden states of the one before"
        residual: Tensor | None = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        if self.norm is not None:
            return self.norm.add(hidden, residual)[0]
        return self._add(hidden, residual)

    def logits(self, rows: Tensor) -> Tensor:
        """`[rows, hidden]` of the last stage's result → fp32 logits `[rows, vocab]`."""
        assert self.head is not None, "only the last stage has a head"
        return self.head(rows)
