"""NVIDIA GPUs: torch built for CUDA, NVML for what is known without starting it."""

from __future__ import annotations

from . import nvml
from .cuda_flash_attention import FlashAttention2, FlashAttention3
from .cuda_flashinfer import FlashInfer
from .gpu_cards import Card, Survey, Vendor
from .gpu_platform import GpuPlatform
from .gpu_tables import NVIDIA, NVIDIA_CARDS
from .gpu_wheels import CUDA_INDEXES, Wheel
from .interface import ApiRange, Telemetry
from .visible import read_visibility


class CudaPlatform(GpuPlatform):
    name = "cuda"
    vendor = "nvidia"
    api = ApiRange((0, 5), (0, 5))
    vendor_facts = Vendor("NVIDIA", "CUDA", CUDA_INDEXES, "CUDA_DEVICE_ORDER=PCI_BUS_ID")
    architectures = NVIDIA
    models = NVIDIA_CARDS
    libraries = (FlashAttention3, FlashAttention2, FlashInfer)

    @classmethod
    def survey(cls) -> Survey:
        return nvml.survey(read_visibility())

    @classmethod
    def built_for(cls, wheel: Wheel) -> str:
        return wheel.cuda

    @classmethod
    def read_telemetry(cls, card: Card) -> Telemetry:
        return nvml.telemetry(card)
