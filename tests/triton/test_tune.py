"""Tuning end to end in Triton's interpreter, against the clock on the wall; and what is refused."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from helpers.interpreted_gpu import NoCard
from helpers.stream_simulator import DEVICE, StreamSimulator

from trimaran.kernels_cuda.portable import activation
from trimaran.kernels_cuda.portable.case import Case, rand
from trimaran.kernels_cuda.portable.tuning import Table, dump, fingerprint
from trimaran.platforms import gpu_tune
from trimaran.platforms.gpu_kernels import GENERIC
from trimaran.platforms.gpu_tune import CaseRunner, Tuning, difference, improved, starting_table
from trimaran.platforms.gpu_user_table import user_table_path
from trimaran.platforms.tune_journal import Journal
from trimaran.platforms.tune_search import CardLost, Refused

ROOT = Path(__file__).parents[2]
START = {"ROWS": 1, "BLOCK": 2048}
interpreted = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="in the interpreter a program costs what it costs"
)


def _add(rows: int, wrong: Callable[[Any], bool] = lambda values: False) -> Case:
    """Of 2 programs a row; where the values are `wrong`, so are the numbers."""

    def call(device: torch.device, table: Table) -> Callable[[], Any]:
        x, y = rand(device, rows, 256), rand(device, rows, 256)
        off = 0.1 if wrong(table.pick("add", size=256, rows=rows)) else 0.0
        return lambda: activation.add(x, y, table) + off

    return Case("add", f"{rows}x256", call)


def stopwatch(launch: Callable[[], Any]) -> float:
    launch()
    start = time.perf_counter()
    launch()
    return time.perf_counter() - start


def tuning(tmp_path: Path, device: torch.device, *cases: Case) -> tuple[Tuning, list[str]]:
    table, told = starting_table(GENERIC).constants_only(), list[str]()
    journal = Journal(tmp_path / "generic.jsonl", {"card": "interpreter"})
    return Tuning(table, cases, device, stopwatch, journal, lambda: True, told.append), told


@interpreted
def test_a_kernel_is_tuned_and_its_table_taken(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one, _ = tuning(tmp_path, device, _add(32))
    assert list(one.run(["add", "rope"])) == ["add/0", "rope/0", "rope/1"]
    assert one.journal.skipped.keys() == {"rope/0", "rope/1"}
    result = one.journal.finished["add/0"]
    assert result.values["ROWS"] >= 8, "32 programs become a few"
    assert result.seconds < 0.7 * result.before

    table = improved(one.table, one.journal, "no card, today")
    assert table.entries["add"][0].source.startswith("measured: ")
    assert table.entries["rope"] == one.table.entries["rope"]
    path = user_table_path(GENERIC)
    assert path is not None
    path.parent.mkdir(parents=True)
    path.write_text(dump(table), encoding="utf-8")
    used = NoCard().kernel_table
    assert (used.path, used.table) == (path, table)
    assert used.table.pick("add", size=256, rows=32) == result.values

    resumed, _ = tuning(tmp_path, device, _add(32, lambda values: True))
    assert list(resumed.run(["add"])) == ["add/0"], "nothing is measured again"
    assert resumed.journal.finished == {"add/0": result}


@interpreted
def test_wrong_numbers_never_win(tmp_path: Path, device: torch.device) -> None:
    """Two rows a program would be twice as fast."""
    one, told = tuning(tmp_path, device, _add(16, lambda values: values["ROWS"] == 2))
    list(one.run(["add"]))
    assert one.journal.finished["add/0"].values["ROWS"] == 1
    assert any("ROWS 2" in line and "numbers of result 0 differ" in line for line in told)


def test_an_entry_that_fails_by_itself_is_left_alone(tmp_path: Path, device: torch.device) -> None:
    numbers = itertools.count()

    def call(device: torch.device, table: Table) -> Callable[[], Any]:
        table.pick("add", size=1, rows=1)
        return lambda: torch.full((4,), next(numbers))

    one, told = tuning(tmp_path, device, Case("add", "never the same", call))
    assert list(one.run(["add"])) == ["add/0"]
    assert "never the same: 4 of 4 numbers" in one.journal.skipped["add/0"]
    assert not one.journal.finished and improved(one.table, one.journal, "x") == one.table


def test_a_case_that_fails_is_told_and_left_out(tmp_path: Path, device: torch.device) -> None:
    def call(device: torch.device, table: Table) -> Callable[[], Any]:
        raise MemoryError("too large for this card")

    one, told = tuning(tmp_path, device, Case("add", "huge", call))
    list(one.run(["add"]))
    assert told == ["add: the case huge is left out: MemoryError: too large for this card"]
    assert one.journal.skipped["add/0"] == "no case reaches it on this card"


def test_a_card_that_is_lost_ends_it(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def wrong(values: Any) -> bool:
        if values["ROWS"] == 2:
            dead()
        return False

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", dead)
    one, _ = tuning(tmp_path, device, _add(2, wrong))
    with pytest.raises(CardLost, match="illegal memory access"):
        list(one.run(["add"]))
    again = Journal(tmp_path / "generic.jsonl", {"card": "interpreter"})
    assert "illegal" in again.refusal("add/0", {**START, "ROWS": 2}), "not tried twice"


class Stopped:
    """An event between two of which no time goes by."""

    def __init__(self, enable_timing: bool) -> None:
        pass

    def record(self) -> None:
        pass

    def elapsed_time(self, other: Stopped) -> float:
        return 2.0


def test_a_candidate_that_cannot_be_recorded_leaves_the_others_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulator = StreamSimulator(quick=0.0, slow=0.0, default=0.0)
    for name in ("CUDAGraph", "graph_pool_handle", "memory", "memory_reserved", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, getattr(simulator, name))
    monkeypatch.setattr(torch.cuda, "stream", simulator.stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: simulator.Stream(0))
    monkeypatch.setattr(torch.cuda, "Event", Stopped)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: simulator.current.synchronize())
    monkeypatch.setattr(gpu_tune, "COLD_BYTES", 16)
    with simulator.active(monkeypatch):
        timer = gpu_tune.GraphTimer(DEVICE)
        x = torch.ones(4, device=DEVICE)
        for _ in range(2):
            assert timer(lambda: x * 2) == 2e-3
            with pytest.raises(Refused, match="not permitted when stream is capturing"):
                timer(lambda: x.sum().item())
    assert not simulator.memory.open


ONES = torch.ones(64)
DIFFERENT = {
    "equal": ([ONES], [ONES], ""),
    "another order of sums": ([ONES.bfloat16() * 1.008], [ONES.bfloat16()], ""),
    "too much": ([ONES * 1.001], [ONES], "64 of 64 numbers of result 0"),
    "a zero among ones": ([ONES - 1.0], [ONES], "64 of 64"),
    "no number": ([ONES * torch.nan], [ONES], "64 of 64"),
    "no number in both": ([ONES * torch.nan], [ONES * torch.nan], ""),
    "infinite": ([ONES * torch.inf], [ONES * torch.inf], ""),
    "tokens": ([ONES.long()], [ONES.long() + 1], "64 of 64"),
    "a code beside": ([ONES.to(torch.int8)], [ONES.to(torch.int8) + 1], ""),
    "a code further": ([ONES.to(torch.int8)], [ONES.to(torch.int8) + 2], "64 of 64"),
    "the second": ([ONES, ONES], [ONES, ONES + 1], "result 1"),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_difference(name: str) -> None:
    found, expected, told = DIFFERENT[name]
    reason = difference(found, expected)
    assert (told in reason) and bool(reason) == bool(told)


@pytest.mark.parametrize(
    "which, told", [("spill", "spills "), ("shared", "bytes of shared memory"), ("none", "")]
)
def test_what_a_card_should_not_be_given_is_not_run(which: str, told: str) -> None:
    """Compiled for a card that is not there: a launch would fail otherwise."""
    program = f"""
import torch, planted_kernels as planted
from trimaran.platforms import gpu_binaries, gpu_tune
kernel, sizes, options = planted.PLANTED["sm_80", {which!r}]
table = planted.Table("sm_80", (), {{"planted": (planted.Entry({{}}, options, "planted"),)}})
case = planted.Case("planted", "x", planted.launch(kernel, sizes))
gpu_binaries.without_card("sm_80")
try:
    gpu_tune.CaseRunner(table, "planted", 0, [case], torch.device("meta"))(options)
except gpu_tune.Refused as refused:
    print("refused:", refused)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT / "tests" / "helpers",
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.startswith("refused: x: " if told else "refused: "), done.stderr
    assert told in done.stdout
    assert ("'NoDevice' object has no" in done.stdout) == (not told), "what fits is launched"


def test_the_start_sets_what_is_right(device: torch.device) -> None:
    table = starting_table(GENERIC).constants_only()
    assert table.kernels == fingerprint()
    runner = CaseRunner(table, "add", 0, [_add(2, lambda values: values["ROWS"] == 2)], device)
    assert list(runner(START)) == ["2x256"]
    with pytest.raises(Refused, match="differ"):
        runner({**START, "ROWS": 2})
