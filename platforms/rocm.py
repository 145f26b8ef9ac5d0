"""AMD GPUs: torch built for ROCm, amdsmi for what is known without starting it."""

from __future__ import annotations

from . import amd_smi
from .gpu_cards import Card, Survey, Vendor
from .gpu_platform import GpuPlatform
from .gpu_tables import AMD, AMD_CARDS
from .gpu_wheels import ROCM_INDEXES, Wheel
from .interface import ApiRange, Telemetry
from .rocm_aiter import Aiter
from .visible import read_visibility


class RocmPlatform(GpuPlatform):
    name = "rocm"
    vendor = "amd"
    api = ApiRange((0, 5), (0, 5))
    vendor_facts = Vendor("AMD", "ROCm", ROCM_INDEXES)
    architectures = AMD
    models = AMD_CARDS
    libraries = (Aiter,)

    @classmethod
    def survey(cls) -> Survey:
        return amd_smi.survey(read_visibility())

    @classmethod
    def built_for(cls, wheel: Wheel) -> str:
        return wheel.hip

    @classmethod
    def read_telemetry(cls, card: Card) -> Telemetry:
        return amd_smi.telemetry(card)
