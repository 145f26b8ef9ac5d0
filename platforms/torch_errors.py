"""What torch raises for an accelerator, as the contract's errors."""

from __future__ import annotations

import torch

from .interface import DeviceLost, DeviceOutOfMemory

# After one of these the context is dead and every later call fails, whatever the reason was (CUDA
# Runtime API, "cudaError_t": those after which "the process must be terminated and relaunched";
# HIP words them alike).
_FATAL = (
    "illegal memory access",
    "illegal instruction",
    "illegal address",
    "unspecified launch failure",
    "launch timed out",
    "device-side assert",
    "uncorrectable ECC",
    "uncorrectable NVLink",
    "misaligned address",
    "hardware stack error",
    "invalid program counter",
    "address space",
    "capable device",  # none is detected, or it is busy or unavailable
    "driver shutting down",
    "context is destroyed",
    "device unavailable",
    "unknown error",
)


def translated(error: BaseException) -> BaseException:
    """The contract's error for `error`, or `error` itself where it is none of the device's."""
    if isinstance(error, DeviceLost | DeviceOutOfMemory):
        return error
    if isinstance(error, torch.OutOfMemoryError):
        return _with_cause(DeviceOutOfMemory(_first_line(error)), error)
    if isinstance(error, RuntimeError) and _from_runtime(error):
        text = str(error)
        if "out of memory" in text:
            return _with_cause(DeviceOutOfMemory(_first_line(error)), error)
        if any(phrase in text for phrase in _FATAL):
            return _with_cause(DeviceLost(_first_line(error)), error)
    return error


def _from_runtime(error: RuntimeError) -> bool:
    return any(word in str(error) for word in ("CUDA", "HIP", "NCCL", "RCCL", "ROCm"))


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _with_cause(raised: BaseException, cause: BaseException) -> BaseException:
    raised.__cause__ = cause
    return raised
