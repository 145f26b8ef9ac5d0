"""What management libraries answer on real machines, and modules that answer so.

Every figure is transcribed from the public report in `source`; a UUID or serial that none gives is
invented and begins with zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

# ---------------------------------------------------------------------------------------------
# NVIDIA
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NvidiaCard:
    """One card as nvidia-smi shows it. `memory` MiB; `instances`: MIG UUIDs (None: MIG is off)."""

    name: str
    memory: int
    capability: tuple[int, int]
    source: str
    uuid: str
    instances: tuple[str, ...] | None = None
    instance_memory: int = 0
    broken: bool = False


H100 = NvidiaCard(
    "NVIDIA H100 80GB HBM3",
    81559,
    (9, 0),
    "nvidia-smi of an H100 SXM, HAMi's documentation; capability: NVIDIA's list of CUDA GPUs",
    "GPU-00000000-0000-0000-0000-000000000100",
)
H200 = NvidiaCard(
    "NVIDIA H200",
    143771,
    (9, 0),
    "nvidia-smi, as apodex's tests quote it; capability: NVIDIA's list of CUDA GPUs",
    "GPU-00000000-0000-0000-0000-000000000200",
)
A100 = NvidiaCard(
    "NVIDIA A100-SXM4-80GB",
    81920,
    (8, 0),
    "nvidia-smi -a in github.com/NVIDIA/CUDALibrarySamples issue 104",
    "GPU-a75cda02-62ce-2c30-9150-555ef08935e2",
)
L4 = NvidiaCard(
    "NVIDIA L4",
    23034,
    (8, 9),
    "nvidia-smi in github.com/speaches-ai/speaches pull request 438 (driver 570.133.20)",
    "GPU-00000000-0000-0000-0000-000000000004",
)
RTX4090 = NvidiaCard(
    "NVIDIA GeForce RTX 4090",
    24564,
    (8, 9),
    "nvidia-smi in github.com/RLinf/RLinf issue 255 (driver 550.163.01)",
    "GPU-00000000-0000-0000-0000-000000004090",
)
# Four cards of one machine, the first in MIG mode: github.com/influxdata/telegraf issue 5812.
_TELEGRAF = "nvidia-smi -L in github.com/influxdata/telegraf issue 5812"
MIG_BOX = (
    NvidiaCard(
        "NVIDIA A100-SXM4-80GB",
        81920,
        (8, 0),
        _TELEGRAF,
        "GPU-513536b6-7d19-9063-b049-1e69664bb298",
        (
            "MIG-ce861fb0-a248-58ce-a9a8-f9adbc22a66a",
            "MIG-a45882f0-9215-5733-a0c1-49286ab31cb5",
            "MIG-f00d722c-f4e1-52c9-aa31-750441ae1bfe",
            "MIG-930574a9-d43a-5d2b-95da-3e68384c8d6b",
        ),
        instance_memory=19968,
    ),
    *(
        NvidiaCard("NVIDIA A100-SXM4-80GB", 81920, (8, 0), _TELEGRAF, uuid)
        for uuid in (
            "GPU-d8594bd4-0fc3-8595-e355-7c98138f3b95",
            "GPU-5e375e7e-b41f-155b-dcdc-534524c356fc",
            "GPU-69ec2344-ebac-b028-f88f-452abb3d7f11",
        )
    ),
)
# Driver releases and the CUDA that nvidia-smi prints beside them, in the reports named above and in
# github.com/bottlerocket-os/bottlerocket-core-kit pull request 834 (580.126.09, CUDA 13.0).
DRIVER_580, DRIVER_570, DRIVER_550 = 13000, 12080, 12040


class NVMLError(Exception):
    """Also the base of the real module's errors."""


def fake_pynvml(
    cards: Sequence[NvidiaCard], driver: int = DRIVER_580, init_error: str = ""
) -> ModuleType:
    """A module `pynvml` on a machine with `cards`. A handle is a card, or (card, instance)."""
    nvml: Any = ModuleType("pynvml")
    nvml.NVMLError = NVMLError
    nvml.NVML_DEVICE_MIG_ENABLE = 1
    nvml.NVML_TEMPERATURE_GPU = 0
    nvml.NVML_CLOCK_SM = 1
    nvml.open_sessions = 0

    def start() -> None:
        if init_error:
            raise NVMLError(init_error)
        nvml.open_sessions += 1

    def stop() -> None:
        nvml.open_sessions -= 1

    def handle_of(index: int) -> NvidiaCard:
        if cards[index].broken:
            raise NVMLError("GPU is lost")
        return cards[index]

    def handle_of_uuid(uuid: str) -> Any:
        parts = [(c, u) for c in cards for u in c.instances or ()]
        found = [c for c in cards if c.uuid == uuid] + [p for p in parts if p[1] == uuid]
        if not found:
            raise NVMLError("Not Found")
        return found[0]

    def instance(card: NvidiaCard, index: int) -> Any:
        if index >= len(card.instances or ()):
            raise NVMLError("Not Found")
        return card, (card.instances or ())[index]

    def memory(handle: Any) -> SimpleNamespace:
        size = handle[0].instance_memory if isinstance(handle, tuple) else handle.memory
        return SimpleNamespace(total=size << 20, used=size << 19)

    def mig_mode(card: NvidiaCard) -> tuple[int, int]:
        if card.capability < (8, 0) or card.capability == (8, 9):
            raise NVMLError("Not Supported")
        mode = int(card.instances is not None)
        return mode, mode

    def not_supported(*args: Any) -> Any:
        raise NVMLError("Not Supported")

    nvml.nvmlInit, nvml.nvmlShutdown = start, stop
    nvml.nvmlDeviceGetCount = lambda: len(cards)
    nvml.nvmlDeviceGetHandleByIndex = handle_of
    nvml.nvmlDeviceGetHandleByUUID = handle_of_uuid
    nvml.nvmlSystemGetCudaDriverVersion_v2 = lambda: driver
    nvml.nvmlDeviceGetCudaComputeCapability = lambda card: card.capability
    nvml.nvmlDeviceGetName = lambda card: card.name
    nvml.nvmlDeviceGetUUID = lambda h: h[1] if isinstance(h, tuple) else h.uuid
    nvml.nvmlDeviceGetMemoryInfo = memory
    nvml.nvmlDeviceGetMigMode = mig_mode
    nvml.nvmlDeviceGetMaxMigDeviceCount = lambda card: 7
    nvml.nvmlDeviceGetMigDeviceHandleByIndex = instance
    # A card under load that its power cap holds down, and one figure it cannot tell.
    nvml.nvmlDeviceGetPowerUsage = lambda handle: 698_500
    nvml.nvmlDeviceGetUtilizationRates = lambda handle: SimpleNamespace(gpu=97, memory=60)
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 0x4 | 0x1
    nvml.nvmlDeviceGetTemperature = lambda handle, sensor: 61
    nvml.nvmlDeviceGetClockInfo = not_supported
    return nvml  # type: ignore[no-any-return]


# ---------------------------------------------------------------------------------------------
# AMD
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AmdCard:
    """One card as amdsmi answers. `asic`: amdsmi_get_gpu_asic_info; `memory` MiB."""

    asic: dict[str, Any]
    memory: int | str
    source: str
    hip_id: int | str | None = None
    broken: bool = False
    bdf: str = field(default="0000:05:00.0")


def _asic(name: str, device: str, architecture: str, serial: str) -> dict[str, Any]:
    return {
        "market_name": name,
        "device_id": device,
        "asic_serial": serial,
        "target_graphics_version": architecture,
        "vendor_name": "Advanced Micro Devices Inc. [AMD/ATI]",
    }


MI210 = AmdCard(
    _asic("AMD Instinct MI210", "0x740f", "gfx90a", "0x2086B889727CEEC2"),
    65520,
    "rocminfo in github.com/ROCm/legacy-rocm-build issues 2595 (chip id) and 3460 (pool size), "
    "github.com/JuliaGPU/AMDGPU.jl issue 797 (UUID)",
)
MI300X = AmdCard(
    _asic("AMD Instinct MI300X", "0x74a1", "gfx942", "0x8AF705259683161C"),
    196592,
    "rocminfo in github.com/ROCm/legacy-rocm-build issue 4414; 206141652992 bytes in issue 4750",
)
MI325X = AmdCard(
    _asic("AMD Instinct MI325X", "0x74a5", "gfx942", "0x00000000000325A0"),
    262144,
    "github.com/apache/cloudstack issue 11701 (device id); size: AMD's data sheet",
)
MI355X = AmdCard(
    _asic("AMD Instinct MI355X", "0x75a3", "gfx950", "0x00000000000355A0"),
    294912,
    "github.com/unslothai/unsloth pull request 4051 (name, architecture); size: data sheet",
)
RX7900XTX = AmdCard(
    _asic("Radeon RX 7900 XTX", "0x744c", "gfx1100", "0x398A3F843A146602"),
    24560,
    "rocminfo in github.com/ollama/ollama issue 3158; size: github.com/ilya-zlobintsev/LACT "
    "pull request 533",
)
# amd-smi of ROCm 6.1 knows no target_graphics_version, and a missing entry in amdgpu.ids makes the
# name a number (both: the source of amdsmi_get_gpu_asic_info before and after).
OLD_MI300X = AmdCard(
    {"market_name": "0x74a1", "device_id": 0x74A1, "asic_serial": "N/A"},
    "N/A",
    "amdsmi of ROCm 6.1 and before",
)


class AmdSmiException(Exception):
    """Also the base of the real module's errors."""


def fake_amdsmi(cards: Sequence[AmdCard], init_error: str = "") -> ModuleType:
    """A module `amdsmi` on a machine with `cards`; a handle is a card."""
    smi: Any = ModuleType("amdsmi")
    smi.AmdSmiException = AmdSmiException
    smi.AmdSmiClkType = SimpleNamespace(GFX="gfx")
    smi.AmdSmiTemperatureType = SimpleNamespace(HOTSPOT="hotspot")
    smi.AmdSmiTemperatureMetric = SimpleNamespace(CURRENT="current")
    smi.open_sessions = 0

    def start() -> None:
        if init_error:
            raise AmdSmiException(init_error)
        smi.open_sessions += 1

    def stop() -> None:
        smi.open_sessions -= 1

    def asic(card: AmdCard) -> dict[str, Any]:
        if card.broken:
            raise AmdSmiException("Error code:\n\t2 | AMDSMI_STATUS_NOT_SUPPORTED")
        return card.asic

    def by_bdf(bdf: str) -> AmdCard:
        return next(card for card in cards if card.bdf == bdf)

    smi.amdsmi_init, smi.amdsmi_shut_down = start, stop
    smi.amdsmi_get_processor_handles = lambda: list(cards)
    smi.amdsmi_get_gpu_asic_info = asic
    smi.amdsmi_get_gpu_vram_info = lambda card: {"vram_size": card.memory}
    smi.amdsmi_get_gpu_vram_usage = lambda card: {"vram_total": 196592, "vram_used": 288}
    smi.amdsmi_get_gpu_device_bdf = lambda card: card.bdf
    smi.amdsmi_get_processor_handle_from_bdf = by_bdf
    if any(card.hip_id is not None for card in cards):
        smi.amdsmi_get_gpu_enumeration_info = lambda card: {"hip_id": card.hip_id}
    smi.amdsmi_get_power_info = lambda card: {
        "current_socket_power": "N/A",
        "average_socket_power": 134,
    }
    smi.amdsmi_get_gpu_activity = lambda card: {"gfx_activity": 64, "umc_activity": "N/A"}
    smi.amdsmi_get_clock_info = lambda card, kind: {"clk": 1700}
    smi.amdsmi_get_temp_metric = lambda card, sensor, metric: 43
    smi.amdsmi_get_violation_status = lambda card: {
        "active_ppt_pwr": True,
        "active_socket_thrm": False,
        "active_vr_thrm": "N/A",
    }
    return smi  # type: ignore[no-any-return]
