"""Which CPUs compute threads are given, on machines made of files, and that they keep to them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from helpers.native import needs_native

from trimaran.kernels_cpu.library import CAP
from trimaran.platforms import cpu as cpu_platform
from trimaran.platforms import cpu_threads, host
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.cpu_threads import VARIABLE, Binding, BoundThreads, binding

Machine = Callable[..., None]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine with a number of `nodes` (one a package), `cores` in each and `threads` a core:
    CPUs are numbered as Linux does, the hyper-threads after all cores."""

    def make(nodes: int, cores: int, threads: int = 1, allowed: str = "", quota: str = "") -> None:
        shutil.rmtree(tmp_path)
        total = nodes * cores
        for cpu in range(total * threads):
            package, core = divmod(cpu % total, cores)
            siblings = ",".join(str(cpu % total + total * i) for i in range(threads))
            write(f"sys/devices/system/cpu/cpu{cpu}/topology/physical_package_id", str(package))
            write(f"sys/devices/system/cpu/cpu{cpu}/topology/core_id", str(core))
            write(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list", siblings)
        for node in range(nodes):
            spans = (
                f"{node * cores + total * i}-{(node + 1) * cores - 1 + total * i}"
                for i in range(threads)
            )
            write(f"sys/devices/system/node/node{node}/cpulist", ",".join(spans))
        write("proc/self/cgroup", "0::/kube/pod")
        write("sys/fs/cgroup/kube/cpu.max", quota or "max 100000")
        write("sys/fs/cgroup/kube/pod/cpu.max", "max 100000")
        cpus = frozenset(host.parse_cpus(allowed) if allowed else range(total * threads))
        monkeypatch.setattr(host, "allowed_cpus", lambda: cpus)

    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")

    monkeypatch.setattr(host, "ROOT", tmp_path)
    for module in (cpu_platform, cpu_threads):
        monkeypatch.setattr(module, "unavailable", lambda: "")
    monkeypatch.delenv(VARIABLE, raising=False)
    return make


def lists(threads: Sequence[frozenset[int]]) -> list[str]:
    return [host.format_cpus(cpus) for cpus in threads]


# ---------------------------------------------------------------------------------------------
# Facts
# ---------------------------------------------------------------------------------------------


def test_cores_come_node_by_node_without_hyper_threads(machine: Machine) -> None:
    machine(2, 4, 2)
    cores = host.topology(host.allowed_cpus())
    assert [core.cpus for core in cores] == [(i, i + 8) for i in range(8)]
    assert [core.node for core in cores] == [0] * 4 + [1] * 4
    assert host.physical_cores() == 8


def test_what_a_container_may_use_is_counted(machine: Machine) -> None:
    machine(2, 4, 2, allowed="2-5,10-11")
    assert [core.cpus for core in host.topology(host.allowed_cpus())] == [
        (2, 10),
        (3, 11),
        (4,),
        (5,),
    ]
    assert host.physical_cores() == 4
    machine(2, 4, 2, quota="350000 100000")  # of a group further up
    assert host.quota() == 3 and host.physical_cores() == 3
    (host.ROOT / "sys/fs/cgroup/kube/pod/cpu.max").write_text("500000 100000\n")
    assert host.quota() == 3


def test_quotas_of_the_first_version_of_control_groups(machine: Machine, tmp_path: Path) -> None:
    machine(1, 4)
    (tmp_path / "proc/self/cgroup").write_text("3:memory:/m\n1:cpu,cpuacct:/docker/1\n0::/\n")
    for folder, limit in (("cpu", "-1"), ("cpu/docker/1", "200000")):
        (tmp_path / "sys/fs/cgroup" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys/fs/cgroup" / folder / "cpu.cfs_quota_us").write_text(limit)
        (tmp_path / "sys/fs/cgroup" / folder / "cpu.cfs_period_us").write_text("100000")
    assert host.quota() == 2


def test_cores_of_two_dies_with_the_same_number_are_two(machine: Machine, tmp_path: Path) -> None:
    machine(1, 4)
    for path in tmp_path.glob("sys/devices/system/cpu/cpu*/topology/core_id"):
        path.write_text("0\n")
    assert host.physical_cores() == 4


@pytest.mark.parametrize("text", ["0", "0-3", "0-3,8", "1,3,5", "0-1,4-5"])
def test_lists_of_cpus(text: str) -> None:
    assert host.format_cpus(host.parse_cpus(text)) == text


def test_a_list_keeps_its_order() -> None:
    assert host.parse_cpus("8,0-2\n") == [8, 0, 1, 2]


# ---------------------------------------------------------------------------------------------
# The choice
# ---------------------------------------------------------------------------------------------


def test_two_cores_that_the_server_shares_are_left_to_the_system(machine: Machine) -> None:
    machine(1, 2)
    found = binding(2)
    assert not found.threads and "server" in found.about


def test_hyper_threads_are_for_the_others(machine: Machine) -> None:
    machine(1, 2, 2)
    assert lists(binding(2).threads) == ["0", "1"]
    machine(2, 4, 2)
    found = binding(8)
    assert lists(found.threads) == ["0", "1", "2", "3", "4", "5", "6", "7"]
    assert found.about == "one each on CPUs 0-7" and not found.home


def test_ranks_take_a_node_each_and_keep_their_memory_there(machine: Machine) -> None:
    machine(2, 4, 2)
    first, second = binding(4, 0, 2), binding(4, 1, 2)
    assert lists(first.threads) == ["0", "1", "2", "3"]
    assert lists(second.threads) == ["4", "5", "6", "7"]
    assert lists([first.home, second.home]) == ["0-3,8-11", "4-7,12-15"]


def test_ranks_of_one_node_take_cores_each(machine: Machine) -> None:
    machine(1, 4, 2)
    assert [lists(binding(1, rank, 4).threads) for rank in range(4)] == [["0"], ["1"], ["2"], ["3"]]


def test_without_a_cpu_to_spare_threads_keep_to_their_node(machine: Machine) -> None:
    machine(2, 2)
    assert lists(binding(4).threads) == ["0-1", "0-1", "2-3", "2-3"]
    assert lists(binding(2, 1, 2).threads) == ["2-3", "2-3"]
    machine(1, 4)
    assert not binding(2, 1, 2).threads


def test_a_cpuset_is_as_good_as_a_machine(machine: Machine) -> None:
    machine(2, 4, 2, allowed="2-5,10-13")
    assert lists(binding(4).threads) == ["2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("num_threads", "options", "reason"),
    [
        (3, {"quota": "300000 100000"}, "quota of 3 CPUs, on any of 8 cores"),
        (3, {}, "3 threads on 8 cores"),
        (9, {}, "9 threads on 8 cores"),
    ],
)
def test_which_cores_is_not_guessed(
    num_threads: int, options: dict[str, str], reason: str, machine: Machine
) -> None:
    machine(2, 4, 2, **options)
    found = binding(num_threads)
    assert not found.threads and reason in found.about


def test_unknown_cores_are_left_alone_and_it_is_said(machine: Machine, tmp_path: Path) -> None:
    machine(1, 4, 2)
    (tmp_path / "sys/devices/system/cpu/cpu3/topology/physical_package_id").unlink()
    found = binding(4)
    assert not found.threads and "cpu3" in found.about
    assert CpuPlatform().describe()["threads"].startswith("not bound")


def test_without_the_native_library_nothing_is_bound(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(1, 2, 2)
    monkeypatch.setattr(cpu_threads, "unavailable", lambda: "no compiler")
    assert binding(2).about == "not bound (no compiler)"


def test_off_is_off(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(2, 4, 2)
    monkeypatch.setenv(VARIABLE, "off")
    found = binding(8)
    assert not found.threads and f"{VARIABLE}=off" in found.about


def test_cpus_are_taken_as_listed(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(2, 4, 2, quota="100000 100000")
    monkeypatch.setenv(VARIABLE, "8,4-6")
    assert lists(binding(4).threads) == ["8", "4", "5", "6"]
    assert lists(binding(2, 1, 2).threads) == ["5", "6"]
    assert host.format_cpus(binding(2, 1, 2).home) == "4-7,12-15"
    assert CpuPlatform().process_env(1, {"tensor_parallel_size": 2}) == {"OMP_NUM_THREADS": "2"}
    assert "4-6,8" in CpuPlatform().describe()["threads"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("all", "auto, off, or a list"),
        ("0-", "auto, off, or a list"),
        ("3-1", "auto, off, or a list"),
        ("0,1,1", "different CPUs"),
        ("0-4", r"may not use \(4\); it may use 0-3"),
        ("0,1", "2 CPUs for 3 threads of each of 1 ranks; name 3"),
    ],
)
def test_a_list_that_cannot_be_served_is_refused(
    text: str, reason: str, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(1, 4)
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(ValueError, match=f"{VARIABLE}.*{reason}"):
        binding(3)
    (finding,) = CpuPlatform().review({"num_threads": 3})
    assert finding.kind == "reject" and VARIABLE in finding.reason
    assert CpuPlatform().process_env(0, {})["OMP_NUM_THREADS"].isdigit()


def test_the_platform_has_nothing_against_threads_as_they_are(machine: Machine) -> None:
    machine(2, 4, 2)
    assert CpuPlatform().review({"num_threads": None, "tensor_parallel_size": 2}) == ()


def test_the_platform_says_what_makes_an_engine_slow(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(**plan: int) -> list[tuple[str, str, str]]:
        found = CpuPlatform().review({"num_threads": 2, **plan})
        return [(one.kind, one.field, one.reason) for one in found]

    machine(1, 2)
    assert said(block_size=48) == []
    ((kind, field, reason),) = said(block_size=7)
    assert (kind, field) == ("note", "block_size") and "multiples of 16" in reason
    ((kind, field, reason),) = said(num_threads=64)
    assert (kind, field) == ("note", "num_threads")
    assert reason == "64 threads of each of 1 ranks take turns where 2 fit"
    monkeypatch.setattr(cpu_platform, "unavailable", lambda: "the kernels are on holiday")
    ((kind, field, reason),) = said(block_size=7)
    assert (kind, field) == ("note", "platform") and reason.startswith("the kernels are on holiday")


@pytest.mark.parametrize(
    ("cap", "fits"), [("avx", False), ("torch", False), ("AVX2 ", True), ("", True)]
)
def test_an_instruction_set_that_nobody_knows_is_refused(
    cap: str, fits: bool, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(1, 2)
    monkeypatch.setenv(CAP, cap)
    found = [(one.kind, one.field, one.reason) for one in CpuPlatform().review({})]
    said = f"{CAP} is {cap!r}; it must be one of avx2, avx512, avx512_bf16, amx."
    assert found == ([] if fits else [("reject", "platform", said)])


# ---------------------------------------------------------------------------------------------
# For real
# ---------------------------------------------------------------------------------------------

BOUND = """
import json, os, pathlib, sys, threading, torch
from trimaran.kernels_cpu.threads import pool_threads
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.interface import GroupSpec

def allowed(threads):
    texts = (pathlib.Path(f"/proc/self/task/{one}/status").read_text() for one in threads)
    return [text.split("Cpus_allowed_list:")[1].split()[0] for text in texts]

platform = CpuPlatform()
device = platform.open()
before = allowed(pool_threads())
platform.communicator(GroupSpec(), device)
found = {"before": before, "threads": torch.get_num_threads()}
def launched(key):
    device.launch(lambda: found.update({key: allowed(pool_threads())})).wait()

launched("bound")
found["after"] = allowed(pool_threads())
started = []
thread = threading.Thread(target=lambda: started.extend(allowed([threading.get_native_id()])))
thread.start()
thread.join()
found["started"] = started
def elsewhere():
    second = platform.open()
    platform.communicator(GroupSpec(), second)
    second.launch(lambda: None).wait()
    launched("elsewhere")
    second.close()
    device.close()
    launched("closed there")

thread = threading.Thread(target=elsewhere)
thread.start()
thread.join()
found["closed"] = allowed(pool_threads())
found["facts"] = platform.describe()["threads"]
print(json.dumps(found))
"""


@pytest.mark.real
@needs_native
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one CPU")
def test_threads_keep_to_their_cpus_while_they_compute() -> None:
    one, other = sorted(os.sched_getaffinity(0))[:2]
    free = host.format_cpus(os.sched_getaffinity(0))
    environment = {**os.environ, VARIABLE: f"{other},{one}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", BOUND], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {
        "threads": 2,
        "before": [free, free],
        "bound": [str(other), str(one)],
        "elsewhere": [str(other), str(one)],
        "after": [free, str(one)],
        "started": [free],
        "closed there": [free, free],
        "closed": [free, free],
        "facts": f"one each on CPUs {host.format_cpus([one, other])} ({VARIABLE})",
    }


def test_a_device_that_is_not_bound_leaves_threads_alone() -> None:
    device, before = CpuPlatform().open(num_threads=torch.get_num_threads()), []
    device.launch(lambda: before.append(os.sched_getaffinity(0))).wait()
    assert before == [os.sched_getaffinity(0)]
    device.close()
    device.close()


def test_the_thread_that_loads_a_rank_stays_on_its_nodes() -> None:
    found: list[set[int]] = []

    def load() -> None:
        threads = BoundThreads(Binding("", home=frozenset({max(os.sched_getaffinity(0))})))
        found.append(os.sched_getaffinity(0))
        threads.release()
        found.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=load)
    thread.start()
    thread.join()
    free = os.sched_getaffinity(0)
    assert found == [{max(free)}, free]
