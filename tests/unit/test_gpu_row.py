"""The row for a box with a card, tried without one: every part for real on the cpu platform in
small, stopped and gone on with, and on a machine that has none of the server's packages."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS / "workers"))
sys.path.insert(0, str(BENCHMARKS))

import gpu_row  # noqa: E402
from gpu import checks, engine, kernels, part, report, steady, timing  # noqa: E402
from limits import Limits  # noqa: E402

QUICK = ("canary", "throughput", "batch1", "kernels", "steady", "sweep", "long", "peer")
"""The parts that run in this process; the others start processes of their own."""


def child(name: str, out: Path, seconds: float = 100) -> int:
    """What the part's process does, in this one."""
    arguments = ["--child", name, "--platform", "cpu", "--tiny", "--out", str(out)]
    return gpu_row.main([*arguments, "--seconds", str(seconds)])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of the quick parts."""
    out = tmp_path_factory.mktemp("measured")
    assert [child(name, out) for name in QUICK] == [part.DONE] * len(QUICK)
    assert child("long", out, seconds=0) == part.DONE  # done is done: nothing is begun
    return report.collect("cpu", out, list(gpu_row.PARTS), True)


def test_every_measuring_part_finds_figures(measured: dict[str, Any]) -> None:
    found = measured["results"]
    assert measured["faults"] == {}
    assert found["canary"]["rates"]["read_gb_s"] > 0
    assert found["throughput"]["round 1"]["output_tokens"] == sum(engine.mixed_lengths(6, 4, 12)[1])
    assert found["batch1"]["8/8"]["percent_of_limit"] > 0
    assert found["batch1"]["8/8 without recordings"]["decode_tok_s"] > 0
    assert found["steady"]["host"]["running"] == 4
    assert 0 < found["steady"]["host"]["host_ms"] <= found["steady"]["host"]["step_ms"]
    assert found["sweep"]["4 at once"]["output_tokens"] == 32
    assert found["long"]["context 96"]["cached_tokens"] >= 64  # the prompt was computed once
    assert found["long"]["fit"]["longest_context"] == 100
    assert found["peer"]["1 at once, transformers, static cache"]["speed_of_ours_over"] > 0
    decode = found["kernels"]["decode attention 16/8 heads, 2x64"]
    assert decode["seconds"] > 0 and decode["sdpa_over_ours"] > 0 and decode["gb_s"] > 0
    assert found["kernels"]["linear int8 2x64x128"]["torch_bf16_over_ours"] > 0


def test_what_cannot_run_here_says_why(measured: dict[str, Any]) -> None:
    skipped = {
        key: row["skipped"]
        for found in measured["results"].values()
        for key, row in found.items()
        if "skipped" in row
    }
    assert skipped["linear float8 2x64x128"] == "the portable kernels want a card"
    assert "no work of a device" in skipped["trace"]
    assert "has no such kernel" in skipped["rope_write 16 tokens, 16/8 heads"]
    assert measured["results"]["kernels"]["decode attention int8 cache, 2x64"][
        "flashinfer_over_ours"
    ]


def test_the_report_is_a_table_and_a_page(
    measured: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {row["figure"]: row for row in measured["table"]}
    assert rows["nano-vllm's benchmark"]["verdict"] == "missed"
    assert rows["nano-vllm's benchmark"]["percent_of_limit"] > 0
    assert rows["host time a step, 256 running"]["verdict"] == "not measured"  # the host computes
    report.show(measured)
    assert "conform       not run" in capsys.readouterr().out
    page = report.page(measured)
    assert "| batch 1, 128/128, tok/s | – | 1,000 | – | not measured |" in page
    assert "## kernels" in page and "rms_norm 16x64" in page


# ---------------------------------------------------------------------------------------------
# Stopped, gone on with, failed
# ---------------------------------------------------------------------------------------------


def test_a_part_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    record = tmp_path / "kernels.json"
    command = [sys.executable, str(BENCHMARKS / "gpu_row.py"), "--child", "kernels"]
    command += ["--platform", "cpu", "--tiny", "--out", str(tmp_path)]
    process = subprocess.Popen(command, env=gpu_row.environment("cpu", ROOT.parent))
    while process.poll() is None and not (
        record.exists() and len(json.loads(record.read_text())["results"]) > 2
    ):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = json.loads(record.read_text())
    assert not stopped["done"] and len(stopped["results"]) > 2
    assert child("kernels", tmp_path) == part.DONE
    found = json.loads(record.read_text())
    assert found["done"] and len(found["results"]) > len(stopped["results"])
    assert stopped["results"].items() <= found["results"].items()  # measured once


def pieces(**work: Callable[[], part.Found]) -> Iterator[part.Piece]:
    yield from work.items()


def run(out: Path, **work: Callable[[], part.Found]) -> int:
    return part.run_pieces(part.Bench("cpu", out), part.Record(out, "x"), pieces(**work))


def fails(error: Exception) -> Callable[[], part.Found]:
    def work() -> part.Found:
        raise error

    return work


def test_a_fault_does_not_stop_the_others(tmp_path: Path) -> None:
    status = run(tmp_path, a=fails(ValueError("no")), b=lambda: {"n": 1}, c=fails(part.Skip("why")))
    record = part.Record(tmp_path, "x")
    assert (status, record.verdict()) == (part.FAILED, "FAILED")
    assert "ValueError: no" in record.faults["a"]
    assert record.results == {"b": {"n": 1}, "c": {"skipped": "why"}}
    record.forget_faults()
    assert run(tmp_path, a=lambda: {"n": 2}, b=fails(AssertionError("again"))) == part.DONE


def test_a_part_that_cannot_even_begin_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu_row.PARTS, "facts", ("no_such_module.facts", 10))
    assert child("facts", tmp_path) == part.FAILED
    record = part.Record(tmp_path, "facts")
    assert record.verdict() == "FAILED" and "no_such_module" in record.faults["the part"]


def test_a_broken_device_ends_the_process_and_another_goes_on(tmp_path: Path) -> None:
    broken = fails(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert run(tmp_path, a=broken, b=fails(AssertionError("in a broken process"))) == part.BROKEN
    assert run(tmp_path, a=broken, b=lambda: {"n": 1}) == part.FAILED
    assert part.Record(tmp_path, "x").results == {"b": {"n": 1}}


def test_what_hangs_is_given_up_after_some_attempts(tmp_path: Path) -> None:
    for _ in range(part.MOST_ATTEMPTS):
        assert run(tmp_path, a=fails(part.OutOfTime()), b=lambda: {}) == part.UNFINISHED
    assert run(tmp_path, a=fails(AssertionError("once more")), b=lambda: {"n": 1}) == part.FAILED
    record = part.Record(tmp_path, "x")
    assert f"begun {part.MOST_ATTEMPTS} times" in record.faults["a"] and record.results == {
        "b": {"n": 1}
    }


def test_a_part_is_begun_again_while_the_device_takes_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses = iter([part.BROKEN, None, part.DONE])
    monkeypatch.setattr(gpu_row, "run_process", lambda *_: next(statuses))
    gpu_row.run_part("facts", None, tmp_path, 100)  # type: ignore[arg-type]
    assert list(statuses) == []


def test_a_process_that_overruns_is_ended_with_all_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text(
        "import subprocess, sys, pathlib\n"
        "inner = subprocess.Popen(['sleep', '60'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(inner.pid))\n"
        "inner.wait()\n"
    )
    monkeypatch.setattr(gpu_row, "__file__", str(sleeper))
    monkeypatch.setattr(gpu_row, "GRACE", 0.0)
    args = gpu_row.argparse.Namespace(platform="cpu", out=tmp_path, tiny=True)
    assert gpu_row.run_process("facts", args, tmp_path, 2.0) == part.UNFINISHED
    inner = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 10
    while psutil.pid_exists(inner) and psutil.Process(inner).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end, "what the process started lives on"
        time.sleep(0.01)


def test_all_done_runs_nothing_and_time_over_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(gpu_row, "run_part", never)
    arguments = ["--platform", "cpu", "--out", str(tmp_path), "--part", "facts"]
    assert gpu_row.main([*arguments, "--total", "1"]) == part.UNFINISHED
    record = part.Record(tmp_path, "facts")
    record.done = True
    record.save()
    assert gpu_row.main(arguments) == part.DONE
    record.faults = {"doctor": "it is ill"}
    record.save()
    assert gpu_row.main(arguments) == part.FAILED


def test_serving_levels_say_what_they_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "_importable", lambda name: name != "zmq")
    with pytest.raises(part.Skip, match="L5 wants zmq"):
        checks._level(part.Bench("cpu", tmp_path), "L5")


# ---------------------------------------------------------------------------------------------
# Formulas
# ---------------------------------------------------------------------------------------------


def test_the_lengths_are_those_of_the_other_benchmark() -> None:
    prompts, outputs = engine.mixed_lengths(256, 100, 1024)
    assert (len(prompts), sum(outputs)) == (256, 133_966)


def test_the_least_time_of_a_batch() -> None:
    sizes = engine.shapes.SHAPES["tiny"]
    limits = Limits(sizes, read_gb_s=1e-9, gemm_gflop_s=float("inf"))  # a byte a second
    weights = engine.WEIGHTS["bf16"].weight_bytes(sizes)
    # Three steps; they read the cache of 5, 6 and 7 tokens of one, of 2 of the other.
    expected = 3 * weights + (5 + 6 + 7 + 2) * engine.kv_bytes(sizes)
    assert engine.batch_seconds(limits, [[1] * 5, [1] * 2], [3, 1]) == pytest.approx(expected)


def test_time_in_which_anything_ran() -> None:
    def event(start: float, end: float) -> Any:
        return type("Event", (), {"time_range": type("Range", (), {"start": start, "end": end})})

    assert steady._union([event(0, 4), event(1, 2), event(3, 6), event(8, 9)]) == 7


def test_goals_are_judged_by_the_worst_that_counts() -> None:
    rows = {
        "decode attention 16/8 heads, 8x32768": {"percent_of_bandwidth": 90.0},
        "decode attention 32/8 heads, 256x1024": {"percent_of_bandwidth": 86.0},
        "decode attention 16/8 heads, 1x1024": {"percent_of_bandwidth": 20.0},  # too few tokens
    }
    goal = next(goal for goal in report.GOALS if goal.title.startswith("decode attention"))
    found = goal.row({"kernels": rows})
    assert (found["measured"], found["verdict"]) == (86.0, "met")
    rows["decode attention int8 cache, 32x8192"] = {"percent_of_bandwidth": 70.0}
    assert goal.row({"kernels": rows})["verdict"] == "missed"


def test_calls_are_timed_inside_launches(tmp_path: Path) -> None:
    with timing.Clock.open(part.Bench("strict", tmp_path, tiny=True)) as clock:
        on_the_queue: list[bool] = []

        def call() -> None:
            on_the_queue.append(threading.current_thread() is not threading.main_thread())
            time.sleep(0.01)

        found = clock.time(call, rounds=3)
    assert (
        on_the_queue == [True] * 5
        and 0.01 <= found["fastest"] <= found["seconds"] <= found["slowest"]
    )


@pytest.mark.parametrize("recorded", [True, False])
def test_on_a_card_events_stand_around_replays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: Any) -> float:
            return 2.0  # milliseconds

    def capture(work: Callable[[], None]) -> Any:
        if not recorded:
            raise RuntimeError("operation not permitted when stream is capturing")
        return SimpleNamespace(replay=lambda: log.append("replay"))

    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    with timing.Clock.open(part.Bench("strict", tmp_path, tiny=True)) as clock:
        monkeypatch.setattr(clock, "_on_card", True)
        monkeypatch.setattr(clock.device, "capture", capture)
        found = clock.time(lambda: log.append("call"), rounds=2)
    run = "replay" if recorded else "call"
    assert log == ["call", "call", "event", run, "event", "event", run, "event"]
    assert found["seconds"] == 0.002
    assert found["by"].startswith("recording" if recorded else "launches: not recorded: operation")


def test_a_trace_in_figures(tmp_path: Path) -> None:
    canary = part.Record(tmp_path, "canary")
    canary.results["rates"] = {"read_gb_s": 1.0, "gemm_gflop_s": 1.0}
    canary.save()

    def event(name: str, device: str, start: float, end: float) -> Any:
        span = SimpleNamespace(start=start, end=end)
        return SimpleNamespace(name=name, device_type=SimpleNamespace(name=device), time_range=span)

    events = [
        event("cudaGraphLaunch", "CPU", 0, 1),
        event("cudaLaunchKernel", "CPU", 1, 2),
        event("cuLaunchKernelEx", "CPU", 2, 3),
        event("aten::add", "CPU", 3, 4),
        event("gemm", "CUDA", 0, 2000),
        event("norm", "CUDA", 1000, 3000),
    ]
    one = SimpleNamespace(
        load=steady.Load(running=4, prompt=8, steps=8, traced=2, spare=0),
        timed=lambda: {"step_ms": 2.0},
        traced=lambda: SimpleNamespace(events=lambda: events),
    )
    bench = part.Bench("cuda", tmp_path, tiny=True)
    found = steady._trace(bench, lambda: one)  # type: ignore[arg-type, return-value]
    assert found["device_busy_ms"] == 1.5 and found["idle_share"] == 0.25
    assert found["launches_a_step"] == 1.5 and found["kernels_a_step"] == 1
    assert [row["kernel"] for row in found["top"]] == ["gemm", "norm"]
    limits = engine.limits_of(bench)
    assert limits is not None
    needed_ms = 4e3 / limits.decode_tokens_per_second(4, 8 + 12 + 12)
    assert found["bytes_moved_at_most"] == pytest.approx(1.5 / needed_ms)


def test_the_fused_kernel_is_measured_where_it_is(tmp_path: Path) -> None:
    """In Triton's interpreter, through the GPU hulls' own attention."""
    pytest.importorskip("triton")
    bench = part.Bench("helpers.interpreted_gpu:InterpretedGpu", tmp_path, tiny=True)
    with timing.Clock.open(bench) as clock:
        made = kernels.Kernels(bench, clock)
        assert kernels.rope_write(made, 2)["torch_over_ours"] > 0
        assert kernels.linear(made, "int8", 2, 64, 128)["format"] == "triton_int8"


# ---------------------------------------------------------------------------------------------
# A bare machine
# ---------------------------------------------------------------------------------------------

BLOCKER = f"""
import sys

MISSING = {{*{checks.SERVER!r}, "starlette", "httpx", "pytest_asyncio", "pytest_timeout", "xdist"}}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

# Nor is anything of ours installed.
sys.meta_path[:] = [Missing(), *(f for f in sys.meta_path if "editable" not in repr(f).lower())]
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A checkout under another name, and the environment of a machine without our packages."""
    folder = tmp_path_factory.mktemp("bare")
    checkout = folder / "some-checkout"
    ignored = shutil.ignore_patterns(".*", "results", "build", "*.egg-info", "docs")
    shutil.copytree(ROOT, checkout, ignore=ignored)
    (folder / "blocker").mkdir()
    (folder / "blocker" / "sitecustomize.py").write_text(BLOCKER)
    dropped = ("PYTHONPATH", "TRITON_INTERPRET")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return checkout, kept | {"PYTHONPATH": str(folder / "blocker")}


def on_bare(bare: tuple[Path, dict[str, str]], out: Path, *parts: str) -> dict[str, Any]:
    """The report of one command with these parts, which must all be well."""
    checkout, environment = bare
    command = [sys.executable, "benchmarks/gpu_row.py", "--platform", "cpu", "--tiny"]
    command += ["--out", str(out), *(word for name in parts for word in ("--part", name))]
    done = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    found: dict[str, Any] = json.loads((out / "report.json").read_text())
    assert {found["verdicts"][name] for name in parts} == {"ok"}
    return found


def test_one_command_on_a_bare_machine(bare: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """Tokens by `LLM` in a process of its own (start), token parity, pytest without plugins."""
    found = on_bare(bare, tmp_path, "start", "parity", "kernel-tests")["results"]
    assert found["start"]["warm 0"]["start_s"] > 0
    assert found["parity"]["qwen3"]["token_exact"] == 8
    assert "passed" in found["kernel-tests"]["test_norm"]["tail"][-1]


@pytest.mark.slow
def test_the_other_commands_on_a_bare_machine(
    bare: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    report = on_bare(bare, tmp_path, "facts", "device", "conform")
    assert report["machine"]["packages"]["torch"]
    assert "skipped" in report["results"]["device"]["tests/device"]["tail"][-1]
    assert report["results"]["conform"]["L0"]["report"]


def test_the_bare_machine_is_bare(bare: tuple[Path, dict[str, str]]) -> None:
    checkout, environment = bare
    for name in ("fastapi", "msgspec", "zmq", "trimaran"):
        done = subprocess.run(
            [sys.executable, "-c", f"import {name}"],
            cwd=checkout,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert f"No module named '{name}'" in done.stderr, name
