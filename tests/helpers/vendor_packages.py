"""Vendors' distributions, installed by writing what an installer would write."""

from __future__ import annotations

import textwrap
from pathlib import Path

MANIFEST = 'api = ">=0.5,<0.6"\nengine = ">=0.1"\ntorch = ">=2.8"\n'

# A whole platform in torch's own words, of no built-in hull.
_PLATFORM = """
from trimaran.platforms.attention_reference import ReferenceAttention
from trimaran.platforms.host_device import HostDevice
from trimaran.platforms.interface import ApiRange, Capabilities, DeviceInfo, Platform, Probe
from trimaran.platforms.ops import DensePacker, reference_ops


class Vendors(Platform):
    name = {name!r}
    vendor = "vendor"
    api = ApiRange((0, 5), (0, 5))

    @classmethod
    def probe(cls):
        return Probe({score}, "one card", (DeviceInfo(0, "card"),))

    def capabilities(self, device=0):
        return Capabilities(dtypes={{"float32": "native"}}, kv_dtypes=("float32",))

    def open(self, device=0, num_threads=None):
        return HostDevice(device)

    def ops(self):
        return reference_ops()

    def attention(self, spec):
        return (ReferenceAttention(),)

    def weight_packers(self):
        return {{"dense": DensePacker()}}
"""


def install(
    site: Path,
    name: str,
    code: str = "",
    *,
    manifest: str | None = MANIFEST,
    release: str = "",
    score: int = 50,
) -> Path:
    """The distribution `vendor-NAME` 1.0 (or `release`) with the platform `name`, whose module ends
    with `code`. Returns the package's folder."""
    release = release or f"vendor-{name}"
    module = release.replace("-", "_")
    package = site / module
    package.mkdir(parents=True)
    source = _PLATFORM.format(name=name, score=score) + textwrap.dedent(code)
    (package / "__init__.py").write_text(source)
    if manifest is not None:
        (package / "trimaran-platform.toml").write_text(manifest)
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {release}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[trimaran.platforms]\n{name} = {module}:Vendors\n")
    return package
