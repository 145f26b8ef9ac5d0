"""The least that is a platform: for tests of what is around one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trimaran.platforms.host_device import HostDevice
from trimaran.platforms.interface import (
    PLATFORM_API,
    ApiRange,
    AttentionImpl,
    AttentionSpec,
    Capabilities,
    Device,
    OpImpl,
    Platform,
    Probe,
)


class Minimal(Platform):
    name = "minimal"
    vendor = "test"
    api = ApiRange(PLATFORM_API, PLATFORM_API)

    @classmethod
    def probe(cls) -> Probe:
        return Probe(5, "always there")

    def capabilities(self, device: int = 0) -> Capabilities:
        return Capabilities(dtypes={"float32": "native"})

    def open(self, device: int = 0, num_threads: int | None = None) -> Device:
        return HostDevice()

    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        return {}

    def attention(self, spec: AttentionSpec) -> Sequence[AttentionImpl]:
        return ()
