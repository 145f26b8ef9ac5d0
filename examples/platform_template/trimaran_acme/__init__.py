"""Acme's platform for Trimaran: copy the package, rename it, replace what is marked VENDOR.

Its device is host memory behind a queue: as on an accelerator, `launch` returns at once.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from trimaran.platforms import interface as tri

from .attention import AcmeAttention
from .device import AcmeDevice
from .ops import AcmeOp, AcmePacker, linear, linear_silu_mul, rms_norm, silu_mul

NUM_DEVICES = 2
MAX_SEQS = 64


class AcmePlatform(tri.Platform):
    """What is not overridden has a default: Gloo through host memory, no graphs, no telemetry."""

    name = "acme"  # the entry point's name in pyproject.toml
    vendor = "Acme"
    api = tri.ApiRange((0, 5), (0, 5))  # as in trimaran-platform.toml
    memory: ClassVar[int] = 1 << 30  # bytes a device; VENDOR: ask the driver

    @classmethod
    def probe(cls) -> tri.Probe:
        # VENDOR: count the cards by a management library or /sys, without a context or a thread.
        # Score 0 and a reason where there is none; else more than the processor's 10. This one
        # stays below, so that nobody gets it unasked.
        devices = (tri.DeviceInfo(i, "Acme One", cls.memory) for i in range(NUM_DEVICES))
        return tri.Probe(5, "the template's devices, made of host memory", tuple(devices))

    def capabilities(self, device: int = 0) -> tri.Capabilities:
        # VENDOR: facts of the card. Shared code decides by these and never asks for your name.
        return tri.Capabilities(
            dtypes={"float32": "native", "bfloat16": "native"},
            kv_dtypes=("float32", "bfloat16"),
            run_ahead=1,  # launches are asynchronous: a step is planned while one runs
        )

    def open(self, device: int = 0, num_threads: int | None = None) -> tri.Device:
        if device not in range(NUM_DEVICES):
            raise ValueError(f"acme has {NUM_DEVICES} devices; there is no device {device}.")
        return AcmeDevice(device, self.memory)  # VENDOR: num_threads is for the host's part

    def ops(self) -> Mapping[str, Sequence[tri.OpImpl]]:
        # VENDOR: what you have, several of one op if you like. The rest falls back to torch.
        own = AcmeOp("linear", linear), AcmeOp("rms_norm", rms_norm), AcmeOp("silu_mul", silu_mul)
        return {impl.op: [impl] for impl in own}

    def fusions(self) -> Sequence[tri.Fusion]:
        fused = AcmeOp("linear+silu_mul", linear_silu_mul)
        return [tri.Fusion("acme-mlp", ("linear", "silu_mul"), fused)]

    def attention(self, spec: tri.AttentionSpec) -> Sequence[tri.AttentionImpl]:
        return [AcmeAttention()]

    def weight_packers(self) -> Mapping[str, tri.WeightPacker]:
        return {AcmePacker.format: AcmePacker()}

    def kv_constraints(self, spec: tri.AttentionSpec) -> tri.KVConstraints:
        # VENDOR: what the attention kernel's loads and the copy engine need.
        return tri.KVConstraints(block_multiple=16, alignment=64, layouts=("acme",))

    def step_limits(self, plan: Mapping[str, Any]) -> tri.StepLimits:
        # VENDOR: token_buckets if you compile for sizes, mixed_batches=False if prompts go alone.
        return tri.StepLimits(max_tokens=4096)

    def review(self, plan: Mapping[str, Any]) -> Sequence[tri.Finding]:
        # VENDOR: what you would change in a plan or must refuse; the engine does it and logs why.
        reason = f"the command processor keeps track of {MAX_SEQS} sequences"
        adjust = tri.Finding("adjust", "max_num_seqs", reason, MAX_SEQS)
        return [adjust] if plan["max_num_seqs"] > MAX_SEQS else []

    def describe(self) -> Mapping[str, str]:
        # VENDOR: versions of driver and libraries, for `trimaran doctor` and bug reports.
        return {"driver": "none: a template", "queue": "one worker thread a device"}
