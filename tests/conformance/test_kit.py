"""The kit itself: `cpu` and `strict` pass it, reports keep what was found, a crash or a hang fails
one check, and what may be skipped is bounded."""

from __future__ import annotations

import dataclasses
import json
import queue
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import buggy_platforms
import pytest
import seeded_bugs
import torch

from trimaran.cli.main import main
from trimaran.conformance import l0_contract, purity, runner, shrink
from trimaran.conformance.base import Check, Failed, Level, Skipped, Subject
from trimaran.conformance.cases import CASES, OpCase, sizes
from trimaran.conformance.compare import difference
from trimaran.conformance.lab import Guarded
from trimaran.conformance.levels import LEVELS, level
from trimaran.conformance.report import REFUSED, Outcome, Report
from trimaran.conformance.runner import run_kit
from trimaran.conformance.worker import Request, answers, run_check, selected
from trimaran.core.ops import OpBinder
from trimaran.platforms import ops
from trimaran.platforms.host_device import HostDevice
from trimaran.platforms.interface import Fusion, OpSignature, Support
from trimaran.platforms.ops import EXACT, OPS, Tolerance

BELOW = [one for one in LEVELS if one.name < "L3"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def failures(report: Report) -> str:
    return "\n".join(f"{one.full_name}: {one.detail}\n{one.case}" for one in report.failures)


@pytest.mark.parametrize("name", ["strict", "cpu"])
def test_our_platforms_pass_the_lower_levels(name: str) -> None:
    report = run_kit(Subject(name, quick=True), BELOW, isolate=False)
    assert report.ok, failures(report)
    assert all(one.detail.startswith(REFUSED) for one in report.skipped)
    assert {one.level for one in report.outcomes} == {"L0", "L1", "L2"}
    assert report.platform == name and report.capabilities["dtypes"]
    assert report.bindings.keys() == OPS.keys()
    passed = {one.full_name for one in report.outcomes if one.status == "passed"}
    for op, by_dtype in report.bindings.items():
        for dtype, chosen in by_dtype.items():
            assert f"L1/{op}/{chosen}/{dtype}" in passed, "what engines bind was not refused"
    quantized = set(report.capabilities["weight_formats"]) - {"dense"}
    assert {f"L1/packer/{one}/float32/product" for one in quantized} <= passed
    measured = [one for one in report.outcomes if one.level == "L1" and one.measured]
    assert len(measured) > 30, "speed stands beside correctness"


@pytest.mark.real
def test_the_command_keeps_its_report_and_says_what_cannot_be_examined(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whole runs of `strict` and `cpu` are rows of ci/matrix.yaml."""
    file = tmp_path / "report.json"
    command = ["conform", "--platform", "strict", "--report", str(file)]
    assert main([*command, "--only", "L1/add/*", "--seed", "5"]) == 0
    report = Report.read(file)
    assert report.ok and report.partial and report.seed == 5 and len(report.outcomes) >= 2
    assert main(["conform", "--platform", "strikt"]) == 2
    assert "There is no platform 'strikt' (did you mean strict?)." in capsys.readouterr().err
    assert main(["conform", "--platform", "strict", "--device", "5"]) == 2
    assert "there is no device 5" in capsys.readouterr().err
    before = file.read_bytes()
    assert main([*command[:-1], str(tmp_path / "no" / "report.json")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert file.read_bytes() == before


# ------------------------------------------------------------------------------ the report


def fake(name: str, *checks: Check) -> Level:
    return Level(name, "made up", lambda subject: list(checks))


def failing() -> None:
    raise Failed("it is wrong", case="a = 1\nb = 2", seed=7)


def skipping() -> None:
    raise Skipped("nothing of the kind here")


def report_of(monkeypatch: pytest.MonkeyPatch, *levels: Level, only: Sequence[str] = ()) -> Report:
    by_name = {one.name: one for one in levels}
    monkeypatch.setattr("trimaran.conformance.worker.level_named", by_name.__getitem__)
    return run_kit(Subject("strict", device=1, seed=3), levels, only, isolate=False)


def test_a_report_survives_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    good = Check("good/one", lambda: {"us": 1.5})
    checks = [good, Check("bad", failing), Check("not here", skipping, required=False)]
    report = report_of(monkeypatch, fake("L1", *checks))
    report.write(tmp_path / "r.json")
    again = Report.read(tmp_path / "r.json")
    assert again == report
    values = json.loads((tmp_path / "r.json").read_text())
    assert values["ok"] is False
    assert values["totals"] == {"L1": {"passed": 1, "failed": 1, "skipped": 1}}


def test_a_failure_shows_its_case_its_seed_and_how_to_see_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    report = report_of(monkeypatch, fake("L2", Check("a b", failing, about="Right.")))
    text = "\n".join(report.lines())
    for shown in ("FAILED L2/a b", "asked: Right.", "it is wrong", "(seed 7)", "    b = 2"):
        assert shown in text
    again = "trimaran conform --platform strict --device 1 --only 'L2/a b' --seed 3"
    assert again in text


def test_only_selects_by_name_by_beginning_and_by_pattern(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checks = [Check(name, lambda: None) for name in ("rms/a", "rms/b", "rmsx")]
    levels = [fake("L1", *checks), fake("L2", *checks)]
    report = report_of(monkeypatch, *levels, only=["L1/rms"])
    assert [one.full_name for one in report.outcomes] == ["L1/rms/a", "L1/rms/b"]
    assert report.partial and "as far as it was asked" in report.verdict()
    assert selected("L1/rms/a", ("L1/rms/a",)) and selected("L1/rms/a", ("L?/*/a",))
    assert not selected("L1/rmsx", ("L1/rms",))
    assert not report_of(monkeypatch, *levels, only=["L1/nothing"]).ok


def refused() -> None:
    raise Skipped(REFUSED + "no such unit")


def test_skips_have_a_budget_and_required_checks_none(monkeypatch: pytest.MonkeyPatch) -> None:
    passing = [Check(f"fine {i}", lambda: None) for i in range(3)]
    optional = Check("optional", skipping, required=False)
    within = report_of(monkeypatch, fake("L1", *passing, optional))
    assert within.ok and len(within.skipped) == 1
    two = [optional, dataclasses.replace(optional, name="another")]
    over = report_of(monkeypatch, fake("L1", *passing, *two))
    assert not over.ok and not over.failures and "budget" in over.verdict()
    refusing = Check("refusing", refused, required=False)
    declined = [refusing, dataclasses.replace(refusing, name="another")]
    assert report_of(monkeypatch, fake("L1", *passing, *declined)).ok, "refusing is a right"
    required = report_of(monkeypatch, fake("L1", Check("needed", skipping)))
    assert "may not be skipped" in required.failures[0].detail


def test_a_level_that_cannot_be_listed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(subject: Subject) -> list[Check]:
        raise ZeroDivisionError("in the platform")

    report = report_of(monkeypatch, Level("L1", "made up", broken))
    assert [one.full_name for one in report.failures] == ["L1/checks"]
    assert "ZeroDivisionError" in report.failures[0].detail


def test_threads_left_behind_fail_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trimaran.conformance.worker.THREADS_END_WITHIN", 0.05)
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait, name="left", daemon=True)
    outcome = run_check("L0", Check("leaks", thread.start))
    stop.set()
    assert outcome.status == "failed" and "left" in outcome.detail


# ------------------------------------------------------------------------------ isolation


@pytest.mark.real
@pytest.mark.parametrize(
    "name, said", [("CrashesInAdd", "SIGSEGV"), ("HangsInAdd", "did not end within")]
)
def test_a_crash_or_a_hang_fails_one_check(name: str, said: str) -> None:
    subject = Subject(f"{buggy_platforms.__name__}:{name}", quick=True)
    only = ["L1/add/vendor/float32", "L1/copy/reference/float32"]
    report = run_kit(subject, [level("L1")], only, time_limit=12.0)
    assert not report.absent
    statuses = {one.full_name: one.status for one in report.outcomes}
    assert statuses["L1/add/vendor/float32"] == "failed"
    assert statuses["L1/copy/reference/float32"] == "passed", "the rest of the level is still run"
    crashed = next(one for one in report.failures if one.name == "add/vendor/float32")
    assert said in crashed.detail
    assert "buggy_platforms.py" in crashed.detail, "where it was is told"


@pytest.mark.real
@pytest.mark.parametrize(
    "messages, limit, allowed",
    [
        ([], 0.1, 0.6),  # to start
        ([{"start": "slow", "seconds": 600.0}], 150.0, 300.0),
        ([{"start": "quick", "seconds": 3.0}], 30.0, 0.3),
        ([{"start": "usual", "seconds": None}], 0.2, 0.2),
    ],
)
def test_time_limits_scale_what_a_check_says(
    messages: Sequence[dict[str, object]],
    limit: float,
    allowed: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[float] = []

    class Lines:
        """Of a child that says `messages` and then nothing."""

        def __init__(self) -> None:
            self._left = [json.dumps(one) for one in messages]

        def put(self, line: str) -> None:
            pass

        def get(self, timeout: float) -> str:
            asked.append(timeout)
            if not self._left:
                raise queue.Empty
            return self._left.pop(0)

    monkeypatch.setattr(runner, "START_SECONDS", 0.6)
    monkeypatch.setattr(runner.queue, "SimpleQueue", Lines)
    child = runner._Child(Request(Subject("strict"), "L0").to_json())
    with pytest.raises(runner._Died, match="did not end within"):
        list(child.messages(limit))
    assert asked[0] == max(0.6, limit) and asked[-1] == pytest.approx(allowed)


@pytest.mark.real
def test_a_platform_that_cannot_be_loaded_is_one_error(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["conform", "--platform", "nosuch:Platform", "--json", "--level", "L0"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "No module named 'nosuch'" in printed.err


def test_an_unknown_level_is_an_error_of_usage() -> None:
    with pytest.raises(SystemExit) as exit:
        main(["conform", "--platform", "strict", "--level", "L9"])
    assert exit.value.code == 2


def test_the_lower_levels_need_no_extra_package() -> None:
    """Nor what only tests use."""
    program = (
        "import sys\n"
        "for name in ('msgspec', 'fastapi', 'zmq', 'uvicorn', 'pydantic', 'httpx', 'pytest',"
        " 'hypothesis', 'prometheus_client'): sys.modules[name] = None\n"
        "from trimaran.conformance import runner, worker, l0_contract, l1_ops, l2_kv\n"
        "from trimaran.cli import conform\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------ what it lets pass


def outcomes(cls: type, level: str, *only: str) -> dict[str, Outcome]:
    subject = Subject(f"{cls.__module__}:{cls.__name__}", quick=True)
    found = (one.get("outcome") for one in answers(Request(subject, level, only)))
    return {one["name"]: Outcome(**one) for one in found if one}


def test_a_graph_that_runs_its_work_again_passes() -> None:
    (found,) = outcomes(buggy_platforms.ReplaysRight, "L0", "L0/device/graph").values()
    assert found.status == "passed", found.detail


def test_weights_in_codes_are_multiplied_by_those_alone_who_say_they_can() -> None:
    found = outcomes(buggy_platforms.WithCodes, "L1", "L1/packer")
    formats = {name.split("/")[1] for name in found if name.endswith("/product")}
    assert formats == {"int8", "int4", "fp8"}
    assert {one.status for one in found.values()} == {"passed"}, found


def test_who_refuses_everything_is_skipped_not_passed() -> None:
    found = outcomes(buggy_platforms.RefusesAll, "L1", "L1/add", "L1/fusion")
    skipped = {name for name, one in found.items() if one.status == "skipped"}
    assert {"add/vendor/float32", "add/vendor/float32/special"} <= skipped
    assert {"fusion/vendor/float32", "fusion/vendor/bfloat16"} <= skipped
    assert found["add/vendor/float32"].detail == "refused: not today"
    assert found["add/vendor/supports"].status == "passed"


def test_fusions_are_asked_with_the_sizes_that_engines_ask_with() -> None:
    asked: list[OpSignature] = []

    class Noting(buggy_platforms.VendorOp):
        def supports(self, sig: OpSignature) -> Support:
            asked.append(sig)
            return Support.no("only asks")

    class Platform(seeded_bugs.Quick):
        def fusions(self) -> Sequence[Fusion]:
            return (Fusion("noting", composition, Noting("linear+silu_mul", print)),)

    composition = ("linear", "silu_mul")
    own = {"in_features": 64, "out_features": 96}
    binder = OpBinder(Platform())
    binder.bind_chain(torch.float32, ("linear", own), ("silu_mul", {"size": 48}))
    case = OpCase("linear+silu_mul", "96 of 64", 3, torch.float32, 0)
    assert asked[0].sizes == sizes("linear+silu_mul", case.arguments())


def test_a_special_value_leaves_the_layout_of_a_view() -> None:
    plain = OpCase("linear", "33 of 50, view", 3, torch.float32, 0)
    special = dataclasses.replace(plain, special=float("nan"))
    x, bad = plain.arguments()[0], special.arguments()[0]
    assert bad.stride() == x.stride() == (74, 1)
    assert torch.equal(bad[0], x[0]) and bad[1, 0].isnan() and not bad[2].isnan().any()


# ------------------------------------------------------------------------------ its tools


def test_every_op_has_cases() -> None:
    assert CASES.keys() == OPS.keys()


def test_smallest_drops_what_is_not_needed() -> None:
    def fails(items: Sequence[int]) -> str:
        return "both" if 3 in items and sum(items) > 20 else ""

    least, said = shrink.smallest(
        list(range(12)), fails, lambda item: [item - 1] if item > 3 else []
    )
    assert said == "both" and fails(least)
    assert all(not fails(least[:i] + least[i + 1 :]) for i in range(len(least)))
    assert sum(least) == 21, "items are made simpler, too"


def test_smallest_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shrink, "SHRINK_FOR", 0.05)
    start = time.monotonic()
    shrink.smallest(list(range(500)), lambda items: time.sleep(0.01) or "always")
    assert time.monotonic() - start < 2


def _in_front(buffer: torch.Tensor) -> None:
    buffer.as_strided((1,), (1,), buffer.storage_offset() - 1).fill_(0)


def _behind(buffer: torch.Tensor) -> None:
    end = buffer.storage_offset() + 1 + 3 * buffer.stride(0) + 2 * buffer.stride(1)
    buffer.as_strided((1,), (1,), end).fill_(0)


def _between(buffer: torch.Tensor) -> None:
    buffer.as_strided((1,), (1,), buffer.storage_offset() + 3).fill_(0)


@pytest.mark.parametrize(
    "write, said",
    [
        (lambda buffer: None, ""),
        (_in_front, "before"),
        (_behind, "0 elements behind"),
        (_between, "element 3"),
        (lambda buffer: buffer[0].fill_(9), "element 0"),
    ],
)
def test_guards_see_every_write(write: Callable[[torch.Tensor], None], said: str) -> None:
    device = HostDevice()
    guard = Guarded(device, torch.ones(4, 8)[:, :3])
    assert guard.tensor.stride() == (8, 1) and bool((guard.tensor == 1).all())
    write(guard.tensor)
    found = guard.changed(guard.read(device))
    assert said in found and bool(said) == bool(found)
    writable = guard.changed(guard.read(device), writable=True)
    assert bool(writable) == (said not in ("", "element 0"))


def test_difference_is_strict_about_what_is_not_finite() -> None:
    inf, nan, loose = float("inf"), float("nan"), Tolerance(0.1, 0.1)
    expected = torch.tensor([1.0, inf, nan, -inf])
    assert not difference(expected.clone(), expected, EXACT)
    assert not difference(torch.tensor([1.1, inf, nan, -inf]), expected, loose)
    for wrong in ([1.3, inf, nan, -inf], [1, -inf, nan, -inf], [1, inf, 0, -inf], [nan] * 4):
        assert difference(torch.tensor(wrong), expected, loose)
    assert "shape" in difference(torch.ones(3), expected, loose)
    assert "float64" in difference(expected.double(), expected, loose)
    assert "results" in difference((expected, expected), expected, loose)


def test_outcomes_of_l0_say_what_they_are_about() -> None:
    assert all(check.about for check in l0_contract.checks(Subject("strict")))
    assert Outcome("L0", "a", "passed").full_name == "L0/a"


def test_purity_sees_tables_and_devices_of_vendors(monkeypatch: pytest.MonkeyPatch) -> None:
    before, devices = purity._tables([ops]), purity._devices_in_use()
    monkeypatch.setitem(ops.OPS, "add", ops.OPS["copy"])  # type: ignore[arg-type]
    changed = purity._differing(before, purity._tables([ops]))
    assert changed == ["trimaran.platforms.ops.OPS['add']"]
    module = types.SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setattr(torch, torch._C._get_privateuse1_backend_name(), module, raising=False)
    assert purity._devices_in_use() - devices == {torch._C._get_privateuse1_backend_name()}
