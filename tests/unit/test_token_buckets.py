"""Token buckets: what `resolve` makes of them, how a step is padded, and what a step graph is."""

from __future__ import annotations

import json
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from trimaran.core import resolve as resolve_module
from trimaran.core.args import EngineArgs
from trimaran.core.config import SchedulerConfig
from trimaran.core.errors import ConfigError, PlatformError
from trimaran.core.models.any_size import any_size
from trimaran.core.models.trace import StepTracer, TracedAttention, TraceError
from trimaran.core.ops import OpBinder
from trimaran.core.plan import StepPlan
from trimaran.core.resolve import resolve
from trimaran.core.runner.batch import StagedBatch, StepRows
from trimaran.core.runner.compiled import step_tracer
from trimaran.core.runner.rows import RowTable
from trimaran.platforms.host_device import HostDevice
from trimaran.platforms.interface import (
    AttentionImpl,
    Output,
    PackedWeight,
    StepGraph,
    StepInput,
    StepLimits,
    StepMetadata,
    StepNode,
    Value,
    View,
    WeightPacker,
)
from trimaran.platforms.step_graph import interpret
from trimaran.platforms.strict import StrictKnobs, StrictPlatform

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 1024,
    "torch_dtype": "float32",
}

# ---------------------------------------------------------------------------------------------
# Resolution
# ---------------------------------------------------------------------------------------------

Resolve = Callable[..., SchedulerConfig]


@pytest.fixture
def scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """What is resolved on a platform with these step limits."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def make(limits: StepLimits, **args: Any) -> SchedulerConfig:
        platform = StrictPlatform(StrictKnobs(limits=limits))
        monkeypatch.setattr(resolve_module, "make_platform", lambda name: platform)
        values = {"kv_cache_memory_bytes": "64M"} | args
        return resolve(EngineArgs(model=str(tmp_path), platform="strict", **values)).scheduler

    return make


def test_the_largest_bucket_bounds_the_defaults(
    scheduler: Resolve, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "trimaran.resolve"):
        found = scheduler(StepLimits(token_buckets=(128, 8, 32, 8)))
    assert found.token_buckets == (8, 32, 128)
    assert (found.max_num_batched_tokens, found.max_num_seqs) == (128, 128)
    assert "max_num_batched_tokens=128: the platform's largest bucket" in caplog.text
    assert scheduler(StepLimits()).token_buckets == ()


@pytest.mark.parametrize(
    ("tokens", "buckets"), [(8, (8,)), (9, (8, 32)), (32, (8, 32)), (100, (8, 32, 128))]
)
def test_buckets_that_no_step_reaches_are_left_out(
    scheduler: Resolve, tokens: int, buckets: tuple[int, ...]
) -> None:
    limits = StepLimits(token_buckets=(8, 32, 128))
    found = scheduler(limits, max_num_batched_tokens=tokens)
    assert (found.max_num_batched_tokens, found.token_buckets) == (tokens, buckets)
    assert found.max_num_seqs == tokens


@pytest.mark.parametrize("name", ["max_num_batched_tokens", "max_num_seqs"])
def test_what_was_asked_for_and_fits_no_bucket_is_refused(scheduler: Resolve, name: str) -> None:
    limits = StepLimits(token_buckets=(8, 32))
    with pytest.raises(ConfigError, match=rf"{name} is 33, .*'strict'.*\(8, 32\).* 32 at most"):
        scheduler(limits, **{name: 33})
    assert getattr(scheduler(limits, **{name: 32}), name) == 32


def test_the_lower_of_two_limits_counts(scheduler: Resolve) -> None:
    found = scheduler(StepLimits(max_tokens=40, token_buckets=(8, 32, 128)), max_num_seqs=4)
    assert (found.max_num_batched_tokens, found.token_buckets) == (40, (8, 32, 128))
    found = scheduler(StepLimits(max_tokens=200, token_buckets=(8, 32, 128)), max_num_seqs=4)
    assert found.max_num_batched_tokens == 128


def test_a_limit_of_tokens_bounds_the_sequences_too(scheduler: Resolve) -> None:
    limits = StepLimits(max_tokens=128)
    found = scheduler(limits)
    assert (found.max_num_batched_tokens, found.max_num_seqs) == (128, 128)
    with pytest.raises(ConfigError, match=r"max_num_seqs is 129, .*'strict'.* 128 at most"):
        scheduler(limits, max_num_seqs=129)
    with pytest.raises(PlatformError, match="'strict' takes 0 tokens"):
        scheduler(StepLimits(max_tokens=0))


def test_whole_prompts_have_to_fit_the_largest_bucket(scheduler: Resolve) -> None:
    limits = StepLimits(token_buckets=(8, 512))
    with pytest.raises(ConfigError, match="Without chunked prefill"):
        scheduler(limits, enable_chunked_prefill=False)
    whole = scheduler(limits, enable_chunked_prefill=False, max_model_len="512")
    assert whole.max_num_batched_tokens == 512


def test_a_bucket_holds_a_token(scheduler: Resolve) -> None:
    with pytest.raises(PlatformError, match="'strict' has a token bucket of 0"):
        scheduler(StepLimits(token_buckets=(0, 8)))


# ---------------------------------------------------------------------------------------------
# Padding
# ---------------------------------------------------------------------------------------------


def test_padding_is_sequences_of_one_token_after_the_others() -> None:
    plan = StepPlan(0, rows=[3, 1], starts=[5, 0], counts=[1, 3], emits=[True, False])
    padded = StepRows.of(plan).padded(7, scratch=9)
    table = RowTable(HostDevice(), 9, 6, [2])  # rows of 8 tokens in 4 blocks
    batch = StagedBatch.stage(HostDevice(), padded, table)
    positions, tokens, blocks, offsets = batch.places.tolist()
    assert positions == [5, 0, 1, 2, 0, 0, 0]
    assert tokens == [29, 8, 9, 10, 72, 72, 72]
    assert blocks == [14, 4, 4, 5, 36, 36, 36]
    assert offsets == [1, 0, 1, 0, 0, 0, 0]
    assert batch.query_starts == [0, 1, 4, 5, 6, 7]
    assert batch.seq_lens == [6, 3, 1, 1, 1]
    assert batch.rows.tolist() == [3, 1, 9, 9, 9]
    assert padded.emits.tolist() == [True, False, False, False, False]
    assert all(array.dtype == np.int64 for array in (padded.rows, padded.counts, padded.ends))


def test_a_full_step_and_an_empty_one() -> None:
    full = StepRows.of(StepPlan(0, rows=[0], starts=[0], counts=[4], emits=[True]))
    assert full.padded(4, scratch=9) is full
    table = RowTable(HostDevice(), 9, 6, [])
    padded = StepRows.of(StepPlan(0)).padded(2, scratch=9)
    empty = StagedBatch.stage(HostDevice(), padded, table)
    assert empty.places.tolist() == [[0, 0], [72, 72]]
    assert empty.query_starts == [0, 1, 2]


def test_the_scratch_row_is_nobodys() -> None:
    table = RowTable(HostDevice(), 4, 30, [8])
    assert table.scratch == 4 and len(table.tokens) == len(table.blocks[0]) == 5
    assert not table.tokens[4].any() and not table.blocks[0][4].any()


# ---------------------------------------------------------------------------------------------
# Step graphs
# ---------------------------------------------------------------------------------------------

WEIGHT = torch.arange(1.0, 4.0)


def node(
    op: str, call: Callable[..., Any], *arguments: Any, outputs: Sequence[tuple[int, ...]] = ((3,),)
) -> StepNode:
    kinds = tuple(Output(shape, torch.float32) for shape in outputs)
    return StepNode(op, call, arguments, kinds)


def test_a_graph_means_its_calls_in_order() -> None:
    """Values by position, views of a value that is not laid out in rows, metadata by group."""
    ids = torch.tensor([2.0, 0.0])
    nodes = (
        node("embed", lambda ids: (ids.repeat(3, 1).t(), ids + 1), ids, outputs=((2, 3), (2,))),
        node("add", lambda a, b: a + b, Value(0, 1), StepMetadata(1), outputs=((2,),)),
        node("kv_write", lambda a: None, Value(1), outputs=()),
        node(
            "linear+silu_mul",
            lambda a, b: a * b,
            View(Value(0), (2,), (3,), 1),
            Value(1),
            outputs=((2,),),
        ),
    )
    step = interpret(StepGraph(2, nodes, View(Value(3), (2, 1), (1, 1), 0)))
    assert step([None, 10], 2).tolist() == [[2 * 13], [0]]
    ids.copy_(torch.tensor([1.0, 4.0]))  # a persistent tensor: its content is read in each step
    assert step([None, 20], 2).tolist() == [[22], [4 * 25]]


@pytest.mark.parametrize(
    ("nodes", "result", "message"),
    [
        ((node("conjure", id, WEIGHT),), Value(0), "Node 0 is 'conjure'"),
        ((node("linear+conjure", id, WEIGHT),), Value(0), "no chain of ops"),
        ((node("silu_mul", id, Value(0)),), Value(0), r"Node 0 \(silu_mul\) reads"),
        ((node("silu_mul", id, WEIGHT),), Value(0, 1), "The result reads"),
        ((node("silu_mul", id, WEIGHT),), View(Value(1), (1,), (1,), 0), "The result reads"),
    ],
)
def test_a_malformed_graph_is_refused(nodes: Any, result: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interpret(StepGraph(1, nodes, result))


def test_a_graph_of_one_size_serves_no_other() -> None:
    graph = StepGraph(3, (node("silu_mul", lambda x: x, WEIGHT),), Value(0))
    assert interpret(graph)([], 3) is WEIGHT
    with pytest.raises(ValueError, match="A step of 2 tokens; the graph has 3"):
        interpret(graph)([], 2)


POSITIONS = torch.arange(10.0).reshape(2, 5)


def test_a_graph_of_any_size_has_its_inputs_outputs_and_views_in_the_size_of_the_step() -> None:
    nodes = (
        node("embed", lambda ids: ids.t() * 10, StepInput(POSITIONS), outputs=((3, 2),)),
        node("silu_mul", lambda x: x + 1, View(Value(0), (3, 1), (2, 1), 1), outputs=((3, 1),)),
    )
    step = interpret(StepGraph(3, nodes, View(Value(1), (3,), (1,), 0), any_size=True))
    for tokens in (1, 3, 5):
        assert step([], tokens).tolist() == [51.0, 61, 71, 81, 91][:tokens]


@pytest.mark.parametrize(
    ("argument", "shape", "result", "message"),
    [
        (WEIGHT, (4, 2), Value(0), r"Node 0 \(embed\) makes \(4, 2\), in a graph for any size"),
        (WEIGHT, (), Value(0), r"Node 0 \(embed\) makes \(\)"),
        (WEIGHT, (3, 2), View(Value(0), (2, 3), (3, 1), 0), r"The result reads a view \(2, 3\)"),
    ],
)
def test_a_graph_of_any_size_counts_tokens_first(
    argument: Any, shape: tuple[int, ...], result: Any, message: str
) -> None:
    graph = StepGraph(3, (node("embed", id, argument, outputs=(shape,)),), result, any_size=True)
    with pytest.raises(ValueError, match=message):
        interpret(graph)


def test_an_op_that_makes_something_else_is_noticed() -> None:
    for call in (lambda x: (x, x), lambda x: x[:2], lambda x: x.double()):
        graph = StepGraph(1, (node("silu_mul", call, WEIGHT),), Value(0))
        with pytest.raises(ValueError, match=r"Node 0 \(silu_mul\) made .* not "):
            interpret(graph)([], 1)


# ---------------------------------------------------------------------------------------------
# Tracing
# ---------------------------------------------------------------------------------------------


class Toy:
    """A decoder of two ops, as far as a tracer looks at one."""

    def __init__(
        self, tracer: StepTracer, between: Callable[[Tensor], Any], tokens: int = 4
    ) -> None:
        self.all_ids = torch.arange(1.0, 9.0)
        self.ids = self.all_ids[:tokens]
        inputs = [(self.ids, self.all_ids)]
        self.buffers = SimpleNamespace(num_tokens=tokens, inputs=lambda: inputs)
        self.double = tracer.wrap("rms_norm", lambda x: x * 2)
        add = tracer.wrap("add", lambda a, b: a + b)
        self.fused = tracer.wrap("add_rms_norm", lambda a, b: (add(a, b), a))
        self.between = between

    def forward(self) -> Tensor:
        return self.fused(self.between(self.double(self.ids)), WEIGHT[:2])[0]


def trace(between: Callable[[Tensor], Any]) -> StepGraph:
    tracer = StepTracer()
    return tracer.trace(Toy(tracer, between))  # type: ignore[arg-type]


def test_a_trace_has_a_node_for_each_call_the_decoder_makes() -> None:
    graph = trace(lambda x: x.view(2, 2)[1])
    assert [n.op for n in graph.nodes] == ["rms_norm", "add_rms_norm"], "a part is no node"
    assert graph.nodes[1].arguments[0] == View(Value(0), (2,), (1,), 2)
    assert graph.nodes[1].outputs == (Output((2,), torch.float32),) * 2
    assert graph.result == Value(1, 0)
    assert interpret(graph)([], 4).tolist() == [6 + 1, 8 + 2]
    graph.nodes[0].arguments[0].tensor.mul_(10)
    assert interpret(graph)([], 4).tolist() == [60 + 1, 80 + 2]


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x[:2] + 1,
        lambda x: x[:2].mul_(3),
        lambda x: x[::2].flip(0),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.view(2, 2).t().reshape(4)[:2],
        lambda x: x[: int(x[0])],
        lambda x: torch.ones(2),
    ],
)
def test_what_no_graph_can_say_ends_the_trace(between: Callable[[Tensor], Any]) -> None:
    with pytest.raises(TraceError, match=r"aten\.\S+ runs between two ops"):
        trace(between)


def test_a_view_of_what_is_not_laid_out_in_rows_ends_the_trace() -> None:
    tracer = StepTracer()
    toy = Toy(tracer, lambda x: x[0, :2])
    toy.double = tracer.wrap("rms_norm", lambda x: x.view(2, 2).t() if x.numel() else x)
    with pytest.raises(TraceError, match="lies in no contiguous output"):
        tracer.trace(toy)  # type: ignore[arg-type]
    assert toy.forward().tolist() == [1 + 1, 3 + 2], "the trace is over"


def test_what_is_not_computed_is_laid_out_as_if_it_were() -> None:
    tracer = StepTracer()
    toy = Toy(tracer, lambda x: toy.double(toy.ids)[0, :2])
    toy.double = tracer.wrap("rms_norm", lambda x: (x * 2).view(2, 2).t())
    with pytest.raises(TraceError, match="lies in no contiguous output"):
        tracer.trace(toy)  # type: ignore[arg-type]


def test_a_step_input_is_named_and_no_part_of_it_taken() -> None:
    graph = trace(lambda x: x.view(2, 2)[1])
    (found,) = graph.nodes[0].arguments
    assert isinstance(found, StepInput) and found.tensor.tolist() == [*range(1, 9)]
    tracer = StepTracer()
    toy = Toy(tracer, lambda x: x)
    beside = toy.all_ids[4:]
    inputs = [(toy.ids, toy.all_ids[:4])]
    toy.buffers.inputs = lambda: inputs
    for part, ends in ((toy.ids[1:], True), (toy.ids.view(2, 2), True), (beside, False)):
        toy.between = lambda x, part=part: part.view(-1)[:2]
        if ends:
            with pytest.raises(TraceError, match="an op reads a part of the token ids"):
                tracer.trace(toy)  # type: ignore[arg-type]
        else:
            assert tracer.trace(toy).nodes[1].arguments[0].tolist() == [5, 6]  # type: ignore[arg-type]


TABLE = torch.arange(12.0).reshape(4, 3)


class Rows:
    """A decoder `[tokens]` → `[tokens, 3]`; `layer` is what stands between its two ops."""

    def __init__(self, layer: Callable[..., Any]) -> None:
        self.tracer = StepTracer()
        wrap = self.tracer.wrap
        self.embed = wrap("embed", lambda ids: TABLE[ids])
        self.norm = wrap("rms_norm", lambda x, *rest: x * 2)
        self.other = wrap("rms_norm", lambda x, *rest: x * 2)
        self.flat = wrap("rms_norm", lambda x: x.flatten())
        self.sum = wrap("add", lambda x: x.sum(0))
        self.wide = wrap("add", lambda x: x.double() if len(x) == 2 else x)
        self.layer = layer
        self.whole = torch.tensor([0, 1, 2, 3, 1, 0])

    def trace(self, tokens: int) -> StepGraph:
        self.ids = self.whole[:tokens]
        inputs = [(self.ids, self.whole)]
        self.buffers = SimpleNamespace(num_tokens=tokens, inputs=lambda: inputs)
        return self.tracer.trace(self)  # type: ignore[arg-type]

    def forward(self) -> Tensor:
        found: Tensor = self.layer(self, self.embed(self.ids))
        return found


@pytest.mark.parametrize(
    "layer",
    [
        lambda self, x: self.norm(x, TABLE, TABLE[:2], 1e-6, None, torch.float32),
        lambda self, x: self.norm(x[:, 1:]),
        lambda self, x: self.norm(x.unsqueeze(1)).squeeze(1),
        lambda self, x: x[:, 0],
    ],
)
def test_two_examples_make_a_graph_for_any_size(layer: Callable[..., Any]) -> None:
    decoder = Rows(layer)
    graph = any_size(decoder.trace(3), decoder.trace(2))
    assert graph.any_size and graph.num_tokens == 3
    for tokens in (6, 1, 4):
        own = decoder.trace(tokens)
        assert interpret(graph)([], tokens).equal(interpret(own)([], tokens))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda self, x: self.norm(x) if len(x) == 2 else x, "tokens have 1 and 2 ops"),
        (
            lambda self, x: (self.norm if len(x) == 2 else self.sum)(x),
            r"op 1 \(add\).*it is rms_no",
        ),
        (
            lambda self, x: (self.norm if len(x) == 2 else self.other)(x),
            r"op 1 \(rms_n.*it is rms_n",
        ),
        (lambda self, x: self.norm(x, *[1] * len(x)), "more or fewer arguments"),
        (lambda self, x: self.norm(x, len(x)), "its argument 1"),
        (lambda self, x: self.norm(x, float(len(x))), "its argument 1"),
        (lambda self, x: self.norm(x, TABLE[: len(x)]), "its argument 1"),
        (lambda self, x: self.norm(x, (len(x),)), "its argument 1"),
        (lambda self, x: self.norm(x, x if len(x) == 2 else 0), "its argument 1"),
        (lambda self, x: self.norm(x[:2]), "its argument 0"),
        (lambda self, x: self.norm(x[-1:]), "its argument 0"),
        (lambda self, x: self.norm(x.t()), "its argument 0"),
        (lambda self, x: self.norm(x.view(-1)), "its argument 0"),
        (lambda self, x: self.norm(x[:, len(x) - 2 :][:, :1]), "its argument 0"),
        (lambda self, x: self.norm(x.view(-1)[:: len(x) - 1][: len(x)]), "its argument 0"),
        (lambda self, x: self.norm((self.norm(x), self.other(x))[len(x) - 2][:, 1:]), "argument 0"),
        (lambda self, x: self.flat(x), r"its result is \(9,\) with 3, \(6,\) with 2"),
        (lambda self, x: self.sum(x), r"its result is \(3,\) with 3, \(3,\) with 2"),
        (lambda self, x: self.wide(x), "its result is"),
        (lambda self, x: x[-1], "which value the result is"),
    ],
)
def test_what_depends_on_the_number_of_tokens_is_no_graph_for_any(
    layer: Callable[..., Any], message: str
) -> None:
    decoder = Rows(layer)
    with pytest.raises(TraceError, match=message):
        any_size(decoder.trace(3), decoder.trace(2))


def test_a_trace_lets_go_of_what_the_decoder_lets_go_of() -> None:
    """Intermediate tensors of a long step are large; their addresses come again and again."""
    tracer, alive, most = StepTracer(), weakref.WeakSet[Tensor](), []

    def double(x: Tensor, _: int) -> Tensor:
        made = x * 2
        alive.add(made)
        most.append(len(alive))
        return made

    class Long(Toy):
        def forward(self) -> Tensor:
            step = tracer.wrap("rms_norm", double)
            hidden = step(self.ids, 0)
            for i in range(1, 20):  # the number makes each call another: none is computed already
                hidden = step(hidden.view(2, 2).view(4), i)
            return hidden

    graph = tracer.trace(Long(tracer, lambda x: x))  # type: ignore[arg-type]
    assert max(most) <= 2 and len(most) == 20
    assert [n.arguments[0] for n in graph.nodes[1:]] == [Value(i) for i in range(19)]
    assert interpret(graph)([], 4).tolist() == [2.0**20 * x for x in (1, 2, 3, 4)]


def test_what_repeats_is_traced_and_not_computed() -> None:
    """By the arguments: shapes, numbers, packed weights. What works in place is computed always."""
    calls: list[Any] = []

    def split(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        calls.append(rest)
        return (x * 2).t(), x[0] + 1

    def in_place(x: Tensor, y: Tensor) -> Tensor:
        calls.append("in place")
        return x.add_(y)

    weights = [PackedWeight("own", (size, 2), (object(),)) for size in (4, 4, 4, 6)]

    class Repeating(Toy):
        def forward(self) -> Tensor:
            hidden = tracer.wrap("embed", lambda ids: ids.view(2, 2) * 1)(self.ids)
            for weight in weights:
                hidden, row = tracer.wrap("linear", split)(hidden, weight, 1.0)
                hidden = self.in_place(hidden, row)
            return hidden

    tracer = StepTracer()
    toy = Repeating(tracer, lambda x: x)
    toy.in_place = tracer.wrap("add", in_place)
    graph = tracer.trace(toy)  # type: ignore[arg-type]
    made = [call if call == "in place" else call[0].shape[0] for call in calls]
    # the first product is transposed, the second that transposed again, the third like the first
    assert made == [4, "in place", 4, "in place", "in place", 6, "in place"]
    assert [n.op for n in graph.nodes] == ["embed", *["linear", "add"] * 4]
    assert interpret(graph)([], 4).equal(toy.forward())


def test_traced_attention_passes_on_all_of_the_contract() -> None:
    members = {name for name, value in vars(AttentionImpl).items() if callable(value)}
    assert {name for name in members if not name.startswith("__")} <= set(vars(TracedAttention))


def test_packing_looks_through_the_wrapping() -> None:
    class OwnPacker(WeightPacker):
        format = "dense"

        def pack(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedWeight:
            return PackedWeight("own", shape, ())

    class Packs(StrictPlatform):
        def weight_packers(self) -> Mapping[str, WeightPacker]:
            return {"dense": OwnPacker()}

    for wrap in (None, StepTracer().wrap):
        assert OpBinder(Packs(), None, wrap).pack(torch.ones(4, 4)).format == "own"


@pytest.mark.parametrize(
    ("knobs", "ranks", "message"),
    [
        ({"compile_steps": False}, 1, ""),
        ({}, 2, "cannot hold a group's collectives"),
        ({"limits": StepLimits()}, 1, "no token buckets"),
        ({"limits": StepLimits(), "step_sizes": "any"}, 2, "cannot hold a group's collectives"),
    ],
)
def test_why_steps_are_not_compiled(
    knobs: dict[str, Any], ranks: int, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    values = {"compile_steps": True, "limits": StepLimits(token_buckets=(8,))} | knobs
    platform = StrictPlatform(StrictKnobs(**values))
    config = SchedulerConfig(max_model_len=64, token_buckets=values["limits"].token_buckets)
    assert step_tracer(platform, 0, config, ranks) is None
    assert message in caplog.text and bool(message) == bool(caplog.text)
