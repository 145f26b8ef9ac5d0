"""The native library: loading it, the instruction set in use, and running programs of calls."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from .build import LIBRARY

VERSION = 2
"""Of the calls and the packed layouts; `VERSION` in csrc/abi.h."""
ISAS = ("none", "avx2", "avx512", "avx512_bf16", "amx")
"""In rising order; the library's own numbers."""
CAP = "TRIMARAN_CPU_ISA"
"""Environment variable: the highest instruction set to use."""
OTHER = "TRIMARAN_CPU_LIBRARY"
"""Environment variable: another build of the library to load."""
NOT_BUILT = (
    "no g++ at installation, or one that failed: install g++, then Trimaran again, by pip with "
    "-v --force-reinstall --no-deps --no-cache-dir, which shows what g++ says"
)
SCRATCH_BYTES = 2 << 20
"""For each thread: rows of activations as a kernel multiplies them."""

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


class NativeUnavailable(RuntimeError):
    """The native kernels cannot be used here; the message says why."""


class Call(ctypes.Structure):
    """One call of one kernel, as `csrc/abi.h` has it; what the arrays mean stands at each kernel.
    Whoever fills in addresses keeps the tensors alive."""

    _fields_ = [
        ("kernel", ctypes.c_int32),
        ("element", ctypes.c_int32),
        ("rows", ctypes.c_int64),
        ("rows_per_token", ctypes.c_int64),
        ("input", ctypes.c_void_p * 8),
        ("output", ctypes.c_void_p * 4),
        ("n", ctypes.c_int64 * 12),
        ("f", ctypes.c_float * 4),
    ]


class _Run(ctypes.Structure):
    _fields_ = [
        ("tokens", ctypes.c_int64),
        ("plans", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("scratch_bytes", ctypes.c_int64),
        ("num_threads", ctypes.c_int32),
    ]


class Library:
    """The loaded library with one instruction set. Thread-safe: each thread that calls has scratch
    memory of its own (and, from OpenMP, a pool of its own: one thread should do it)."""

    def __init__(self, path: Path, cap: str | None = None) -> None:
        """`cap`: the highest instruction set to use. Raises NativeUnavailable."""
        try:
            self._native = ctypes.CDLL(str(path))
        except OSError as error:
            raise NativeUnavailable(f"the native kernels do not load: {error}") from None
        self._refuse_another_version(path)
        self._native.trimaran_kernel_name.restype = ctypes.c_char_p
        self._native.trimaran_count.restype = ctypes.c_int64
        self.emulated = bool(self._native.trimaran_emulated())
        self.detected = ISAS[self._native.trimaran_isa()]
        self.isa = _capped(self.detected, cap)
        self._isa = ISAS.index(self.isa)
        self._kernels = self._names()
        self._local = threading.local()

    @property
    def entry_points(self) -> ctypes.CDLL:
        """What the library exports beside programs of kernels; see `collective` and `threads`."""
        return self._native

    @property
    def about(self) -> str:
        """The instruction set for people."""
        return f"{self.isa} (emulated)" if self.emulated else self.isa

    def count(self, kernel: str, isa: str) -> int:
        """How often this process has run a kernel by an instruction set."""
        count: int = self._native.trimaran_count(ISAS.index(isa), self._kernels[kernel])
        return count

    def _refuse_another_version(self, path: Path) -> None:
        try:
            version, size = self._native.trimaran_version(), self._native.trimaran_call_bytes()
        except AttributeError:  # not this library, or from before it had a version
            version, size = None, None
        if (version, size) != (VERSION, ctypes.sizeof(Call)):
            raise NativeUnavailable(
                f"{path} is of version {version} (calls of {size} bytes); this package needs "
                f"{VERSION} ({ctypes.sizeof(Call)} bytes): build it again "
                "(python -m trimaran.kernels_cpu.build)"
            )

    def _names(self) -> dict[str, int]:
        names: dict[str, int] = {}
        while (name := self._native.trimaran_kernel_name(len(names))) is not None:
            names[name.decode()] = len(names)
        return names

    def call(self, kernel: str, dtype: torch.dtype, rows: int = 0, per_token: int = 0) -> Call:
        """A call to fill in, of `rows` rows and `per_token` rows for each token of the run."""
        return Call(self._kernels[kernel], ELEMENTS[dtype], rows, per_token)

    def program(self, calls: Sequence[Call]) -> ctypes.Array[Call]:
        return (Call * len(calls))(*calls)

    def run(self, program: ctypes.Array[Call], tokens: int = 0, plans: int = 0) -> None:
        """Run a program with torch's number of threads. `plans`: address of the table of attention
        plans."""
        run = self._prepared()
        run.tokens, run.plans = tokens, plans
        self._native.trimaran_run(program, len(program), ctypes.byref(run), self._isa)

    def run_one(self, call: Call, alone: bool = False) -> None:
        """Run one call; `alone`: on this thread, without waking the pool."""
        run = self._prepared()
        threads, run.tokens, run.plans = run.num_threads, 0, 0
        run.num_threads = 1 if alone else threads
        self._native.trimaran_run(ctypes.byref(call), 1, ctypes.byref(run), self._isa)
        run.num_threads = threads

    def _prepared(self) -> _Run:
        threads = torch.get_num_threads()
        run: _Run | None = getattr(self._local, "run", None)
        if run is None or run.num_threads != threads:
            scratch = torch.empty(threads * SCRATCH_BYTES + 64, dtype=torch.uint8)
            start = (scratch.data_ptr() + 63) // 64 * 64
            run = _Run(0, None, start, SCRATCH_BYTES, threads)
            self._local.run, self._local.scratch = run, scratch
        return run


def asked_cap() -> str | None:
    """What the environment says of the highest instruction set; None: nothing."""
    return os.environ.get(CAP, "").strip().lower() or None


def wrong_cap(cap: str | None) -> str:
    """What is wrong with such a cap; empty if nothing."""
    if cap is None or cap in ISAS[1:]:
        return ""
    return f"{CAP} is {cap!r}; it must be one of {', '.join(ISAS[1:])}."


def _capped(detected: str, cap: str | None) -> str:
    if detected == "none":
        raise NativeUnavailable("the native kernels need AVX2, FMA and F16C")
    if wrong := wrong_cap(cap):
        raise NativeUnavailable(wrong)
    if cap is None:
        return detected
    return ISAS[min(ISAS.index(cap), ISAS.index(detected))]


@functools.cache
def library() -> Library:
    """The library of this installation, loaded once. Raises NativeUnavailable."""
    other = os.environ.get(OTHER)
    path = Path(other) if other else Path(__file__).parent / LIBRARY
    if not path.exists():
        why = f"{OTHER} names it" if other else NOT_BUILT
        raise NativeUnavailable(f"the native kernels were not built: no {path.name} ({why})")
    return Library(path, asked_cap())


@functools.cache
def unavailable() -> str:
    """Why the native kernels cannot be used here; empty where they can."""
    try:
        library()
    except NativeUnavailable as error:
        return str(error)
    return ""


def about() -> str:
    """The instruction set in use, or why there is none, for people."""
    return unavailable() or library().about


def use(isa: str) -> None:
    """That instruction set and no lower one, in this process, if it has not called a kernel yet,
    and in those it starts. Raises NativeUnavailable."""
    os.environ[CAP] = isa
    library.cache_clear()
    unavailable.cache_clear()
    if library().isa != isa:
        raise NativeUnavailable(
            f"the kernels have {library().detected} here, not {isa}; {OTHER} can name a build that "
            "emulates it (python -m trimaran.kernels_cpu.build emulated FOLDER)"
        )
