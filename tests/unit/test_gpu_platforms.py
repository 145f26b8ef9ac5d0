"""What the GPU hulls say without a device open: tables, findings, limits, memory plans."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import gpu_answers as answers
from helpers.gpu_answers import fake_amdsmi, fake_pynvml

from trimaran.core.dtypes import choose_kv_dtype
from trimaran.core.errors import ConfigError
from trimaran.core.models.registry import decoder_spec
from trimaran.core.ops import OpBinder
from trimaran.core.sizing import measure_groups
from trimaran.platforms import accelerator_communicator, gpu_ops, gpu_platform
from trimaran.platforms.communicator import LocalCommunicator
from trimaran.platforms.cuda import CudaPlatform
from trimaran.platforms.gpu_cards import Card
from trimaran.platforms.gpu_kernels import table_for
from trimaran.platforms.gpu_platform import GpuPlatform, find_ordinal
from trimaran.platforms.gpu_tables import AMD, AMD_CARDS, NVIDIA, NVIDIA_CARDS, capabilities_of
from trimaran.platforms.gpu_wheels import CUDA_INDEXES, ROCM_INDEXES
from trimaran.platforms.interface import (
    AttentionSpec,
    Communicator,
    GroupSpec,
    OpSignature,
    PlatformUnavailable,
)
from trimaran.platforms.rocm import RocmPlatform
from trimaran.platforms.user_environment import FUSION

LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}


@pytest.fixture(autouse=True)
def nothing_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)


def cuda_with(monkeypatch: pytest.MonkeyPatch, *cards: answers.NvidiaCard) -> CudaPlatform:
    monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml(cards))
    return CudaPlatform()


def rocm_with(monkeypatch: pytest.MonkeyPatch, *cards: answers.AmdCard) -> RocmPlatform:
    monkeypatch.setitem(sys.modules, "amdsmi", fake_amdsmi(cards))
    return RocmPlatform()


TURING = replace(answers.L4, name="Tesla T4", capability=(7, 5))

# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "bfloat16", "fp8"),
    [
        ("sm_70", "emulated", None),
        ("sm_75", "emulated", None),
        ("sm_80", "native", None),
        ("sm_86", "native", None),
        ("sm_89", "native", "ocp"),
        ("sm_90", "native", "ocp"),
        ("sm_100", "native", "ocp"),
        ("sm_120", "native", "ocp"),
        ("gfx908", "native", None),
        ("gfx90a", "native", None),
        ("gfx942", "native", "fnuz"),
        ("gfx950", "native", "ocp"),
        ("gfx1100", "native", None),
        ("gfx1101", "native", None),
        ("gfx1103", "native", None),
        ("gfx1150", "native", None),
        ("gfx1151", "native", None),
        ("gfx1200", "native", "ocp"),
        ("gfx1201", "native", "ocp"),
    ],
)
def test_number_formats(architecture: str, bfloat16: str, fp8: str | None) -> None:
    known = capabilities_of(architecture, {**NVIDIA, **AMD}[architecture])
    assert known.dtypes["bfloat16"] == bfloat16 and known.fp8 == fp8
    assert known.dtypes["float32"] == known.dtypes["float16"] == "native"
    assert known.isa == architecture
    assert known.run_ahead == 1 and known.graph_replay
    kinds = {"ocp": {"float8_e4m3fn", "float8_e5m2"}, "fnuz": {"float8_e4m3fnuz"}, None: set()}
    ampere = {"float8_e5m2"} if architecture in ("sm_80", "sm_86") else set()
    assert set(known.kv_dtypes) == {*known.dtypes, "int8", *kinds[fp8], *ampere}


@pytest.mark.parametrize("architecture", [*NVIDIA, *AMD])
def test_a_cache_in_float8_is_claimed_where_the_table_has_it(architecture: str) -> None:
    """And every type of an architecture's own table is claimed."""
    claimed = set(capabilities_of(architecture, {**NVIDIA, **AMD}[architecture]).kv_dtypes)
    kinds, table = {name for name in claimed if "float8" in name}, table_for(architecture)
    assert kinds <= set(table.fp8)
    assert table.architecture != architecture or kinds == set(table.fp8)


@pytest.mark.parametrize(
    ("capability", "kept"),
    [((8, 0), "float8_e5m2"), ((8, 6), "float8_e5m2"), ((8, 9), "float8_e4m3fn")],
)
def test_an_attention_takes_the_float8_that_its_cards_convert(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], kept: str
) -> None:
    platform = cuda_with(monkeypatch, replace(answers.L4, capability=capability))
    known = platform.capabilities()
    assert choose_kv_dtype("fp8_e5m2", torch.float16, known, "cuda") == torch.float8_e5m2
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz"):
        spec = AttentionSpec(4, 2, 64, 0.125, torch.float16, getattr(torch, name), 32)
        answer = platform.attention(spec)[0].supports(spec)
        assert bool(answer) == (name in known.kv_dtypes), answer.reason
    assert kept in known.kv_dtypes


@pytest.mark.parametrize(("capability", "has"), [((8, 0), False), ((8, 6), False), ((9, 0), True)])
def test_fp8_weights_are_packed_where_the_matrix_units_read_them(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], has: bool
) -> None:
    platform = cuda_with(monkeypatch, replace(answers.L4, capability=capability))
    formats = platform.capabilities().weight_formats
    assert ("fp8" in formats) == has
    assert {*platform.weight_packers(), "dense"} == set(formats)
    use = OpSignature("linear", torch.bfloat16, {"in_features": 64, "out_features": 32}, "fp8")
    (scaled,) = (impl for impl in platform.ops()["linear"] if impl.name == "scaled_mm")
    assert bool(scaled.supports(use)) == has


def test_fp8_is_the_kind_that_the_platform_keeps() -> None:
    def chosen(asked: str, architecture: str) -> torch.dtype:
        known = capabilities_of(architecture, {**NVIDIA, **AMD}[architecture])
        return choose_kv_dtype(asked, torch.bfloat16, known, "a gpu")

    assert chosen("fp8", "sm_90") == chosen("fp8_e4m3", "gfx950") == torch.float8_e4m3fn
    assert chosen("fp8", "gfx942") == chosen("fp8_e4m3", "gfx942") == torch.float8_e4m3fnuz
    for asked, architecture in (("fp8", "sm_80"), ("fp8_e5m2", "gfx942"), ("fp8", "gfx90a")):
        with pytest.raises(ConfigError, match=f"'a gpu' keeps no {asked} KV cache; it keeps "):
            chosen(asked, architecture)


def test_what_shares_the_hosts_memory() -> None:
    shared = {name for name, found in {**NVIDIA, **AMD}.items() if found.unified}
    assert shared == {"sm_72", "sm_87", "sm_110", "sm_121", "gfx1103", "gfx1150", "gfx1151"}
    for name, found in {**NVIDIA, **AMD}.items():
        assert capabilities_of(name, found).unified_memory is (name in shared)


def test_architectures_with_matrix_units_that_torch_serves_are_described() -> None:
    known = {*NVIDIA, *AMD, "gfx900", "gfx906", "gfx1030", "sm_50", "sm_60"}  # without bfloat16
    for index in (*CUDA_INDEXES, *ROCM_INDEXES):
        assert set(index.architectures) <= known


def test_ranks_need_a_device_each_where_devices_share_the_hosts_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Shared code lets ranks share such a device; NCCL does not."""
    monkeypatch.setattr(gpu_platform, "missing_nccl", lambda: "")
    platform = cuda_with(monkeypatch, replace(answers.L4, name="NVIDIA GB10", capability=(12, 1)))
    (finding, *_) = platform.review({"dtype": "bfloat16", "tensor_parallel_size": 2})
    assert (finding.kind, finding.field) == ("reject", "tensor_parallel_size")
    assert platform.review({"dtype": "bfloat16", "tensor_parallel_size": 1}) == []


def test_an_unknown_architecture_promises_little(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = cuda_with(monkeypatch, replace(answers.H200, name="Next", capability=(15, 0)))
    known = platform.capabilities()
    assert known.isa == "sm_150" and known.fp8 is None and known.dtypes["bfloat16"] == "emulated"


@pytest.mark.parametrize("platform", [CudaPlatform, RocmPlatform])
def test_described_devices_are_coherent(platform: type[GpuPlatform]) -> None:
    for spec in platform.known_devices():
        rates = spec.roofline.flops
        assert rates["bfloat16"] == rates["float16"] > rates["float32"]
        names = {"ocp": "float8_e4m3fn", "fnuz": "float8_e4m3fnuz", None: None}
        assert {name for name in rates if "float8" in name} == (
            {names[spec.capabilities.fp8]} - {None}
        )
        fp8 = rates.get(names[spec.capabilities.fp8] or "", 2 * rates["float16"])
        assert fp8 == pytest.approx(2 * rates["float16"], rel=0.01)  # dense, like the others
        assert spec.roofline.source and spec.architecture in {**NVIDIA, **AMD}
        assert 100e9 < spec.roofline.bandwidth < 10e12
        assert all(hasattr(torch, name) for name in rates)


def test_names_that_users_type() -> None:
    names = [spec.name for p in (CudaPlatform, RocmPlatform) for spec in p.known_devices()]
    assert names == [
        *("h100", "h200", "a100", "l4", "rtx4090"),
        *("mi210", "mi300x", "mi325x", "mi355x", "rx7900xtx"),
    ]
    assert len(NVIDIA_CARDS) == len(AMD_CARDS) == 5


# ---------------------------------------------------------------------------------------------
# Findings, limits, environment
# ---------------------------------------------------------------------------------------------


def test_bfloat16_without_its_units_becomes_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = cuda_with(monkeypatch, TURING).review({"dtype": "bfloat16", "device": 0})
    assert (finding.kind, finding.field, finding.value) == ("adjust", "dtype", "float16")
    assert "sm_75 has no bfloat16 units" in finding.reason
    assert cuda_with(monkeypatch, TURING).review({"dtype": "float16"}) == []
    assert cuda_with(monkeypatch, answers.A100).review({"dtype": "bfloat16"}) == []


def test_the_asked_device_is_reviewed(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = cuda_with(monkeypatch, answers.A100, TURING)
    assert not platform.review({"dtype": "bfloat16", "device": 0})
    assert platform.review({"dtype": "bfloat16", "device": 1})


def test_a_group_is_told_how_it_talks(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"dtype": "float16", "tensor_parallel_size": 2}
    monkeypatch.setattr(gpu_platform, "missing_nccl", lambda: "")
    assert cuda_with(monkeypatch, answers.H100, answers.H100).review(plan) == []
    (finding,) = cuda_with(monkeypatch, answers.RTX4090).review(plan)
    assert finding.kind == "note" and "PCI bus" in finding.reason
    monkeypatch.setattr(gpu_platform, "missing_nccl", lambda: "built without NCCL")
    (finding,) = cuda_with(monkeypatch, answers.H100).review(plan)
    assert finding.kind == "note" and "host memory: built without NCCL" in finding.reason


def test_the_environment_of_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    platform = CudaPlatform()
    monkeypatch.setattr(gpu_platform.host, "physical_cores", lambda: 12)
    assert platform.process_env(0, {"tensor_parallel_size": 4}) == {"OMP_NUM_THREADS": "3"}
    assert platform.process_env(3, {"tensor_parallel_size": 4}) == {"OMP_NUM_THREADS": "3"}
    assert platform.process_env(0, {}) == {"OMP_NUM_THREADS": "8"}
    assert platform.process_env(0, {"num_threads": 2}) == {"OMP_NUM_THREADS": "2"}


# ---------------------------------------------------------------------------------------------
# Plans
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", [CudaPlatform(), RocmPlatform()])
def test_a_cache_is_sized_without_a_device(platform: GpuPlatform) -> None:
    """Llama 3.1 8B: 8 KV heads of 128 in 32 layers, 2 bytes, keys and values: 128 KiB a token."""
    (size,) = measure_groups(
        platform,
        decoder_spec(LLAMA_8B),
        dtype=torch.bfloat16,
        kv_dtype=torch.bfloat16,
        block_size=None,
        ranks=1,
    )
    assert size.block_size == 32 and size.block_bytes == 32 * (128 << 10)
    assert not torch.cuda.is_initialized()


@pytest.mark.parametrize("platform", [CudaPlatform(), RocmPlatform()])
def test_a_block_is_aligned_whatever_the_model(platform: GpuPlatform) -> None:
    for head_dim, dtype in ((1, torch.float16), (20, torch.float32), (80, torch.bfloat16)):
        spec = AttentionSpec(1, 1, head_dim, 1.0, dtype, dtype, 16)
        constraints = platform.kv_constraints(spec)
        assert spec.block_size % constraints.block_multiple == 0
        for impl in platform.attention(spec):
            assert impl.block_bytes(spec) % constraints.alignment == 0


def test_ops_are_bound_to_portable_kernels_or_without_triton_to_torchs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def chosen() -> dict[str, str]:
        binder = OpBinder(CudaPlatform())
        for op in ("linear", "rms_norm", "rope", "silu_mul", "add_rms_norm"):
            binder.bind(op, torch.bfloat16)
        binder.attention(AttentionSpec(4, 2, 64, 0.125, torch.float16, torch.float16, 32))
        return {binding.op: binding.chosen for binding in binder.report()}

    found = chosen()
    assert found.pop("linear") == "torch"
    assert set(found.values()) == {"triton"}
    for module in (gpu_ops, gpu_platform):
        monkeypatch.setattr(module, "triton_missing", lambda: "there is no Triton")
    found = chosen()
    assert found.pop("add_rms_norm") == "add + rms_norm"
    assert found.pop("add") == "reference"
    assert set(found.values()) == {"torch"}
    assert CudaPlatform().weight_packers() == {}


@pytest.mark.parametrize("told, kept", [(None, "1"), ("0", "0")])
def test_serving_compiles_what_ci_does_unless_told(
    told: str | None, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(FUSION, told or "")
    if told is None:
        monkeypatch.delenv(FUSION)
    CudaPlatform().weight_packers()
    assert os.environ[FUSION] == kept


# ---------------------------------------------------------------------------------------------
# Opening
# ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device to open")
def test_opening_without_the_vendors_torch_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlatformUnavailable, match="H100 80GB HBM3 cannot be opened"):
        cuda_with(monkeypatch, answers.H100).open(0)
    with pytest.raises(ValueError, match="there is no device 3"):
        cuda_with(monkeypatch, answers.H100).open(3)


ORDER = CudaPlatform.vendor_facts.order


class Torchs:
    """torch.cuda with these UUIDs, in its own order."""

    def __init__(self, *uuids: str | None) -> None:
        self._uuids = uuids

    def device_count(self) -> int:
        return len(self._uuids)

    def get_device_properties(self, ordinal: int) -> Any:
        uuid = self._uuids[ordinal]
        return object() if uuid is None else type("Properties", (), {"uuid": uuid})


def test_torchs_number_of_a_card() -> None:
    """CUDA puts the fastest card first, NVML goes along the bus."""
    card = Card(answers.A100.uuid, "A100", 0, "sm_80")
    other = replace(card, uuid=answers.L4.uuid)
    plain = answers.A100.uuid.removeprefix("GPU-")
    assert find_ordinal(Torchs("0000", plain), [card], 0, ORDER) == 1
    assert find_ordinal(Torchs(None, None), [other, card], 1, ORDER) == 1  # it tells no UUID
    with pytest.raises(RuntimeError, match="torch sees 1 devices"):
        find_ordinal(Torchs(None), [other, card], 1, ORDER)


def test_another_card_in_its_place_is_not_taken_for_it() -> None:
    """CUDA_VISIBLE_DEVICES=0 is the fastest card to CUDA, the first on the bus to NVML."""
    card = Card(answers.L4.uuid, "L4", 0, "sm_89")
    torchs = Torchs(answers.A100.uuid.removeprefix("GPU-"))
    with pytest.raises(RuntimeError, match="set CUDA_DEVICE_ORDER=PCI_BUS_ID"):
        find_ordinal(torchs, [card], 0, ORDER)
    assert find_ordinal(torchs, [card], 0) == 0  # a runtime without an order of its own
    instance = replace(card, uuid="MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f")
    assert find_ordinal(torchs, [instance], 0, ORDER) == 0


def test_a_uuid_that_is_missing_or_shared_is_not_searched() -> None:
    for uuid in ("", "GPU-00000000000000aa"):
        cards = [Card(uuid, "MI100", 0, "gfx908") for _ in range(2)]
        torchs = Torchs(uuid, uuid)
        assert [find_ordinal(torchs, cards, i, ORDER) for i in (0, 1)] == [0, 1]
    shared = [Card("GPU-0a", "MI100", 0, "gfx908") for _ in range(2)]
    assert [find_ordinal(Torchs("0a", "0b"), shared, i) for i in (0, 1)] == [0, 1]
    cards = [Card("GPU-0b", "MI100", 0, "gfx908"), Card("GPU-0a", "MI100", 0, "gfx908")]
    assert find_ordinal(Torchs("0a", "0a"), cards, 1) == 1


def test_hip_fills_a_uuid_with_text() -> None:
    card = Card("GPU-8af705259683161c", "MI300X", 0, "gfx942")
    text = b"8af705259683161c".hex()
    uuid = "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))
    assert find_ordinal(Torchs("00112233-4455-6677-8899-aabbccddeeff", uuid), [card], 0) == 1


def test_describe(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = cuda_with(monkeypatch, answers.H100, answers.H100).describe()
    assert facts["devices"] == "2 x NVIDIA H100 80GB HBM3 (sm_90)"
    one = "698 W, 61 °C, 97% busy, held down by: power cap"
    assert facts["now"] == f"{one}; {one}"
    assert cuda_with(monkeypatch).describe()["now"] == "not known"


# ---------------------------------------------------------------------------------------------
# Collectives
# ---------------------------------------------------------------------------------------------


def test_a_group_of_one_starts_nothing() -> None:
    found = CudaPlatform().communicator(GroupSpec(), None)  # type: ignore[arg-type]
    assert isinstance(found, LocalCommunicator)


class Doubling(Communicator):
    """A group of two of which both members hold the same."""

    rank, size = 0, 2
    closed = False

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 2

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return torch.cat((tensor, tensor), dim=dim)

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        return tensor + source

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


def test_without_nccl_collectives_go_through_the_host(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    inner = Doubling()
    monkeypatch.setattr(accelerator_communicator, "GlooCommunicator", lambda group: inner)
    monkeypatch.setattr(accelerator_communicator, "missing_nccl", lambda: "no NCCL here")
    group = CudaPlatform().communicator(GroupSpec(0, 2, "file:///x"), None)  # type: ignore[arg-type]
    assert "no NCCL here" in caplog.text
    tensor = torch.ones(2)
    assert group.all_reduce(tensor) is tensor and tensor.tolist() == [2.0, 2.0]
    assert group.all_gather(tensor, 0).shape == (4,)
    assert group.broadcast(tensor, 1).tolist() == [3.0, 3.0] == tensor.tolist()
    group.close()
    assert inner.closed


def test_tables_are_json() -> None:
    """What `trimaran plan --json` and the support matrix print."""
    for spec in CudaPlatform.known_devices():
        assert json.loads(json.dumps(dataclasses.asdict(spec)))["name"] == spec.name
