"""Which build of torch is installed, which devices it serves, and which one to install instead.

A build for one vendor cannot serve the other's cards, and each has code for some architectures
only. All of this is read from constants of the build; no driver is started.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

Version = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Wheel:
    """An installed build of torch. `cuda`, `hip`: the version it was built for, empty if not;
    `architectures`: what it has code for (`sm_90`, `compute_120`, `gfx942`; empty: unknown)."""

    version: str
    cuda: str = ""
    hip: str = ""
    architectures: tuple[str, ...] = field(default=())

    def runs(self, architecture: str) -> bool:
        """Has it code for a device of `architecture`?"""
        if not self.architectures or not architecture:
            return True
        if architecture.startswith("sm_"):
            return any(_sm_code_runs(code, _sm(architecture)) for code in self.architectures)
        return architecture in self.architectures


@dataclass(frozen=True, slots=True)
class Index:
    """One of PyTorch's own package indexes: the last part of its address, the version of the
    vendor's software it is built for, and the architectures it has code for."""

    name: str
    version: Version
    architectures: tuple[str, ...]

    @property
    def command(self) -> str:
        address = f"https://download.pytorch.org/whl/{self.name}"
        return f"pip install --force-reinstall torch --index-url {address}"


_TURING_ON = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")

# Newest first. CUDA: the support matrices in PyTorch's issues 172352 (2.11) and 178665 (2.12, which
# drops cu128). A driver runs every CUDA release of its own major version (CUDA Compatibility,
# "Minor Version Compatibility"), so that cu126 serves the older drivers.
CUDA_INDEXES: tuple[Index, ...] = (
    Index("cu130", (13, 0), _TURING_ON),
    Index("cu128", (12, 8), _TURING_ON),
    Index("cu126", (12, 6), ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")),
)
# ROCm: PYTORCH_ROCM_ARCH in PyTorch's .ci/docker/manywheel/build.sh.
ROCM_INDEXES: tuple[Index, ...] = (
    Index(
        "rocm7.2",
        (7, 2),
        (
            *("gfx900", "gfx906", "gfx908", "gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100"),
            *("gfx1101", "gfx1102", "gfx1103", "gfx1150", "gfx1151", "gfx1200", "gfx1201"),
        ),
    ),
)


def installed_wheel() -> Wheel:
    """The torch of this process."""
    flags = getattr(torch._C, "_cuda_getArchFlags", lambda: None)() or ""
    return Wheel(
        version=torch.__version__,
        cuda=torch.version.cuda or "",
        hip=torch.version.hip or "",
        # gfx90a:sramecc+:xnack- is gfx90a with features that a process cannot choose anyway
        architectures=tuple(flag.partition(":")[0] for flag in flags.split()),
    )


def best_index(
    indexes: Sequence[Index], architectures: Sequence[str], driver: Version | None = None
) -> Index | None:
    """The newest index with code for all `architectures` that a driver up to `driver` (None: not
    known) can run; None if there is none."""
    for index in indexes:
        runs = all(Wheel("", architectures=index.architectures).runs(a) for a in architectures)
        if runs and (driver is None or index.version[0] <= driver[0]):
            return index
    return None


def _sm(code: str) -> tuple[int, int]:
    """`sm_90a` -> (9, 0)."""
    digits = "".join(c for c in code.partition("_")[2] if c.isdigit())
    return (int(digits[:-1] or 0), int(digits[-1:] or 0))


def _sm_code_runs(code: str, device: tuple[int, int]) -> bool:
    """Machine code runs on later minors of its major, PTX on everything later (CUDA C++
    Programming Guide, "Application Compatibility"); code with a letter only where it says."""
    version = _sm(code)
    if code[-1:].isalpha():
        return version == device
    if code.startswith("compute_"):
        return version <= device
    return version[0] == device[0] and version[1] <= device[1]
