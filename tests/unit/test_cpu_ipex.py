"""The IPEX adapter of the cpu platform: when it serves, what it says when it does not, and how its
weights lie. Bare metadata stand for an installation, Python functions for its ops; the real one
runs in tests/ops/test_ops.py where it is installed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimaran.core.ops import OpBinder
from trimaran.platforms import cpu_ipex, cpu_weights
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.interface import INT8, OpSignature
from trimaran.platforms.ops import DENSE, OPS, Tolerance

CACHED = (cpu_ipex.misfit, cpu_ipex.refusal, cpu_ipex.refusal_of)
THIS_TORCH = ".".join(torch.__version__.split(".")[:2])
BFLOAT16 = OpSignature("linear", torch.bfloat16)


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    for function in CACHED:
        function.cache_clear()
    yield
    for function in CACHED:
        function.cache_clear()


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Installs the metadata of a version of IPEX; gives the place of its library."""

    def install(version: str) -> Path:
        info = tmp_path / f"intel_extension_for_pytorch-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: intel_extension_for_pytorch\nVersion: {version}\n")
        monkeypatch.syspath_prepend(tmp_path)
        library = tmp_path / cpu_ipex.LIBRARY
        library.parent.mkdir(parents=True)
        return library

    return install


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The libraries that torch was asked to load."""
    paths: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", paths.append)
    return paths


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without the native library."""
    gone = "not in this test"
    for module in ("cpu_native", "cpu_weights", "cpu_ipex", "cpu"):
        monkeypatch.setattr(f"trimaran.platforms.{module}.unavailable", lambda: gone)


def product(x: Tensor, packed: Tensor, out_features: int) -> Tensor:
    """What IPEX's `tpp_linear` makes of its blocks, which are taken apart one by one."""
    if x.dtype == torch.float16:
        raise RuntimeError("TPP does not support fp16\nat some line")
    if packed.dim() == 4:
        packed = packed.unsqueeze(-1)
    weight = torch.empty(out_features, x.shape[1], dtype=x.dtype)
    for row in range(out_features):
        for column in range(x.shape[1]):
            block = packed[row // 16, column // 64]
            pair = block.shape[-1]
            weight[row, column] = block[column % 64 // pair, row % 16, column % pair]
    return F.linear(x, weight)


@pytest.fixture
def stand_in(
    installed: Callable[[str], Path], loaded: list[str], monkeypatch: pytest.MonkeyPatch
) -> SimpleNamespace:
    """An IPEX that fits and whose ops are right."""
    installed(f"{THIS_TORCH}.0+cpu")
    ops = SimpleNamespace(
        tpp_linear=product,
        tpp_linear_bias=lambda x, packed, bias, size: product(x, packed, size) + bias,
        rmsnorm=OPS["rms_norm"].reference,
    )
    monkeypatch.setattr(torch.ops, "torch_ipex", ops, raising=False)
    return ops


def bound(op: str, dtype: torch.dtype = torch.bfloat16) -> tuple[str, dict[str, str]]:
    """Who serves `op` on the cpu platform, and why the others do not."""
    binder = OpBinder(CpuPlatform())
    binder.bind(op, dtype)
    choice = binder.report()[-1]
    return choice.chosen, {refusal.name: refusal.reason for refusal in choice.refused}


def assert_close(found: Tensor, expected: Tensor, tolerance: Tolerance) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance.rtol, atol=tolerance.atol)


@pytest.mark.skipif(not cpu_ipex.misfit(), reason="here is an IPEX that fits")
@pytest.mark.parametrize("op", ["linear", "rms_norm"])
def test_where_it_is_absent_torch_serves_and_nothing_is_loaded(
    op: str, no_native: None, loaded: list[str]
) -> None:
    chosen, refused = bound(op)
    assert chosen == "cpu" and "intel-extension-for-pytorch" in refused["ipex"]
    assert not loaded and "intel_extension_for_pytorch" not in sys.modules


@pytest.mark.parametrize("version", ["1.13.0", "2.7.0+cpu", "99.0"])
def test_one_for_another_torch_is_named_with_both_versions(
    version: str, installed: Callable[[str], Path], loaded: list[str], no_native: None
) -> None:
    installed(version)
    wanted = ".".join(version.split(".")[:2])
    said = f"intel-extension-for-pytorch {version} wants torch {wanted}; "
    said += f"this is torch {torch.__version__}"
    assert bound("linear")[1]["ipex"] == said
    assert CpuPlatform().describe()["ipex"] == said
    assert not loaded


@pytest.mark.parametrize("content", [None, b"no library"])
def test_a_library_that_does_not_load_is_a_reason(
    content: bytes | None, installed: Callable[[str], Path], no_native: None
) -> None:
    library = installed(f"{THIS_TORCH}.0")
    if content is not None:
        library.write_bytes(content)
    chosen, refused = bound("rms_norm")
    assert chosen == "cpu"
    assert "does not load" in refused["ipex"] and str(library) in refused["ipex"]


def test_a_library_without_the_ops_is_a_reason(
    installed: Callable[[str], Path],
    loaded: list[str],
    no_native: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.ops, "torch_ipex", SimpleNamespace(), raising=False)
    library = installed(f"{THIS_TORCH}.0")
    reason = bound("linear")[1]["ipex"]
    assert "linear fails here" in reason and "\n" not in reason
    assert loaded == [str(library)]


@pytest.mark.parametrize("op", ["linear", "rms_norm"])
def test_one_that_fits_serves_where_the_native_library_cannot(
    op: str, stand_in: SimpleNamespace, no_native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_ipex.host, "cpu_flags", lambda: frozenset({"avx2", "avx512f"}))
    chosen, refused = bound(op)
    assert chosen == "ipex"
    assert "outranked by ipex" in refused["cpu"]


@pytest.mark.skipif(bool(cpu_weights.unavailable()), reason="needs the native library")
@pytest.mark.parametrize("op", ["linear", "rms_norm"])
def test_the_native_kernels_come_first_and_nothing_is_loaded(
    op: str, stand_in: SimpleNamespace, loaded: list[str]
) -> None:
    chosen, refused = bound(op)
    assert chosen == "native" and refused["ipex"] == "outranked by native"
    assert not cpu_ipex.IpexLinear().supports(BFLOAT16)  # it cannot read native weights
    assert CpuPlatform().weight_packers()[DENSE].format == DENSE
    assert "where the native kernels cannot serve" in CpuPlatform().describe()["ipex"]
    assert not loaded


def test_a_type_that_it_cannot_multiply_goes_by_torch_in_one_line(
    stand_in: SimpleNamespace, no_native: None
) -> None:
    chosen, refused = bound("linear", torch.float16)
    assert chosen == "cpu"
    assert refused["ipex"] == "IPEX's linear fails here: TPP does not support fp16"
    packer = CpuPlatform().weight_packers()[DENSE]
    weight = packer.pack({"weight": torch.ones(16, 64).half()}, (16, 64))
    assert weight.format != cpu_ipex.IPEX


@pytest.mark.parametrize("name", ["tpp_linear", "tpp_linear_bias"])
def test_a_wrong_product_is_refused(name: str, stand_in: SimpleNamespace, no_native: None) -> None:
    right = getattr(stand_in, name)
    setattr(stand_in, name, lambda *args: right(*args) * 1.1)
    chosen, refused = bound("linear")
    assert chosen == "cpu" and "wrong results" in refused["ipex"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(16, 64), (48, 128), (40, 64), (16, 100)], ids=str)
def test_every_linear_that_says_yes_reads_what_the_packer_makes(
    dtype: torch.dtype, shape: tuple[int, int], stand_in: SimpleNamespace, no_native: None
) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, shape[1]).to(dtype), torch.randn(*shape).to(dtype)
    bias = torch.randn(shape[0]).to(dtype)
    packer = CpuPlatform().weight_packers()[DENSE]
    packed = packer.pack({"weight": weight}, shape)
    in_blocks = shape[0] % 16 == 0 and shape[1] % 64 == 0
    assert (packed.format == cpu_ipex.IPEX) is in_blocks
    if in_blocks:
        assert packer.packed_bytes(dtype, shape) == packed.extra_bytes == weight.nbytes
    serving = [
        one for one in CpuPlatform().ops()["linear"] if one.supports(OpSignature("linear", dtype))
    ]
    assert [one.name for one in serving] == ["ipex"]
    for summand in (None, bias):
        expected = F.linear(x, weight, summand)
        assert_close(serving[0](x, packed, summand), expected, OPS["linear"].tolerance[dtype])


def test_its_norm_waits_for_avx512(
    stand_in: SimpleNamespace, no_native: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_ipex.host, "cpu_flags", lambda: frozenset({"avx2"}))
    chosen, refused = bound("rms_norm")
    assert chosen == "cpu" and "AVX-512" in refused["ipex"]


def test_quantized_weights_and_other_types_are_refused_by_name(
    stand_in: SimpleNamespace, no_native: None
) -> None:
    linear = cpu_ipex.IpexLinear()
    assert INT8 in linear.supports(OpSignature("linear", torch.bfloat16, {}, INT8)).reason
    assert "float64" in linear.supports(OpSignature("linear", torch.float64)).reason
