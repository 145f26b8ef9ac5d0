"""A compiled step of the cpu platform: what it runs, where its values lie, what it computes."""

from __future__ import annotations

import itertools

import torch
from helpers.engine_loop import greedy, open_loop
from helpers.native import needs_native
from hypothesis import given
from hypothesis import strategies as st

from trimaran.kernels_cpu.library import library
from trimaran.platforms.cpu_step import LINE, last_uses, place
from trimaran.platforms.interface import Output, StepNode, Value


@st.composite
def programs(draw: st.DrawFn) -> list[StepNode]:
    """Nodes with up to two outputs each, which read some of those before them."""
    nodes: list[StepNode] = []
    for index in range(draw(st.integers(1, 12))):
        made = [Value(i, p) for i, node in enumerate(nodes) for p in range(len(node.outputs))]
        read = draw(st.lists(st.sampled_from(made), max_size=3)) if made else []
        sizes = draw(st.lists(st.integers(1, 300), min_size=index == 0, max_size=2))
        outputs = tuple(Output((3, size), torch.float32) for size in sizes)
        nodes.append(StepNode("add", print, tuple(read), outputs))
    return nodes


@given(programs())
def test_values_that_are_still_read_share_no_memory(nodes: list[StepNode]) -> None:
    sizes = [[LINE * output.shape[1] for output in node.outputs] for node in nodes]
    result = Value(0)
    uses = last_uses(nodes, result)
    offsets, total = place(sizes, uses)
    spans = {
        value: (offset, offset + sizes[value.node][value.position])
        for value, offset in offsets.items()
    }
    assert uses[result] == len(nodes)
    assert total == max(end for _, end in spans.values())
    for a, b in itertools.combinations(spans, 2):
        live_together = a.node <= uses[b] and b.node <= uses[a]
        overlap = spans[a][0] < spans[b][1] and spans[b][0] < spans[a][1]
        assert not (live_together and overlap), (a, b)


@needs_native
def test_a_step_is_one_native_program() -> None:
    """Qwen3's norms of query and key go with its rope; attention, cache and linears are there."""
    native = library()

    names = ("attention", "kv_write", "qk_norm_rope", "rope", "rms_norm", "linear_dense")

    def ran() -> dict[str, int]:
        return {name: native.count(name, native.isa) for name in names}

    with open_loop("qwen3", platform="cpu", block_size=16) as loop:
        before = ran()
        loop.run([greedy("a", list(range(5, 25)), 4)])
        after = ran()
    grown = {name: after[name] - before[name] for name in names}
    layers, steps = 3, 4
    assert grown["attention"] == grown["kv_write"] == layers * steps
    assert grown["qk_norm_rope"] == layers * steps
    assert grown["linear_dense"] == (4 * layers + 1) * steps  # and the head
    assert grown["rms_norm"] == steps  # the first; the others come with a sum or a rope
    assert grown["rope"] == 0
