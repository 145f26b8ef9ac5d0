"""Which CPUs the compute threads run on: the policy, and holding threads to it.

Left alone, the system moves a thread to another core, or another NUMA node, whenever it sees fit,
and may put two of them on the hyper-threads of one core.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..kernels_cpu.library import unavailable
from ..kernels_cpu.threads import pool_threads
from . import host

VARIABLE = "TRIMARAN_CPU_THREADS_BIND"
"""Environment variable: `auto`, `off`, or a list of CPUs (`0-3,8`), one for each thread, the first
rank's first."""


@dataclass(frozen=True, slots=True)
class Binding:
    """The CPUs that each compute thread may run on; none where they are not bound. `home`: those
    of the nodes that a rank of several works on, where its memory is to be. `about` is for
    people."""

    about: str
    threads: tuple[frozenset[int], ...] = ()
    home: frozenset[int] = frozenset()


def asked() -> str:
    """What the environment says."""
    return os.environ.get(VARIABLE, "").strip().lower() or "auto"


def available_threads() -> int:
    """Threads of all ranks together: the CPUs that are asked for, or else the physical cores."""
    return _num_asked() or host.physical_cores()


def default_threads() -> int:
    """Threads of a rank that is alone: the CPUs that are asked for, or else torch's own number,
    which minds OMP_NUM_THREADS and what an earlier engine asked for, up to the physical cores."""
    return _num_asked() or min(host.physical_cores(), torch.get_num_threads())


def binding(num_threads: int, rank: int = 0, ranks: int = 1) -> Binding:
    """Where the `num_threads` threads of a rank run. Raises ValueError for a list of CPUs that
    cannot be read, that are not there, or that are too few."""
    if asked() == "off":
        return Binding(f"not bound ({VARIABLE}=off)")
    if reason := unavailable():  # which knows the pool's threads
        return Binding(f"not bound ({reason})")
    cpus = _asked_cpus()
    if cpus is None:
        return _automatic(num_threads, rank, ranks)
    if num_threads * ranks > len(cpus):
        raise ValueError(
            f"{VARIABLE}={asked()} names {len(cpus)} CPUs for {num_threads} threads of each of "
            f"{ranks} ranks; name {num_threads * ranks}, or set --num-threads."
        )
    mine = cpus[rank * num_threads : (rank + 1) * num_threads]
    home = _of_same_nodes(mine) if ranks > 1 else frozenset()
    return Binding(
        f"one each on CPUs {host.format_cpus(mine)} ({VARIABLE})",
        tuple(frozenset({cpu}) for cpu in mine),
        home,
    )


def _num_asked() -> int:
    try:
        return len(_asked_cpus() or ())
    except ValueError:  # `binding` refuses the list
        return 0


def _asked_cpus() -> list[int] | None:
    """The CPUs that are asked for by number; None where none are. Raises ValueError."""
    text = asked()
    if text in ("auto", "off"):
        return None
    try:
        cpus = host.parse_cpus(text)
    except ValueError:
        cpus = []
    if not cpus or len(set(cpus)) < len(cpus):
        raise ValueError(
            f"{VARIABLE} is {text!r}; it must be auto, off, or a list of different CPUs like 0-3,8."
        )
    allowed = host.allowed_cpus()
    if foreign := set(cpus) - allowed:
        raise ValueError(
            f"{VARIABLE}={text} names CPUs that this process may not use "
            f"({host.format_cpus(foreign)}); it may use {host.format_cpus(allowed)}."
        )
    return cpus


def _automatic(num_threads: int, rank: int, ranks: int) -> Binding:
    """One thread a physical core, hyper-threads left out, node after node, if these threads take
    all the cores. If they do not, which ones to take would be a guess that every other process
    with this rule makes alike, and the system, which sees all of them, spreads them better.

    A thread is held to one CPU only where other threads find CPUs beside them: the server's would
    otherwise run on a core of ours, and the thread that has to wait for it could not move to the
    core that its partners, at the next barrier, have left idle. There, threads keep to a node.
    """
    allowed, quota = host.allowed_cpus(), host.quota()
    try:
        cores = host.topology(allowed)
    except OSError as error:
        return Binding(f"not bound (the system does not tell which CPUs share a core: {error})")
    if quota is not None and quota < len(cores):
        return Binding(f"not bound (a quota of {quota} CPUs, on any of {len(cores)} cores)")
    if num_threads != len(cores) // ranks:
        of_ranks = f" of each of {ranks} ranks" if ranks > 1 else ""
        return Binding(f"not bound ({num_threads} threads{of_ranks} on {len(cores)} cores)")
    first = rank * len(cores) // ranks
    mine = cores[first : first + num_threads]
    home = _of_same_nodes([core.cpus[0] for core in mine])
    if len(allowed) > num_threads * ranks:
        cpus = tuple(core.cpus[0] for core in mine)
        about = f"one each on CPUs {host.format_cpus(cpus)}"
        each = tuple(frozenset({cpu}) for cpu in cpus)
    elif len({core.node for core in cores}) > 1:
        about = "each to its NUMA node"
        each = tuple(_of_same_nodes(core.cpus) for core in mine)
    else:
        return Binding("not bound (the server's threads have no CPUs but these)")
    return Binding(about, each, home if ranks > 1 else frozenset())


def _of_same_nodes(cpus: Sequence[int]) -> frozenset[int]:
    """All allowed CPUs of the nodes that `cpus` are on."""
    try:
        cores = host.topology(host.allowed_cpus())
    except OSError:
        return frozenset(cpus)
    nodes = {core.node for core in cores if set(core.cpus) & set(cpus)}
    return frozenset(cpu for core in cores if core.node in nodes for cpu in core.cpus)


class BoundThreads:
    """The threads of one device, held to a binding until `release`.

    Those of the pool are bound when they first compute. The thread that launches is bound for the
    length of a launch, because whatever it starts inherits its CPUs, and it is the caller's.
    """

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._before: dict[int, set[int]] = {}  # thread → its CPUs without any binding
        self._callers: set[int] = set()
        if binding.home:  # this thread loads the weights, which stay where they are first written
            self._bind([threading.get_native_id()], [binding.home])

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        if not self._binding.threads:
            yield
            return
        caller = threading.get_native_id()
        if caller not in self._callers:
            self._callers.add(caller)
            self._bind(pool_threads()[1:], self._binding.threads[1:])
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self._binding.threads[0])
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    def release(self) -> None:
        """Give every thread that still runs the CPUs it had before. Idempotent."""
        for thread, cpus in self._before.items():
            if Path(f"/proc/self/task/{thread}").exists():
                with contextlib.suppress(ProcessLookupError):  # it ended just now
                    os.sched_setaffinity(thread, cpus)
        self._before.clear()
        self._callers.clear()
        self._binding = Binding("released")

    def _bind(self, threads: Sequence[int], cpus: Sequence[frozenset[int]]) -> None:
        # A pool has the CPUs of the thread that it serves, unless another device has bound it.
        free = os.sched_getaffinity(0)
        for thread, its_own in zip(threads, cpus, strict=False):
            os.sched_setaffinity(thread, its_own)
            self._before.setdefault(thread, free)
