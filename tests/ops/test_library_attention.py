"""Attention of libraries that are not here: stand-ins for their modules hold each call to what
the library documents, and compute it by the reference."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.attention_steps import BASE, STEPS, check, run_step
from torch import Tensor

from trimaran.platforms.attention_reference import attend
from trimaran.platforms.cuda import CudaPlatform
from trimaran.platforms.cuda_flash_attention import FlashAttention2, FlashAttention3
from trimaran.platforms.cuda_flashinfer import WORKSPACE, FlashInfer
from trimaran.platforms.gpu_cards import Survey
from trimaran.platforms.gpu_library_attention import LibraryAttention
from trimaran.platforms.host_device import HostDevice
from trimaran.platforms.interface import AttentionBatch, AttentionSpec
from trimaran.platforms.rocm import RocmPlatform
from trimaran.platforms.rocm_aiter import Aiter

KINDS: list[type[LibraryAttention]] = [FlashAttention2, FlashAttention3, FlashInfer, Aiter]
VERSIONS = {
    "flash-attn": "2.8.3",
    "flash_attn_3": "3.0.0b1",
    "flashinfer-python": "0.5.2",
    "amd-aiter": "0.1.5",
}


def is_int32(tensor: Tensor, *shape: int) -> bool:
    return tensor.dtype == torch.int32 and tensor.shape == shape and tensor.is_contiguous()


def paged(
    query: Tensor,
    cache: tuple[Tensor, Tensor],
    pages: list[list[int]],
    lengths: list[int],
    starts: list[int],
    scale: float,
    causal: bool,
) -> Tensor:
    """Each sequence by the reference; its keys lie in `pages`, `[pages, size, heads, dim]`."""
    key, value = cache
    (tokens, heads, dim), kv_heads = query.shape, key.shape[2]
    assert starts[0] == 0 and starts[-1] == tokens and len(starts) == len(lengths) + 1
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert query.dtype == key.dtype == value.dtype and query.dtype in (
        torch.float16,
        torch.bfloat16,
    )
    spec = AttentionSpec(heads, kv_heads, dim, scale, query.dtype, key.dtype, 1, causal)
    parts = []
    for i, length in enumerate(lengths):
        both = [one[pages[i]].flatten(0, 1)[:length] for one in (key, value)]
        assert not any(one.isnan().any() for one in both), "a page that is not the sequence's"
        parts.append(attend(query[starts[i] : starts[i + 1]], both[0], both[1], spec))
    return torch.cat(parts).to(query.dtype)


def varlen(multiple: int) -> Callable[..., Tensor]:
    """`flash_attn_varlen_func` of FlashAttention 2 and AITER, with a block table."""

    def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        assert set(given) == {
            *("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
            *("softmax_scale", "causal", "block_table"),
        }
        cu_seqlens_q, cu_seqlens_k = given["cu_seqlens_q"], given["cu_seqlens_k"]
        block_table = given["block_table"]
        seqs = len(block_table)
        assert k.shape[1] % multiple == 0 and k.dim() == 4
        assert is_int32(cu_seqlens_q, seqs + 1) and is_int32(cu_seqlens_k, seqs + 1)
        assert block_table.dtype == torch.int32 and block_table.stride(-1) == 1
        lengths = cu_seqlens_k.diff().tolist()
        assert cu_seqlens_k[0] == 0 and given["max_seqlen_k"] >= max(lengths)
        assert given["max_seqlen_q"] == int(cu_seqlens_q.diff().max())
        scale, causal = given["softmax_scale"], given["causal"]
        return from_table(q, (k, v), block_table, lengths, cu_seqlens_q, scale, causal)

    return flash_attn_varlen_func


def from_table(
    q: Tensor,
    cache: tuple[Tensor, Tensor],
    table: Tensor,
    lengths: list[int],
    starts: Tensor,
    scale: float,
    causal: bool,
) -> Tensor:
    size = cache[0].shape[1]
    pages = [row[: -(-n // size)].tolist() for row, n in zip(table, lengths, strict=True)]
    return paged(q, cache, pages, lengths, starts.tolist(), scale, causal)


def flash_attn_with_kvcache(q: Tensor, k_cache: Tensor, v_cache: Tensor, **given: Any) -> Tensor:
    """FlashAttention 3's: queries packed, pages of any size."""
    assert set(given) == {
        *("cache_seqlens", "page_table", "cu_seqlens_q", "max_seqlen_q"),
        *("softmax_scale", "causal"),
    }
    lens, table, starts = given["cache_seqlens"], given["page_table"], given["cu_seqlens_q"]
    assert is_int32(lens, len(table)) and is_int32(starts, len(table) + 1)
    assert table.dtype == torch.int32 and table.stride(-1) == 1
    assert given["max_seqlen_q"] == int(starts.diff().max())
    scale, causal = given["softmax_scale"], given["causal"]
    return from_table(q, (k_cache, v_cache), table, lens.tolist(), starts, scale, causal)


class BatchPrefillWithPagedKVCacheWrapper:
    """FlashInfer's: the plan is the wrapper's until the next one."""

    made = 0

    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD") -> None:
        assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD"
        assert float_workspace_buffer.numel() == WORKSPACE
        type(self).made += 1

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        *shape: int,  # num_qo_heads, num_kv_heads, head_dim_qk, page_size
        **given: Any,
    ) -> None:
        assert set(given) == {"causal", "sm_scale", "q_data_type", "kv_data_type"}
        page_size = shape[3]
        seqs = len(paged_kv_last_page_len)
        assert is_int32(qo_indptr, seqs + 1) and is_int32(paged_kv_indptr, seqs + 1)
        assert qo_indptr.device.type == paged_kv_indptr.device.type == "cpu", "else it waits"
        assert is_int32(paged_kv_indices, int(paged_kv_indptr[-1]))
        assert is_int32(paged_kv_last_page_len, seqs)
        assert 1 <= paged_kv_last_page_len.min() <= paged_kv_last_page_len.max() <= page_size
        self.starts = qo_indptr.tolist()
        self.scale, self.causal = given["sm_scale"], given["causal"]
        bounds = paged_kv_indptr.tolist()
        self.pages = [
            paged_kv_indices[a:b].tolist() for a, b in zip(bounds, bounds[1:], strict=False)
        ]
        last = paged_kv_last_page_len.tolist()
        self.lengths = [
            (len(mine) - 1) * page_size + n for mine, n in zip(self.pages, last, strict=True)
        ]
        self.shape = shape
        self.dtypes = (given["q_data_type"], given["kv_data_type"])

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        key, value = paged_kv_cache
        assert q.is_contiguous() and key.shape == value.shape
        assert (q.shape[1], key.shape[2], q.shape[2], key.shape[1]) == self.shape
        assert (q.dtype, key.dtype) == self.dtypes
        return paged(
            q, paged_kv_cache, self.pages, self.lengths, self.starts, self.scale, self.causal
        )


STAND_INS: dict[str, dict[str, Any]] = {
    "flash_attn": {"flash_attn_varlen_func": varlen(256)},
    "flash_attn_interface": {"flash_attn_with_kvcache": flash_attn_with_kvcache},
    "flashinfer": {"BatchPrefillWithPagedKVCacheWrapper": BatchPrefillWithPagedKVCacheWrapper},
    "aiter": {"flash_attn_varlen_func": varlen(128)},
}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """All of them, of these versions."""
    versions = dict(VERSIONS)
    for name, members in STAND_INS.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)

    def version(distribution: str) -> str:
        if distribution not in versions:
            raise importlib.metadata.PackageNotFoundError(distribution)
        return versions[distribution]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return versions


def card_of(kind: type[LibraryAttention]) -> str:
    return "gfx942" if kind is Aiter else "sm_90"


def spec_of(kind: type[LibraryAttention], **changes: Any) -> AttentionSpec:
    values = {"dtype": torch.float16, "kv_dtype": torch.float16, "block_size": kind.block_multiple}
    if kind.block_multiple == 1:
        values["block_size"] = 16
    return dataclasses.replace(BASE, **(values | changes))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("step", ["one decode", "decodes", "prefills", "chunk", "mixed"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_step(kind: type[LibraryAttention], step: str) -> None:
    spec, impl = spec_of(kind), kind([card_of(kind)])
    assert impl.supports(spec)
    check(spec, *run_step(spec, impl, STEPS[step]))


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("changes", [{"num_kv_heads": 1}, {"causal": False}], ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_other_layers(kind: type[LibraryAttention], changes: dict[str, Any]) -> None:
    bfloat16 = {"dtype": torch.bfloat16, "kv_dtype": torch.bfloat16}
    spec = spec_of(kind, **changes, **bfloat16, scale=0.3)
    check(spec, *run_step(spec, kind([card_of(kind)]), STEPS["mixed"]))


@pytest.mark.usefixtures("installed")
def test_the_next_step_is_planned_while_one_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two plans are apart, and no more wrappers are made."""
    monkeypatch.setattr(BatchPrefillWithPagedKVCacheWrapper, "made", 0)
    spec, impl = spec_of(FlashInfer), FlashInfer(["sm_90"])
    device = HostDevice()
    impl.alloc(device, spec, 2)
    before = device.memory().by_tag["workspace"]
    impl.alloc(device, spec, 2)
    assert device.memory().by_tag["workspace"] == before == WORKSPACE
    table = torch.tensor([[1]], dtype=torch.int32)
    plans = [
        impl.plan(spec, AttentionBatch([0, 1], [n], table, torch.tensor([16]))) for n in range(1, 6)
    ]
    assert BatchPrefillWithPagedKVCacheWrapper.made == 2
    assert all(a is not b for a, b in zip(plans, plans[1:], strict=False))
    assert plans[-1].lengths == [5] and plans[-2].lengths == [4]


REFUSED: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "cache of the same": {"kv_dtype": torch.float8_e4m3fn},
    "sliding window": {"sliding_window": 20},
    "softcap": {"softcap": 3.0},
    "ALiBi": {"alibi_slopes": (1.0, 2.0, 3.0, 4.0)},
    "head_dim 68": {"head_dim": 68},
    "3 heads over 2": {"num_heads": 3},
}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("reason", REFUSED)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_is_not_handed_on_is_refused(kind: type[LibraryAttention], reason: str) -> None:
    answer = kind([card_of(kind)]).supports(spec_of(kind, **REFUSED[reason]))
    assert not answer and reason in answer.reason


@pytest.mark.parametrize("kind", [FlashAttention2, Aiter], ids=lambda kind: kind.name)
def test_blocks_are_as_large_as_the_library_wants_them(
    kind: type[LibraryAttention], installed: dict[str, str]
) -> None:
    small = spec_of(kind, block_size=kind.block_multiple // 2)
    answer = kind([card_of(kind)]).supports(small)
    assert not answer and f"it takes multiples of {kind.block_multiple}" in answer.reason


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_another_version_or_card_is_refused(
    kind: type[LibraryAttention], installed: dict[str, str]
) -> None:
    spec, distribution = spec_of(kind), kind.library.distribution
    assert "no kernels for sm_75" in kind(["sm_75"]).supports(spec).reason
    installed[distribution] = "9.0"
    assert f"{distribution} 9.0 is not" in kind([card_of(kind)]).supports(spec).reason
    del installed[distribution]
    assert f"no part of an installed {distribution}" in kind([]).supports(spec).reason


def names_offered(platform: type[CudaPlatform] | type[RocmPlatform]) -> list[str]:
    class NoCard(platform):  # type: ignore[misc, valid-type]
        @classmethod
        def survey(cls) -> Survey:
            return Survey(())

    return [impl.name for impl in NoCard().attention(BASE)]


def test_a_hull_offers_what_is_installed(installed: dict[str, str]) -> None:
    """Below the portable kernels, above torch's."""
    flash = ["flash-attention-3", "flash-attention-2", "flashinfer"]
    assert names_offered(CudaPlatform) == ["triton", *flash, "torch", "reference"]
    assert names_offered(RocmPlatform) == ["triton", "aiter", "torch", "reference"]


def test_a_hull_offers_nothing_that_is_not_installed() -> None:
    assert names_offered(CudaPlatform) == ["triton", "torch", "reference"]
