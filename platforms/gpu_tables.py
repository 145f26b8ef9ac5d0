"""What is known of GPUs without asking one: capabilities by architecture, figures by card.

Sources. Formats of the matrix units: NVIDIA's "CUDA C++ Programming Guide", table "Feature Support
per Compute Capability" (bfloat16 from 8.0 on) and PTX ISA, "mma" (e4m3 from sm_89 on); AMD's "ROCm
precision support" page (FNUZ float8 on gfx942, OCP float8 on gfx950 and gfx12, none before) and the
instruction set documents of CDNA 1 to 4 and RDNA 3, 3.5, 4 (bfloat16 MFMA / WMMA, LDS). Shared
memory of a block: the former's table "Technical Specifications per Compute Capability". Memory
that is the host's: NVIDIA's "CUDA GPU Compute Capability" pages (7.2, 8.7, 11.0: Jetson; 12.1:
GB10) with "CUDA for Tegra", and those that LLVM's "User Guide for AMDGPU Backend" calls APUs (of
gfx942, where MI300A is one and MI300X is none, an architecture cannot say). Figures of cards: the
data sheet named in each entry, always the dense rate; memory: what the vendor's tool reports for
the card where a public report of it was found, otherwise the data sheet's size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .interface import (
    DENSE,
    FP8,
    INT4,
    INT8,
    W4A16,
    Capabilities,
    DeviceSpec,
    Fp8Kind,
    Precision,
    Roofline,
)

_MIB = 1 << 20
_GB, _TFLOP = 1e9, 1e12
SHARED_LIMIT: Mapping[str, int] = {
    "sm_80": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
    "gfx90a": 64 << 10,
    "gfx942": 64 << 10,
    "gfx950": 160 << 10,
    "gfx1100": 64 << 10,
}
"""Architectures that kernels are compiled for without a card -> bytes of shared memory that a
thread block may have there (of LDS that a work group may)."""
_KV_DTYPES = ("bfloat16", "float16", "float32", "int8")


@dataclass(frozen=True, slots=True)
class Architecture:
    """What an architecture's units do. `data_center`: cards of it reach each other's memory over a
    link of their own; the others have none, and their drivers mostly refuse. `unified`: its devices
    have no memory but the host's. `kept`: float8 types that Triton converts there although no
    matrix unit reads them (`supported_fp8_dtypes` of its backends): a cache may be in them."""

    title: str
    bfloat16: Precision = "native"
    fp8: Fp8Kind | None = None
    kept: tuple[str, ...] = ()
    data_center: bool = False
    unified: bool = False


NVIDIA: Mapping[str, Architecture] = {
    "sm_70": Architecture("Volta", "emulated", data_center=True),
    "sm_72": Architecture("Volta (Jetson)", "emulated", unified=True),
    "sm_75": Architecture("Turing", "emulated"),
    "sm_80": Architecture("Ampere", kept=("float8_e5m2",), data_center=True),
    "sm_86": Architecture("Ampere", kept=("float8_e5m2",)),
    "sm_87": Architecture("Ampere (Jetson)", kept=("float8_e5m2",), unified=True),
    "sm_89": Architecture("Ada", fp8="ocp"),
    "sm_90": Architecture("Hopper", fp8="ocp", data_center=True),
    "sm_100": Architecture("Blackwell", fp8="ocp", data_center=True),
    "sm_103": Architecture("Blackwell Ultra", fp8="ocp", data_center=True),
    "sm_110": Architecture("Blackwell (Jetson)", fp8="ocp", unified=True),
    "sm_120": Architecture("Blackwell", fp8="ocp"),
    "sm_121": Architecture("Blackwell (DGX Spark)", fp8="ocp", unified=True),
}
AMD: Mapping[str, Architecture] = {
    "gfx908": Architecture("CDNA", data_center=True),
    "gfx90a": Architecture("CDNA 2", data_center=True),
    "gfx942": Architecture("CDNA 3", fp8="fnuz", data_center=True),
    "gfx950": Architecture("CDNA 4", fp8="ocp", data_center=True),
    "gfx1100": Architecture("RDNA 3"),
    "gfx1101": Architecture("RDNA 3"),
    "gfx1102": Architecture("RDNA 3"),
    "gfx1103": Architecture("RDNA 3", unified=True),
    "gfx1150": Architecture("RDNA 3.5", unified=True),
    "gfx1151": Architecture("RDNA 3.5", unified=True),
    "gfx1200": Architecture("RDNA 4", fp8="ocp"),
    "gfx1201": Architecture("RDNA 4", fp8="ocp"),
}


_FLOAT8: Mapping[Fp8Kind | None, tuple[str, ...]] = {
    "ocp": ("float8_e4m3fn", "float8_e5m2"),
    "fnuz": ("float8_e4m3fnuz",),
    None: (),
}
"""What a cache may be kept in beside, by what the matrix units read."""


def capabilities_of(architecture: str, found: Architecture) -> Capabilities:
    """The contract's form of one table entry."""
    return Capabilities(
        dtypes={"float32": "native", "float16": "native", "bfloat16": found.bfloat16},
        kv_dtypes=(*_KV_DTYPES, *_FLOAT8[found.fp8], *found.kept),
        weight_formats=(DENSE, INT8, INT4, W4A16, *((FP8,) if found.fp8 else ())),
        fp8=found.fp8,
        isa=architecture,
        graph_replay=True,
        peer_to_peer=found.data_center,
        run_ahead=1,
        unified_memory=found.unified,
        deterministic=True,
        compiles_steps=True,
        step_sizes="any",
    )


@dataclass(frozen=True, slots=True)
class CardModel:
    """A card by its data sheet. `reported`: how the vendor's library names it, a regular
    expression over the whole name. `memory` MiB, `bandwidth` GB/s, rates in dense TFLOP/s;
    `half` is that of float16 and bfloat16 with fp32 sums."""

    name: str
    title: str
    architecture: str
    reported: str
    memory: int
    bandwidth: float
    single: float
    half: float
    fp8: float | None
    source: str

    @property
    def roofline(self) -> Roofline:
        flops = {"float32": self.single, "float16": self.half, "bfloat16": self.half}
        if self.fp8 is not None:
            kind = {**NVIDIA, **AMD}[self.architecture].fp8
            flops["float8_e4m3fnuz" if kind == "fnuz" else "float8_e4m3fn"] = self.fp8
        rates = {dtype: rate * _TFLOP for dtype, rate in flops.items()}
        return Roofline(self.bandwidth * _GB, rates, self.source)

    @property
    def spec(self) -> DeviceSpec:
        return DeviceSpec(
            name=self.name,
            title=self.title,
            architecture=self.architecture,
            memory=self.memory * _MIB,
            roofline=self.roofline,
            capabilities=capabilities_of(self.architecture, {**NVIDIA, **AMD}[self.architecture]),
        )


# Data sheets of sparsity-capable NVIDIA cards print the sparse rate: half of it is the dense one.
NVIDIA_CARDS: tuple[CardModel, ...] = (
    CardModel(
        name="h100",
        title="NVIDIA H100 SXM 80 GB",
        architecture="sm_90",
        reported=r"(NVIDIA )?H100 80GB HBM3",
        memory=81559,  # nvidia-smi
        bandwidth=3350,
        single=67,
        half=989.5,
        fp8=1979,
        source="NVIDIA H100 Tensor Core GPU data sheet (SXM)",
    ),
    CardModel(
        name="h200",
        title="NVIDIA H200 SXM 141 GB",
        architecture="sm_90",
        reported=r"(NVIDIA )?H200",
        memory=143771,  # nvidia-smi
        bandwidth=4800,
        single=67,
        half=989.5,
        fp8=1979,
        source="NVIDIA H200 Tensor Core GPU data sheet (SXM)",
    ),
    CardModel(
        name="a100",
        title="NVIDIA A100 SXM 80 GB",
        architecture="sm_80",
        reported=r"(NVIDIA )?A100-SXM4-80GB",
        memory=81920,  # nvidia-smi
        bandwidth=2039,
        single=19.5,
        half=312,
        fp8=None,
        source="NVIDIA A100 Tensor Core GPU data sheet (SXM, 80 GB)",
    ),
    CardModel(
        name="l4",
        title="NVIDIA L4",
        architecture="sm_89",
        reported=r"(NVIDIA )?L4",
        memory=23034,  # nvidia-smi
        bandwidth=300,
        single=30.3,
        half=121,
        fp8=242.5,
        source="NVIDIA L4 Tensor Core GPU data sheet",
    ),
    CardModel(
        name="rtx4090",
        title="NVIDIA GeForce RTX 4090",
        architecture="sm_89",
        reported=r"(NVIDIA )?GeForce RTX 4090",
        memory=24564,  # nvidia-smi
        bandwidth=1008,
        single=82.6,
        half=165.2,
        fp8=330.3,
        source="NVIDIA Ada GPU Architecture white paper, appendix A (fp32 accumulation)",
    ),
)
AMD_CARDS: tuple[CardModel, ...] = (
    CardModel(
        name="mi210",
        title="AMD Instinct MI210",
        architecture="gfx90a",
        reported=r"(AMD )?Instinct MI210",
        memory=65520,  # rocminfo
        bandwidth=1638.4,
        single=45.3,
        half=181,
        fp8=None,
        source="AMD Instinct MI210 data sheet (matrix rates)",
    ),
    CardModel(
        name="mi300x",
        title="AMD Instinct MI300X",
        architecture="gfx942",
        reported=r"(AMD )?Instinct MI300X( OAM| VF)?",
        memory=196592,  # amd-smi
        bandwidth=5300,
        single=163.4,
        half=1307.4,
        fp8=2614.9,
        source="AMD Instinct MI300X data sheet",
    ),
    CardModel(
        name="mi325x",
        title="AMD Instinct MI325X",
        architecture="gfx942",
        reported=r"(AMD )?Instinct MI325X( OAM| VF)?",
        memory=262144,
        bandwidth=6000,
        single=163.4,
        half=1307.4,
        fp8=2614.9,
        source="AMD Instinct MI325X data sheet",
    ),
    CardModel(
        name="mi355x",
        title="AMD Instinct MI355X",
        architecture="gfx950",
        reported=r"(AMD )?Instinct MI355X( OAM| VF)?",
        memory=294912,
        bandwidth=8000,
        single=157.3,
        half=2516.6,
        fp8=5033.2,
        source="AMD Instinct MI355X data sheet",
    ),
    CardModel(
        name="rx7900xtx",
        title="AMD Radeon RX 7900 XTX",
        architecture="gfx1100",
        reported=r"(AMD )?Radeon RX 7900 XTX",
        memory=24560,  # the kernel driver
        bandwidth=960,
        single=61.4,
        half=122.8,
        fp8=None,
        source="AMD Radeon RX 7900 XTX product page",
    ),
)


def model_of(reported: str, cards: tuple[CardModel, ...]) -> CardModel | None:
    """The entry of a present card by the name its library gives it. None rather than a near
    relative: boards of one family differ in bandwidth by half."""
    return next((card for card in cards if re.fullmatch(card.reported, reported)), None)
