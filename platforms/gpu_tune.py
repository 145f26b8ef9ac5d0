"""Measures a tuning table's entries on the card at hand: the part of `trimaran tune` that needs
Triton and a device. The search is in `tune_search`, what it has found so far in `tune_journal`."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels_cuda.portable.case import Case
from ..kernels_cuda.portable.spaces import SPACES, Axis, axes_of
from ..kernels_cuda.portable.tuning import Entry, Table, Watched, fingerprint
from .gpu_binaries import compiling_only, resources
from .gpu_kernels import RELATIVES, table_for
from .gpu_tables import SHARED_LIMIT
from .graph_pool import GraphPool
from .ops import OPS, Tolerance
from .tune_journal import Journal, Result, Values
from .tune_search import CardLost, Job, Launches, OutOfTime, Refused, Search, Timer

SEED = 7
COLD_BYTES = 512 << 20
"""More than any card's last cache holds."""
REPEATS, WARM_UP = 30, 5
_VENDOR_OPTIONS: Mapping[str, Mapping[str, tuple[int, Axis]]] = {
    "gfx": {"waves_per_eu": (0, (0, 1, 2, 3, 4)), "matrix_instr_nonkdim": (0, (16, 32))}
}
"""By the beginning of an architecture's name: launch options that one vendor's compiler has, each
with what stands for leaving it out (Triton's `backends/amd/compiler.py`) and what may be tried."""
_CODES = {
    dtype: Tolerance(0.125, 0.125)  # three bits of mantissa: a neighbour
    for dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
} | {torch.float8_e5m2: Tolerance(0.25, 0.25)}
_STEP = 1
"""int8 holds rounded floats, whose sums may be taken in another order: a code may be the next."""


class GraphTimer:
    """The median of a recorded launch, with cold caches and nothing of the host's time."""

    def __init__(self, device: torch.device) -> None:
        cuda: Any = torch.cuda
        cuda.set_device(device)  # Triton launches on the current one
        self._event = cuda.Event
        self._stream = cuda.Stream()  # work on the default one cannot be recorded
        self._graphs = GraphPool(cuda, device.index or 0)
        self._cold = torch.empty(COLD_BYTES, dtype=torch.uint8, device=device)

    def __call__(self, launch: Callable[[], Any]) -> float:
        """Seconds. Raises `Refused` for what cannot be recorded or run."""
        try:
            return statistics.median(self._times(launch)) / 1e3
        except RuntimeError as error:
            raise _refused(error) from error

    def _times(self, launch: Callable[[], Any]) -> list[float]:
        launch()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            graph, _ = self._graphs.record(launch)
        for _ in range(WARM_UP):
            graph.replay()
        edges = []
        for _ in range(REPEATS):
            start, end = (self._event(enable_timing=True) for _ in "se")
            self._cold.zero_()
            start.record()
            graph.replay()
            end.record()
            edges.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in edges]


class CaseRunner:
    """`Job.prepare` of an entry: launches of its cases with other values in its place. The first
    values it is given are the start's: what they compute is what all others have to."""

    def __init__(
        self, table: Table, kernel: str, number: int, cases: Sequence[Case], device: torch.device
    ) -> None:
        self._table = table
        self._kernel, self._number = kernel, number
        self._cases = cases
        self._device = device
        self._limit = shared_limit(table.architecture)
        self._expected: dict[str, list[Tensor]] = {}

    def __call__(self, values: Values) -> Launches:
        table = with_values(self._table, self._kernel, self._number, values)
        try:
            return {case.label: self._launch(case, table) for case in self._cases}
        except Refused:
            raise
        except Exception as error:  # a compiler's, a driver's
            raise _refused(error) from error

    def _launch(self, case: Case, table: Table) -> Callable[[], Any]:
        launch, found = self._run(case, table)
        if case.label not in self._expected:
            self._expected[case.label] = found
            found = self._run(case, table)[1]  # is it the same twice?
        if reason := difference(found, self._expected[case.label]):
            raise Refused(f"{case.label}: {reason}")
        return launch

    def _run(self, case: Case, table: Table) -> tuple[Callable[[], Any], list[Tensor]]:
        """The launch and what it computed, after a look at what is about to run."""
        torch.manual_seed(SEED)
        launch = case.call(self._device, table)
        with compiling_only() as binaries:
            launch()
        for binary in dict.fromkeys(binaries):
            if excess := resources(binary).excess(self._limit):
                raise Refused(f"{case.label}: {binary.name} {excess}")
        return launch, [one.clone() for one in tensors_of(launch())]


def with_values(table: Table, kernel: str, number: int, values: Values) -> Table:
    entry = dataclasses.replace(table.entries[kernel][number], values=dict(values))
    return table.with_entry(kernel, number, entry)


def shared_limit(architecture: str) -> int | None:
    """None: not known here; the driver refuses what is too much."""
    return SHARED_LIMIT.get(RELATIVES.get(architecture, architecture))


def tensors_of(found: Any) -> list[Tensor]:
    """All tensors in what a launch returns, through tuples and dataclasses."""
    if isinstance(found, Tensor):
        return [found]
    if dataclasses.is_dataclass(found):
        found = [getattr(found, field.name) for field in dataclasses.fields(found)]
    parts = found if isinstance(found, list | tuple) else ()
    return [one for part in parts for one in tensors_of(part)]


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> str:
    """What differs by more than the order of sums explains; empty: nothing."""
    for number, (mine, wanted) in enumerate(zip(found, expected, strict=True)):
        wrong = _wrong(mine, wanted)
        if count := int(wrong.sum()):
            return f"{count} of {wanted.numel()} numbers of result {number} differ"
    return ""


def _wrong(found: Tensor, expected: Tensor) -> Tensor:
    """Bool, of the results' shape. Floats by the tolerance of the op `linear`, whose absolute part
    counts in units of the results' size; integers have to be equal."""
    if found.dtype == torch.int8:
        return (found.int() - expected.int()).abs() > _STEP
    if not found.is_floating_point():
        return found != expected
    known = {**OPS["linear"].tolerance, **_CODES}
    rtol, atol = known.get(found.dtype, Tolerance(0.0, 0.0))
    mine, wanted = found.double(), expected.double()
    size = wanted.nan_to_num(0.0, 0.0, 0.0).square().mean().sqrt()
    near = (mine - wanted).abs() <= rtol * wanted.abs() + atol * size
    return ~(near | (mine == wanted) | (mine.isnan() & wanted.isnan()))


def _refused(error: Exception) -> Refused:
    """Does the device still answer?"""
    lines = str(error).strip().splitlines() or [""]
    reason = f"{type(error).__name__}: {lines[0]}"
    runtime: Any = torch.cuda
    try:
        if runtime.is_initialized():
            runtime.synchronize()
    except RuntimeError:
        return CardLost(reason)
    return Refused(reason)


@dataclasses.dataclass(frozen=True, slots=True)
class Tuning:
    """What is tuned where. `tell` is given what happens to a candidate."""

    table: Table
    cases: Sequence[Case]
    device: torch.device
    timer: Timer
    journal: Journal
    in_time: Callable[[], bool]
    tell: Callable[[str], None]

    def run(self, kernels: Sequence[str]) -> Iterator[str]:
        """Tunes all entries of `kernels`, those that the journal does not have; yields each one's
        name when it is done with. Raises `OutOfTime`; `CardLost`."""
        for kernel in kernels:
            names = [_name(kernel, number) for number in range(len(self.table.entries[kernel]))]
            open_ = [name not in self.journal.finished for name in names]
            reached = self._reached(kernel) if any(open_) else {}
            for number, name in enumerate(names):
                if open_[number]:
                    self._tune(kernel, number, reached.get(number, []))
                yield name

    def _reached(self, kernel: str) -> dict[int, list[Case]]:
        """The cases by the number of the entry that they are launched with."""
        found: dict[int, list[Case]] = {}
        for case in self.cases:
            if case.kernel != kernel or not case.fits(self.table):
                continue
            if not self.in_time():
                raise OutOfTime
            watched = Watched(self.table)
            try:
                case.call(self.device, watched)()
            except Exception as error:  # a card too small, a kernel that fails on it
                refused = _refused(error)
                self.tell(f"{kernel}: the case {case.label} is left out: {refused}")
                if isinstance(refused, CardLost):
                    raise refused from error
            for picked, number in watched.picked:
                if picked == kernel:
                    found.setdefault(number, []).append(case)
        return found

    def _tune(self, kernel: str, number: int, cases: Sequence[Case]) -> None:
        name = _name(kernel, number)
        if not cases:
            return self.journal.skip(name, "no case reaches it on this card")
        options = vendor_options(self.table.architecture)
        start = start_of(self.table.entries[kernel][number].values, options)
        axes = axes_of(kernel, start, {option: tried for option, (_, tried) in options.items()})
        runner = CaseRunner(self.table, kernel, number, cases, self.device)
        job = Job(name, start, axes, runner)
        try:
            Search(job, self.timer, self.journal, self.in_time, self.tell).run()
        except CardLost:
            raise
        except Refused as refused:
            self.journal.skip(name, f"its own values: {refused}")
        return None


def _name(kernel: str, number: int) -> str:
    return f"{kernel}/{number}"


def vendor_options(architecture: str) -> Mapping[str, tuple[int, Axis]]:
    return next(
        (found for name, found in _VENDOR_OPTIONS.items() if architecture.startswith(name)), {}
    )


def start_of(values: Values, options: Mapping[str, tuple[int, Axis]]) -> dict[str, int]:
    """An entry's values, with the vendor's options where it has any stages to overlap: a kernel
    without loops is not worth their product."""
    if "num_stages" not in values:
        return dict(values)
    return {**{option: absent for option, (absent, _) in options.items()}, **values}


def improved(table: Table, journal: Journal, where: str) -> Table:
    """`table` with all that the journal has finished. `where`: card, versions and date."""
    for kernel, entries in table.entries.items():
        for number, entry in enumerate(entries):
            if result := journal.finished.get(_name(kernel, number)):
                table = table.with_entry(kernel, number, _improved(entry, result, where))
    return table


def _improved(entry: Entry, result: Result, where: str) -> Entry:
    if not result.before:
        told = f"none of {result.tried} others saves {result.gain:.1%}"
        return dataclasses.replace(entry, source=f"{entry.source}; measured: {told}, {where}")
    mine, others = (f"{seconds * 1e6:.1f} us" for seconds in (result.seconds, result.before))
    source = f"measured: {mine} against {others} of the table in the box, {where}"
    return Entry(entry.when, dict(result.values), source)


def starting_table(architecture: str) -> Table:
    """The box's, as one of the architecture's own for the kernels as they are."""
    box = table_for(architecture)
    return dataclasses.replace(box, architecture=architecture, kernels=fingerprint())


def tunable(table: Table, wanted: Sequence[str]) -> list[str]:
    """The kernels to tune; all where none is `wanted`. ValueError for a name that is none."""
    known = [kernel for kernel in table.entries if kernel in SPACES]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"no kernel {', '.join(unknown)}; there are {', '.join(known)}")
    return [kernel for kernel in known if not wanted or kernel in wanted]
