"""Discovery: manifests, trials, versions, what is chosen; a broken package is one reason."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import vendor_packages
from helpers.minimal_platform import Minimal
from helpers.vendor_packages import MANIFEST

from trimaran.cli.bindings import bindings_of
from trimaran.core.args import EngineArgs
from trimaran.core.errors import PlatformError
from trimaran.core.platform import make_platform
from trimaran.platforms import api, registry, trial
from trimaran.platforms.api import ApiRange, negotiate
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.interface import (
    AttentionSpec,
    Device,
    DeviceInfo,
    Platform,
    PlatformUnavailable,
    Probe,
)
from trimaran.platforms.strict import StrictPlatform
from trimaran.platforms.trial_memory import TrialMemory

BUILT_IN = registry._BUILT_IN


def probing(answer: object) -> type[Platform]:
    """A platform whose probe answers so."""

    class Probing(Minimal):
        name = "probing"

        @classmethod
        def probe(cls) -> Probe:
            return answer  # type: ignore[return-value]

    return Probing


@pytest.fixture(autouse=True)
def a_fresh_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing loaded, nothing warned of, nothing remembered, and no accelerator to win."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    hosts = tuple(entry for entry in BUILT_IN if entry.name in ("cpu", "strict"))
    monkeypatch.setattr(registry, "_BUILT_IN", hosts)
    registry._loaded.clear()
    registry._warn_once.cache_clear()
    yield
    registry._loaded.clear()


@pytest.fixture
def entry(monkeypatch: pytest.MonkeyPatch) -> Any:
    """entry(name, **members): a module of these members, and an entry point to its `Platform`."""
    entries: list[EntryPoint] = []
    monkeypatch.setattr(registry, "entry_points", lambda group: list(entries))

    def add(name: str, **members: Any) -> None:
        module = ModuleType(f"vendor_{name}")
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        entries.append(EntryPoint(name, f"{module.__name__}:Platform", registry.GROUP))

    return add


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """install(name, code, …): a whole distribution; see `vendor_packages`."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(site)
    yield lambda name, code="", **options: vendor_packages.install(site, name, code, **options)
    for name in [name for name in sys.modules if name.startswith("vendor_")]:
        if name != "vendor_packages":
            del sys.modules[name]


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Trials that cost nothing and end well; the names of those tried."""
    tried: list[str] = []

    def pass_all(reference: str, name: str, seconds: float) -> str:
        tried.append(name)
        return ""

    monkeypatch.setattr(trial, "try_out", pass_all)
    return tried


def reason(name: str) -> str:
    (candidate,) = (c for c in registry.available() if c.name == name)
    assert not candidate.usable
    assert "\n" not in candidate.probe.reason
    return candidate.probe.reason


# ---------------------------------------------------------------------------------------------
# What is known and what is chosen
# ---------------------------------------------------------------------------------------------


def test_the_host_platforms_are_usable_and_cpu_is_chosen() -> None:
    usable = [candidate.name for candidate in registry.available() if candidate.usable]
    assert usable == ["cpu", "strict"]
    assert registry.choose() is CpuPlatform
    assert registry.choose("strict") is StrictPlatform


def test_a_built_in_platform_without_its_hardware_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "_BUILT_IN", BUILT_IN)
    found = {candidate.name: candidate for candidate in registry.available()}
    assert set(found) == {"cpu", "cuda", "rocm", "strict"}
    for name, library in (("cuda", r"NVIDIA|nvidia-ml-py"), ("rocm", r"AMD|amdsmi")):
        assert found[name].cls is not None, "that it does not apply here is not a fault"
        assert found[name].usable or re.search(library, found[name].probe.reason)
        if not found[name].usable:
            with pytest.raises(
                PlatformUnavailable, match=rf"'{name}' is not usable here: .*({library})"
            ):
                registry.choose(name)
    registry.choose()
    assert caplog.messages == []


def test_an_installed_platform_is_found_and_the_best_score_wins(entry: Any) -> None:
    class Fast(Minimal):
        name = "fast"

        @classmethod
        def probe(cls) -> Probe:
            return Probe(1000, "fast")

    entry("minimal", Platform=Minimal)
    entry("fast", Platform=Fast)
    assert registry.choose() is Fast
    assert registry.choose("minimal") is Minimal


def test_what_a_platform_lacks_or_breaks_is_a_reason(entry: Any) -> None:
    class Probing(Minimal):
        name = "probing"

        @classmethod
        def probe(cls) -> Probe:
            raise OSError("libacme.so: cannot open shared object file")

    class Absent(Minimal):
        name = "absent"

        @classmethod
        def probe(cls) -> Probe:
            return Probe(0, "no such device here")

    class Future(Minimal):
        name = "future"
        api = ApiRange((7, 0), (7, 2))

    class Abstract(Platform):
        name = "abstract"
        vendor = "test"
        api = Minimal.api

    entry("probing", Platform=Probing)
    entry("absent", Platform=Absent)
    entry("future", Platform=Future)
    entry("abstract", Platform=Abstract)
    entry("empty")
    entry("notone", Platform=dict)
    entry("renamed", Platform=Minimal)
    assert reason("probing") == "OSError: libacme.so: cannot open shared object file"
    assert reason("absent") == "no such device here"
    assert "written for platform API 7.0 to 7.2; this engine has 0.5" in reason("future")
    assert "Abstract lacks attention, capabilities" in reason("abstract")
    assert "AttributeError" in reason("empty")
    assert "not a Platform class" in reason("notone")
    assert "is called 'minimal'" in reason("renamed")
    assert registry.choose() is CpuPlatform


def test_a_module_that_raises_or_exits_on_import_is_a_reason(
    entry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    for name, line in (("raising", "1 / 0"), ("exiting", "raise SystemExit('no driver')")):
        (tmp_path / f"vendor_{name}.py").write_text(line)
        entry(name)
        monkeypatch.delitem(sys.modules, f"vendor_{name}")
    assert reason("raising") == "ZeroDivisionError: division by zero"
    assert reason("exiting") == "SystemExit: no driver"


def test_an_installed_package_cannot_take_a_built_in_name(entry: Any) -> None:
    class Impostor(Minimal):
        name = "cpu"

        @classmethod
        def probe(cls) -> Probe:
            return Probe(9000, "better than the real one")

    entry("cpu", Platform=Impostor)
    assert registry.choose("cpu") is CpuPlatform


def test_choosing_what_is_not_there_lists_each_platform_and_its_reason(entry: Any) -> None:
    entry("broken")
    with pytest.raises(PlatformUnavailable) as caught:
        registry.choose("acme")
    message = str(caught.value)
    assert "There is no platform 'acme'." in message
    assert "cpu: " in message and "broken: AttributeError" in message


def test_probing_every_platform_initialises_nothing() -> None:
    code = """
        import sys, threading, torch
        threads = torch.get_num_threads()
        from trimaran.platforms import registry
        assert len(registry.available()) >= 2
        assert threading.active_count() == 1 and torch.get_num_threads() == threads
        assert not torch.cuda.is_initialized() and not torch.distributed.is_initialized()
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)


def test_a_name_wins_over_scores_and_does_not_wait_for_the_others(
    install: Any, trials: list[str]
) -> None:
    install("acme", score=900)
    assert registry.choose("strict") is StrictPlatform
    assert trials == []
    assert registry.choose("auto").name == "acme"
    assert registry.choose("cpu") is CpuPlatform


def test_of_two_packages_with_one_name_the_first_by_name_is_kept(
    install: Any, trials: list[str]
) -> None:
    install("acme", release="vendor-b", score=70)
    install("acme", release="vendor-a", score=60)
    install("cpu", release="vendor-c", score=9000)
    chosen = registry.choose("acme")
    assert chosen.__module__ == "vendor_a" and trials == ["acme"]
    assert "acme is also the name of vendor-a 1.0" in reason("acme (vendor-b 1.0)")
    assert "a built-in platform" in reason("cpu (vendor-c 1.0)")
    assert registry.choose("cpu") is CpuPlatform


def test_a_broken_package_is_one_warning_in_a_process(
    install: Any, trials: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    install("broken", "raise OSError('libacme.so is missing')")
    install("absent", score=0)
    with caplog.at_level(logging.INFO, logger="trimaran.platforms"):
        registry.available()
        assert caplog.messages == [], "listing them is no reason to warn"
        for _ in range(3):
            assert make_platform().name == "cpu"
    assert caplog.messages == [
        "platform broken (vendor-broken 1.0): OSError: libacme.so is missing"
    ]
    with pytest.raises(PlatformError, match="not usable here: one card"):
        make_platform("absent")


def test_metadata_that_cannot_be_read_leaves_the_built_in_platforms(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(group: str) -> list[EntryPoint]:
        raise ValueError("no '=' in entry_points.txt")

    monkeypatch.setattr(registry, "entry_points", broken)
    assert registry.choose() is CpuPlatform
    assert len(caplog.messages) == 1 and "no '='" in caplog.messages[0]


def test_every_candidate_that_is_not_bound_has_a_reason() -> None:
    """`trimaran platforms` says of each op why it is not another implementation."""
    platform = CpuPlatform()
    bindings = bindings_of(platform, EngineArgs())
    offered = platform.ops()
    assert {"attention", "linear", "rms_norm"} <= {binding.op for binding in bindings}
    for binding in bindings:
        if isinstance(binding.signature, AttentionSpec):
            names = {one.name for one in platform.attention(binding.signature)}
        else:
            names = {one.name for one in offered.get(binding.op, ())}
        shown = {binding.chosen} | {refusal.name for refusal in binding.refused}
        assert names <= shown
        assert all(refusal.reason for refusal in binding.refused)


# ---------------------------------------------------------------------------------------------
# Answers that cannot be true
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (None, "must be a Probe"),
        (Probe(-1, "x"), "scores -1"),
        (Probe(10**9, "x"), "scores 1000000000"),
        (Probe(0.5, "x"), "scores 0.5"),  # type: ignore[arg-type]
        (Probe(True, "x"), "scores True"),
        (Probe(1, None), "must be a Probe"),  # type: ignore[arg-type]
        (Probe(1, "x", (DeviceInfo(0, "a"), DeviceInfo(0, "b"))), "names a device twice"),
        (Probe(1, "x", ("card",)), "no DeviceInfo"),  # type: ignore[arg-type]
        (Probe(1, "x", None), "TypeError"),  # type: ignore[arg-type]
    ],
)
def test_a_probe_that_cannot_be_true_is_a_reason(entry: Any, answer: object, expected: str) -> None:
    entry("probing", Platform=probing(answer))
    assert expected in reason("probing")
    assert registry.choose() is CpuPlatform


def test_a_platform_that_cannot_be_made_is_a_reason(entry: Any) -> None:
    class Needy(Minimal):
        def __init__(self, driver: str) -> None:
            self.driver = driver

    entry("minimal", Platform=Needy)
    assert "missing 1 required positional argument: 'driver'" in reason("minimal")


def test_an_api_that_is_no_range_is_a_reason(entry: Any) -> None:
    class Loose(Minimal):
        api = ApiRange((0, 4), (0, 1))

    entry("minimal", Platform=Loose)
    assert "range is empty" in reason("minimal")
    Loose.api = (0, 3)  # type: ignore[assignment]
    registry._loaded.clear()
    assert "must be an ApiRange" in reason("minimal")


# ---------------------------------------------------------------------------------------------
# The manifest
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("manifest", "expected"),
    [
        (None, "trimaran-platform.toml is missing: add it"),
        ("api = ", "cannot be read"),
        (MANIFEST + 'licence = "MIT"\n', "says licence; it may say api, engine, torch"),
        (MANIFEST.replace("torch", "# torch"), "lacks a range for torch"),
        (MANIFEST.replace('">=2.8"', "2.8"), "lacks a range for torch"),
        (MANIFEST.replace('">=2.8"', '"2.8 or so"'), 'torch = "2.8 or so" is no range'),
        (
            MANIFEST.replace(">=0.5,<0.6", ">=2.0"),
            "this engine has 0.5: upgrade trimaran, or install an older release of vendor-acme",
        ),
        (
            MANIFEST.replace(">=0.5,<0.6", "<0.5"),
            "asks for platform API <0.5; this engine has 0.5: install a newer release of vendor-",
        ),
        (MANIFEST.replace(">=0.1", ">=99"), "asks for trimaran >=99; "),
        (MANIFEST.replace(">=2.8", "==1.13.*"), "asks for torch ==1.13.*; "),
        (MANIFEST.replace(">=0.5,<0.6", ">=0.5,!=0.5"), "install a newer release of vendor-acme"),
    ],
)
def test_a_manifest_that_does_not_fit_is_a_reason_and_nothing_is_imported(
    install: Any, trials: list[str], manifest: str | None, expected: str
) -> None:
    install("acme", manifest=manifest)
    assert expected in reason("acme")
    assert "vendor_acme" not in sys.modules and trials == []


def test_a_manifest_that_cannot_be_decoded_is_a_reason(install: Any) -> None:
    package = install("acme")
    (package / "trimaran-platform.toml").write_bytes(b"\xff\xfe")
    assert "cannot be read" in reason("acme")


def test_a_package_that_is_gone_or_has_no_init_is_a_reason(install: Any) -> None:
    (install("acme") / "__init__.py").unlink()
    (install("gone") / "__init__.py").unlink()
    for file in (package := install("lost")).iterdir():
        file.unlink()
    package.rmdir()
    assert "is not a package with an __init__.py" in reason("acme")
    assert "there is no module vendor_lost" in reason("lost")


def test_the_class_and_its_manifest_must_agree(install: Any, trials: list[str]) -> None:
    install("acme", "Vendors.api = ApiRange((0, 3), (0, 7))")
    assert reason("acme").startswith("ValueError: Vendors says platform API 0.3 to 0.7, its")
    assert trials == ["acme"]


# ---------------------------------------------------------------------------------------------
# Versions of the contract
# ---------------------------------------------------------------------------------------------

SHIM = {0: lambda cls: cls, 1: lambda cls: cls}


@pytest.mark.parametrize(
    ("low", "high", "here", "shims", "expected"),
    [
        ((0, 2), (0, 2), (0, 2), {}, ""),
        ((0, 1), (0, 4), (0, 2), {}, ""),
        ((0, 1), (0, 1), (0, 2), {}, "newer release of it"),  # 0.x: every minor may break
        ((0, 4), (0, 4), (0, 2), {}, "upgrade trimaran"),
        ((1, 0), (1, 0), (1, 5), {}, ""),  # from 1.0 on minors only add
        ((1, 6), (1, 9), (1, 5), {}, "upgrade trimaran"),
        ((2, 0), (2, 0), (1, 5), SHIM, "upgrade trimaran"),
        ((1, 0), (1, 9), (2, 3), SHIM, "through its shim"),
        ((1, 0), (1, 9), (2, 3), {}, "newer release of it"),
        ((0, 2), (0, 9), (2, 3), SHIM, "newer release of it"),  # one major back, not two
        ((0, 2), (0, 9), (1, 0), SHIM, "through its shim"),
        ((1, 4), (1, 2), (1, 5), {}, "is empty"),
    ],
)
def test_versions_are_negotiated(
    low: tuple[int, int], high: tuple[int, int], here: tuple[int, int], shims: Any, expected: str
) -> None:
    answer = negotiate(ApiRange(low, high), here, shims)
    assert answer.accepted == (expected in ("", "through its shim"))
    assert (answer.shim is not None) == (expected == "through its shim")
    if not answer.accepted:
        assert expected in answer.reason and "\n" not in answer.reason


OLD = """
class Card(HostDevice):
    def alloc(self, shape, kind):  # so was this one's
        return super().alloc(shape, kind, "tensors")


class Vendors(Platform):
    name = "acme"
    vendor = "vendor"
    api = ApiRange((0, 8), (0, 9))
    probe = classmethod(lambda cls: Probe(60, "an old card"))

    def open(self, card):  # its signature before 1.0
        return Card(card)

    def capabilities(self, device=0): return Capabilities(dtypes={"float32": "native"})
    def ops(self): return reference_ops()
    def attention(self, spec): return (ReferenceAttention(),)
"""


def adapt(cls: type[Any]) -> type[Any]:
    """The shim of a change to `open`: it took a card's number and nothing else."""

    class Adapted(cls):  # type: ignore[misc]
        api = ApiRange((1, 0), (1, 0))

        def open(self, device: int = 0, num_threads: int | None = None) -> Device:
            opened: Device = super().open(device)
            old = opened.alloc
            vars(opened)["alloc"] = lambda shape, dtype, tag: old(shape, dtype)
            return opened

    return Adapted


def test_a_platform_of_the_major_before_runs_through_the_shim(
    install: Any, trials: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install("acme", OLD, manifest=MANIFEST.replace(">=0.5,<0.6", ">=0.8,<1"))
    with monkeypatch.context() as old_engine:
        assert "upgrade trimaran" in reason("acme")
        old_engine.setattr(api, "PLATFORM_API", (1, 3))
        registry._loaded.clear()
        assert "install a newer release of vendor-acme" in reason("acme")
    registry._loaded.clear()
    monkeypatch.setattr(api, "PLATFORM_API", (1, 3))
    monkeypatch.setattr(api, "SHIMS", {0: adapt})
    platform = registry.choose("acme")()
    device = platform.open(num_threads=1)
    total = device.alloc((3,), torch.float32, "x")
    device.launch(lambda: setattr(total, "data", torch.ones(3))).wait()
    assert total.sum() == 3 and device.memory().by_tag
    add = platform.ops()["add"][0]
    assert add(total, total).tolist() == [2.0, 2.0, 2.0]
    device.close()


def test_a_class_of_this_version_is_still_checked_when_it_is_defined(
    install: Any, trials: list[str]
) -> None:
    install("acme", OLD.replace("(0, 8), (0, 9)", "(0, 5), (0, 5)"))
    assert "Card.alloc(self, shape, kind) does not match" in reason("acme")


# ---------------------------------------------------------------------------------------------
# Trials, and what is remembered of them
# ---------------------------------------------------------------------------------------------


def test_a_trial_is_made_once_and_again_when_the_package_changes(
    install: Any, trials: list[str]
) -> None:
    package = install("acme")

    def start() -> None:  # as another process would
        registry._loaded.clear()
        assert registry.choose().name == "acme"

    start()
    start()
    assert trials == ["acme"]
    (package / "kernels.py").write_text("tiles = 4")
    start()
    assert trials == ["acme"] * 2
    registry.forget()
    start()
    assert trials == ["acme"] * 3


def test_a_remembered_hang_is_not_waited_for(install: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    install("acme", "raise AssertionError('never imported here')")
    verdicts = ["hangs while it is imported: not done in 20 s"]
    monkeypatch.setattr(trial, "try_out", lambda *_: verdicts.pop())
    assert reason("acme") == "hangs while it is imported: not done in 20 s"
    registry._loaded.clear()
    assert reason("acme").startswith("hangs while it is imported: not done in 20 s (found earlier")
    assert "--rescan" in reason("acme")


def test_a_trial_that_could_not_be_made_is_not_remembered(
    install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> str:
        raise trial.TrialError("could not be tried: no room")

    install("acme")
    monkeypatch.setattr(trial, "try_out", fail)
    assert reason("acme") == "could not be tried: no room"
    registry._loaded.clear()
    monkeypatch.setattr(trial, "try_out", lambda *_: "")
    assert registry.choose().name == "acme"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "trials": {"a:B": 3}}', "\x00" * 99],
)
def test_a_damaged_memory_is_empty_and_written_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "platforms.json"
    path.write_text(content)
    memory = TrialMemory(path)
    assert memory.recall("a:B", "mark") is None
    memory.remember("a:B", "mark", "hangs")
    memory.remember("c:D", "mark", "")
    assert TrialMemory(path).recall("a:B", "mark") == "hangs"
    assert TrialMemory(path).recall("a:B", "another mark") is None
    assert TrialMemory(path).recall("c:D", "mark") == ""
    memory.forget()
    assert not path.exists() and list(tmp_path.iterdir()) == []


def test_a_home_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    memory = TrialMemory(tmp_path / "file" / "trimaran" / "platforms.json")
    memory.remember("a:B", "mark", "hangs")
    assert memory.recall("a:B", "mark") is None
    memory.forget()


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", ""),
        ("raise OSError('no driver')", ""),  # harmless: it does so in every process
        ("import time\ntime.sleep(60)", r"hangs while it is imported: not done in 1 s \(.*line \d"),
        (
            "Vendors.probe = classmethod(lambda cls: [0 for _ in iter(int, 1)])",
            "hangs while it is probed",
        ),
        ("import os\nos._exit(3)", "ends the process with status 3 while it is imported"),
        ("import os\nos.abort()", "dies of SIGABRT while it is imported"),
        ("raise KeyboardInterrupt", "raises KeyboardInterrupt"),
        ("import os\nos.write(1, b'hello')", "prints on stdout.*: hello"),
        ("import torch\ntorch.set_default_dtype(torch.float64)", "torch's default dtype"),
        (
            "import trimaran.core.scheduler as s\ns.Scheduler.schedule = lambda self: None",
            "changes trimaran.core.scheduler.Scheduler.schedule",
        ),
        (
            "from threading import Thread as T, Event\nT(target=Event().wait, daemon=True).start()",
            "",
        ),
    ],
)
def test_what_a_trial_finds(install: Any, code: str, expected: str) -> None:
    install("acme", code)
    seconds = 1.0 if "hangs" in expected else 20.0
    verdict = trial.try_out("vendor_acme:Vendors", "acme", seconds)
    assert re.search(expected, verdict) if expected else verdict == ""


# ---------------------------------------------------------------------------------------------
# All of it at once, as a user sees it
# ---------------------------------------------------------------------------------------------

BROKEN = {
    "hung": ("import time\ntime.sleep(60)", "hangs while it is imported: not done in 5 s"),
    "raising": ("import libacme", "ModuleNotFoundError: No module named 'libacme'"),
    "exiting": ("import os\nos._exit(0)", "ends the process with status 0"),
    "crashing": ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "dies of SIGSEGV"),
    "chatty": ("print('hello')", "prints on stdout"),
    "busy": (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()",
        "starts the thread",
    ),
    "patching": ("Platform.step_limits = None", "Platform.step_limits"),
    "rewiring": ("import torch\ntorch.matmul = lambda *_: None", "changes torch.matmul"),
    "renamed": ("Vendors.name = 'acme'", "is called 'acme', its entry point 'renamed'"),
    "boasting": ("Vendors.probe = classmethod(lambda cls: Probe(10**9, ''))", "scores 1000000000"),
    "partial": ("class Vendors(Platform): api = ApiRange((0, 5), (0, 5))", "Vendors lacks"),
}

GENERATE = """
import sys
from trimaran import LLM, SamplingParams
with LLM(platform=sys.argv[1], dtype="float32", max_model_len=64, max_num_seqs=2) as llm:
    output = llm.generate("What is", SamplingParams(max_tokens=6, temperature=0.0))[0]
    print(output.outputs[0].token_ids)
"""


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_broken_packages_are_a_line_each_and_the_good_one_serves(tmp_path: Path) -> None:
    site, home = tmp_path / "site", tmp_path / "home"
    for name, (code, _) in BROKEN.items():
        vendor_packages.install(site, name, code)
    newer = MANIFEST.replace(">=0.5,<0.6", ">=2.0")
    vendor_packages.install(site, "newer", "raise SystemExit('imported')", manifest=newer)
    vendor_packages.install(site, "acme", score=9000)
    environment = {**os.environ, "PYTHONPATH": str(site), "HOME": str(home)}

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=300, check=True
        )

    for extra in (["--trial-seconds=5"], []):  # the second start remembers
        done = run("-m", "trimaran", "platforms", "--json", *extra)
        report = json.loads(done.stdout)
        assert report["chosen"] == "acme" and report["ops"] and "error" not in report
        shown = {one["name"]: one for one in report["platforms"]}
        expected = {name: text for name, (_, text) in BROKEN.items()}
        expected["newer"] = "asks for platform API >=2.0; this engine has 0.5: upgrade trimaran"
        for name, text in expected.items():
            assert not shown[name]["usable"] and text in shown[name]["reason"], name
            assert shown[name]["origin"] == f"vendor-{name} 1.0"
            lines = [line for line in done.stderr.splitlines() if f"platform {name} " in line]
            assert len(lines) == 1, done.stderr
        assert len(done.stderr.splitlines()) == len(expected), done.stderr
        assert shown["acme"]["usable"] and shown["cpu"]["usable"] and shown["strict"]["usable"]
    table = run("-m", "trimaran", "platforms").stdout
    assert "acme (chosen)" in table and "hung" in table
    tokens = [run("-c", GENERATE, name).stdout.splitlines()[-1] for name in ("acme", "strict")]
    assert tokens[0] == tokens[1] != "[]"


@pytest.mark.real
def test_rescan_forgets_what_was_found(tmp_path: Path) -> None:
    memory = tmp_path / ".cache" / "trimaran" / "platforms.json"
    memory.parent.mkdir(parents=True)
    memory.write_text("{}")
    command = [sys.executable, "-m", "trimaran", "platforms", "--json"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    for flag, left in ([], True), (["--rescan"], False):
        subprocess.run([*command, *flag], env=environment, check=True, stdout=subprocess.DEVNULL)
        assert memory.exists() == left
