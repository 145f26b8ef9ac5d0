"""What a platform states is kept by shared code: fusions, layouts, slots, alignment, findings."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.engine_loop import greedy, open_loop
from helpers.tiny_models import model_path
from torch import Tensor

from trimaran.core import executor as executor_module
from trimaran.core import resolve as resolve_module
from trimaran.core.args import EngineArgs
from trimaran.core.errors import ConfigError, PlatformError
from trimaran.core.executor import UniExecutor
from trimaran.core.model_files import read_hf_config
from trimaran.core.models.registry import decoder_spec
from trimaran.core.models.step import slot_dtype
from trimaran.core.ops import OpBinder
from trimaran.core.resolve import resolve
from trimaran.core.sizing import measure_groups
from trimaran.platforms.attention_reference import ReferenceAttention
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.host_device import HostDevice
from trimaran.platforms.interface import (
    AttentionImpl,
    AttentionSpec,
    Fusion,
    KVConstraints,
    OpImpl,
    OpSignature,
    PackedWeight,
    Support,
    WeightPacker,
)
from trimaran.platforms.ops import OPS
from trimaran.platforms.strict import StrictKnobs, StrictPlatform

CALLS: list[torch.Size] = []


class FusedLinearSilu(OpImpl):
    """silu(gate) * up of a product, on weights `[in, out]` of the packer below."""

    op = "linear+silu_mul"
    name = "acme"

    def supports(self, sig: OpSignature) -> Support:
        if sig.sizes["out_features"] != 2 * sig.sizes["size"]:
            return Support.no("the activation's size is not half of the product's")
        return Support.yes() if sig.dtype == torch.float32 else Support.no("fp32 alone")

    def __call__(self, *args: Any) -> Any:
        x, weight, bias = args
        CALLS.append(x.shape)
        product = x @ weight.tensors[0]
        return OPS["silu_mul"].reference(product if bias is None else product + bias)


class Transposing(WeightPacker):
    format = "dense"

    def pack(self, tensors: Any, shape: tuple[int, int]) -> PackedWeight:
        weight = tensors["weight"].t().contiguous()
        return PackedWeight("acme", shape, (weight,), extra_bytes=weight.nbytes)


class TransposedLinear(OpImpl):
    op = "linear"
    name = "acme"

    def supports(self, sig: OpSignature) -> Support:
        return Support.yes()

    def __call__(self, *args: Any) -> Any:
        x, weight, bias = args
        product = x @ weight.tensors[0]
        return product if bias is None else product + bias


class Fusing(StrictPlatform):
    def fusions(self) -> Sequence[Fusion]:
        return (Fusion("acme", ("linear", "silu_mul"), FusedLinearSilu()),)

    def ops(self) -> Any:
        return {**super().ops(), "linear": [TransposedLinear()]}

    def weight_packers(self) -> Any:
        return {"dense": Transposing()}


def generate(platform: str) -> list[int]:
    with open_loop("llama3", platform=platform, max_model_len=128, max_num_seqs=2) as loop:
        return loop.run([greedy("0", [5, 6, 7, 8], 8)])["0", 0].tokens


def test_a_fusion_of_the_platform_runs_in_place_of_its_composition() -> None:
    CALLS.clear()
    assert generate("test_contract_honoured:Fusing") == generate("cpu")
    assert len(CALLS) == 3 * 8, "three layers, eight steps"


def test_a_fusion_that_refuses_becomes_its_parts_and_says_why() -> None:
    binder = OpBinder(Fusing(), HostDevice())
    sizes = {"in_features": 4, "out_features": 6}
    call = binder.bind_chain(torch.bfloat16, ("linear", sizes), ("silu_mul", {"size": 3}))
    weight = binder.pack(torch.ones(6, 4, dtype=torch.bfloat16))
    assert call(torch.ones(2, 4, dtype=torch.bfloat16), weight, None).shape == (2, 3)
    by_op = {one.op: one for one in binder.report()}
    assert by_op["linear+silu_mul"].chosen == "linear + silu_mul"
    assert [(r.name, r.reason) for r in by_op["linear+silu_mul"].refused] == [
        ("acme", "fp32 alone")
    ]
    fused = binder.bind_chain(torch.float32, ("linear", sizes), ("silu_mul", {"size": 3}))
    assert isinstance(fused, FusedLinearSilu)


def test_a_fusion_reads_packed_weights_where_its_linear_has_no_implementation() -> None:
    class Alone(Fusing):
        def ops(self) -> Any:
            return {}

    binder = OpBinder(Alone(), HostDevice())
    weight = torch.randn(6, 4)
    sizes = {"in_features": 4, "out_features": 6}
    fused = binder.bind_chain(torch.float32, ("linear", sizes), ("silu_mul", {"size": 3}))
    assert binder.pack(weight, fused).format == "acme"
    assert binder.pack(weight).format == "dense"


def test_packed_weights_are_in_the_device_s_accounts_while_they_live() -> None:
    device = HostDevice()
    packed = OpBinder(Fusing(), device).pack(torch.ones(6, 4))
    assert device.memory().by_tag == {"weights": 6 * 4 * 4}
    del packed
    gc.collect()
    assert device.memory().by_tag == {}


# -- KV constraints ------------------------------------------------------------------------------


class Constrained(StrictPlatform):
    """Strict with other constraints; `seen` collects the slots that reached the attention."""

    constraints = KVConstraints()

    def kv_constraints(self, spec: AttentionSpec) -> KVConstraints:
        return self.constraints


def spec_of(name: str) -> Any:
    return decoder_spec(read_hf_config(model_path(name), {}))


def block_size(constraints: KVConstraints, asked: int | None = None) -> int:
    platform = Constrained()
    platform.constraints = constraints
    sizes = measure_groups(
        platform,
        spec_of("llama3"),
        dtype=torch.float32,
        kv_dtype=torch.float32,
        block_size=asked,
        ranks=1,
    )
    return sizes[0].block_size


def test_the_first_block_size_that_keeps_the_alignment_is_taken() -> None:
    # A token takes 2 (key, value) * 2 heads * 64 * 4 bytes = 1 KiB in one layer.
    assert block_size(KVConstraints(preferred_block_size=24)) == 24
    assert block_size(KVConstraints(preferred_block_size=24, alignment=32 * 1024)) == 32
    assert block_size(KVConstraints(20, alignment=16 * 1024, preferred_block_size=24)) == 80
    with pytest.raises(ConfigError, match="block_size is 24.* its bytes in a layer of 32768"):
        block_size(KVConstraints(alignment=32 * 1024), asked=24)
    with pytest.raises(ConfigError, match="multiple of 20"):
        block_size(KVConstraints(block_multiple=20), asked=24)


class Apart(CpuPlatform):
    """Its attention keeps keys and values in a region each."""

    constraints = KVConstraints()

    def kv_constraints(self, spec: AttentionSpec) -> KVConstraints:
        return self.constraints


def test_pieces_of_blocks_that_are_not_aligned_are_refused_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The bytes of a block in a layer keep the alignment; its keys alone do not."""
    platform = Apart()
    for module in (executor_module, resolve_module):
        monkeypatch.setattr(module, "make_platform", lambda name: platform)
    more: dict[str, Any] = {"dtype": "float32", "load_format": "dummy", "max_num_seqs": 2}
    args = EngineArgs(model=str(model_path("llama3")), block_size=24, **more)
    keys = 24 * 2 * 64 * 4  # tokens, heads, head size, bytes
    platform.constraints = KVConstraints(alignment=keys)
    UniExecutor(resolve(args)).close()
    platform.constraints = KVConstraints(alignment=2 * keys)
    message = f"'cpu' .* multiples of {2 * keys} bytes, but attention 'torch' .* {keys} bytes"
    with pytest.raises(PlatformError, match=message):
        UniExecutor(resolve(args))


class HeadsFirst(ReferenceAttention):
    name = "heads_first"
    priority = 5


class TokensFirst(ReferenceAttention):
    name = "tokens_first"
    priority = 9
    layout = "NHD"


def test_an_attention_with_another_layout_than_the_device_takes_is_refused() -> None:
    class TwoLayouts(Constrained):
        constraints = KVConstraints(layouts=("HND",))

        def attention(self, spec: AttentionSpec) -> Sequence[AttentionImpl]:
            return (TokensFirst(), HeadsFirst())

    spec = AttentionSpec(2, 1, 8, 1.0, torch.float32, torch.float32, 24)
    binder = OpBinder(TwoLayouts())
    assert binder.attention(spec).name == "heads_first"
    (binding,) = binder.report()
    assert [r.reason for r in binding.refused] == [
        "its cache layout NHD is none of the device's HND"
    ]


class SeeingSlots(ReferenceAttention):
    seen: list[torch.dtype] = []

    def write(self, key: Tensor, value: Tensor, kv: Any, slots: Tensor) -> None:
        self.seen.append(slots.dtype)
        super().write(key, value, kv, slots)


class SlotPlatform(StrictPlatform):
    def attention(self, spec: AttentionSpec) -> Sequence[AttentionImpl]:
        return (SeeingSlots(),)


def test_slots_have_the_type_that_the_platform_wants() -> None:
    SeeingSlots.seen.clear()
    assert generate("test_contract_honoured:SlotPlatform") == generate("cpu")
    assert set(SeeingSlots.seen) == {torch.int32}
    odd = Constrained()
    odd.constraints = KVConstraints(slot_dtype="float32")
    spec = AttentionSpec(2, 1, 8, 1.0, torch.float32, torch.float32, 24)
    with pytest.raises(PlatformError, match="slots of type 'float32'"):
        slot_dtype(odd, spec)


def test_strict_asks_for_what_is_least_expected() -> None:
    constraints = StrictPlatform(StrictKnobs()).kv_constraints(
        AttentionSpec(2, 1, 8, 1.0, torch.float32, torch.float32, 24)
    )
    assert (constraints.slot_dtype, constraints.block_multiple) == ("int32", 24)
