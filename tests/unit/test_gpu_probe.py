"""Probes of the GPU hulls against transcribed answers: what is found, and every reason."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import gpu_answers as answers
from helpers.gpu_answers import fake_amdsmi, fake_pynvml

from trimaran.platforms import amd_smi, gpu_platform, nvml
from trimaran.platforms.cuda import CudaPlatform
from trimaran.platforms.gpu_wheels import CUDA_INDEXES, ROCM_INDEXES, Wheel, best_index
from trimaran.platforms.rocm import RocmPlatform
from trimaran.platforms.visible import Visibility, read_visibility, visible

CUDA_WHEEL = Wheel("2.13.0+cu130", cuda="13.0", architectures=CUDA_INDEXES[0].architectures)
ROCM_WHEEL = Wheel("2.13.0+rocm7.2", hip="7.2.1", architectures=ROCM_INDEXES[0].architectures)
CPU_WHEEL = Wheel("2.13.0+cpu")
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"),
    *("CUDA_DEVICE_ORDER", "HSA_OVERRIDE_GFX_VERSION"),
)

Machine = Callable[..., None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """machine(nvidia=…, amd=…, wheel=…, VARIABLE=…): what the probes are to find."""
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)

    def be(nvidia: Any = (), amd: Any = (), wheel: Wheel = CUDA_WHEEL, **environment: str) -> None:
        pynvml = nvidia if isinstance(nvidia, ModuleType) else fake_pynvml(nvidia)
        amdsmi = amd if isinstance(amd, ModuleType) else fake_amdsmi(amd)
        monkeypatch.setitem(sys.modules, "pynvml", pynvml)
        monkeypatch.setitem(sys.modules, "amdsmi", amdsmi)
        monkeypatch.setattr(gpu_platform, "installed_wheel", lambda: wheel)
        for variable, value in environment.items():
            monkeypatch.setenv(variable, value)

    return be


# ---------------------------------------------------------------------------------------------
# Cards
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("card", "name"),
    [
        (answers.H100, "h100"),
        (answers.H200, "h200"),
        (answers.A100, "a100"),
        (answers.L4, "l4"),
        (answers.RTX4090, "rtx4090"),
    ],
)
def test_nvidia_cards(machine: Machine, card: answers.NvidiaCard, name: str) -> None:
    machine(nvidia=[card, replace(card, uuid="GPU-00000000-0000-0000-0000-00000000beef")])
    probe = CudaPlatform.probe()
    spec = next(spec for spec in CudaPlatform.known_devices() if spec.name == name)
    assert probe.score > 10
    assert [d.index for d in probe.devices] == [0, 1]
    assert probe.devices[0].name == card.name
    assert probe.devices[0].memory == card.memory << 20 == spec.memory
    assert probe.devices[0].architecture == spec.architecture
    assert f"2 x {card.name}" in probe.reason and "CUDA 13.0" in probe.reason
    platform = CudaPlatform()
    assert platform.roofline(1) == spec.roofline
    assert platform.capabilities(1) == spec.capabilities
    assert sys.modules["pynvml"].open_sessions == 0


@pytest.mark.parametrize(
    ("card", "name"),
    [
        (answers.MI210, "mi210"),
        (answers.MI300X, "mi300x"),
        (answers.MI325X, "mi325x"),
        (answers.MI355X, "mi355x"),
        (answers.RX7900XTX, "rx7900xtx"),
    ],
)
def test_amd_cards(machine: Machine, card: answers.AmdCard, name: str) -> None:
    machine(amd=[card], wheel=ROCM_WHEEL)
    probe = RocmPlatform.probe()
    spec = next(spec for spec in RocmPlatform.known_devices() if spec.name == name)
    (device,) = probe.devices
    assert probe.score > 10
    assert (device.name, device.architecture) == (card.asic["market_name"], spec.architecture)
    assert device.memory == int(card.memory) << 20 == spec.memory
    assert RocmPlatform().roofline() == spec.roofline
    assert RocmPlatform().capabilities() == spec.capabilities
    assert sys.modules["amdsmi"].open_sessions == 0


def test_an_old_amdsmi_knows_neither_name_nor_architecture(machine: Machine) -> None:
    machine(amd=[answers.OLD_MI300X], wheel=ROCM_WHEEL)
    (device,) = RocmPlatform.probe().devices
    assert (device.name, device.architecture) == ("AMD Instinct MI300X", "gfx942")
    assert device.memory == 196592 << 20  # from the usage, where the size is "N/A"


def test_relatives_of_a_card_have_no_figures(machine: Machine) -> None:
    machine(nvidia=[replace(answers.H100, name="NVIDIA H100 PCIe")])
    assert CudaPlatform().roofline() is None
    assert CudaPlatform().capabilities().fp8 == "ocp"


def test_hip_may_number_cards_in_another_order(machine: Machine) -> None:
    cards = [replace(answers.MI300X, hip_id=1), replace(answers.MI210, hip_id=0)]
    machine(amd=cards, wheel=ROCM_WHEEL)
    names = [device.name for device in RocmPlatform.probe().devices]
    assert names == ["AMD Instinct MI210", "AMD Instinct MI300X"]


def test_mixed_cards_and_both_vendors(machine: Machine) -> None:
    machine(nvidia=[answers.H100, answers.RTX4090], amd=[answers.MI300X])
    probe = CudaPlatform.probe()
    assert [d.architecture for d in probe.devices] == ["sm_90", "sm_89"]
    assert [CudaPlatform().capabilities(i).isa for i in (0, 1)] == ["sm_90", "sm_89"]
    other = RocmPlatform.probe()
    assert other.score == 0 and "built for CUDA, not for ROCm" in other.reason


def test_a_card_that_does_not_answer_leaves_the_others(machine: Machine) -> None:
    machine(nvidia=[answers.A100, replace(answers.L4, broken=True)])
    probe = CudaPlatform.probe()
    assert len(probe.devices) == 1 and "card 1 does not answer (GPU is lost)" in probe.reason
    machine(amd=[replace(answers.MI210, broken=True), answers.MI300X], wheel=ROCM_WHEEL)
    probe = RocmPlatform.probe()
    assert [d.name for d in probe.devices] == ["AMD Instinct MI300X"]
    assert "card 0 does not answer (Error code: 2 |" in probe.reason


def test_a_card_the_wheel_has_no_code_for_keeps_its_number(machine: Machine) -> None:
    integrated = answers.AmdCard(
        answers._asic("AMD Radeon Graphics", "0x164e", "gfx1036", "0x0"), 512, "a desktop processor"
    )
    machine(amd=[integrated, answers.RX7900XTX], wheel=ROCM_WHEEL)
    probe = RocmPlatform.probe()
    assert [(d.index, d.name) for d in probe.devices] == [(1, "Radeon RX 7900 XTX")]
    assert "has no code for AMD Radeon Graphics (gfx1036)" in probe.reason


# ---------------------------------------------------------------------------------------------
# Reasons
# ---------------------------------------------------------------------------------------------


def test_a_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    cuda, rocm = CudaPlatform.probe(), RocmPlatform.probe()
    assert (cuda.score, rocm.score) == (0, 0)
    assert "nvidia-ml-py" in cuda.reason and "amdsmi" in rocm.reason


def test_what_is_not_installed_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr("trimaran.platforms.gpu_cards.importlib.import_module", missing)
    assert CudaPlatform.probe().reason == (
        "nvidia-ml-py is not installed: pip install nvidia-ml-py"
    )
    assert RocmPlatform.probe().reason == "amdsmi is not installed: pip install amdsmi"


def test_a_library_that_fails_when_imported_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trips(name: str) -> ModuleType:
        print("Unable to find libamd_smi.so library")
        raise KeyError("libamd_smi.so")

    monkeypatch.setattr("trimaran.platforms.gpu_cards.importlib.import_module", trips)
    probe = RocmPlatform.probe()
    assert probe.score == 0 and "libamd_smi.so" in probe.reason
    assert capsys.readouterr().out == ""


def test_no_driver(machine: Machine) -> None:
    machine(
        nvidia=fake_pynvml([], init_error="Driver Not Loaded"),
        amd=fake_amdsmi([], init_error="Error code:\n\t34 | AMDSMI_STATUS_NO_DRV"),
    )
    assert CudaPlatform.probe().reason == (
        "no NVIDIA driver that answers (NVML: Driver Not Loaded)"
    )
    assert "no AMD driver that answers (amdsmi: Error code: 34" in RocmPlatform.probe().reason


def test_no_device(machine: Machine) -> None:
    machine()
    assert CudaPlatform.probe().reason == "no NVIDIA device"
    assert RocmPlatform.probe().reason == "no AMD device"


def test_an_unexpected_answer_is_a_reason(machine: Machine) -> None:
    broken = fake_pynvml([answers.H100])
    broken.nvmlDeviceGetCount = lambda: "many"  # type: ignore[attr-defined]
    machine(nvidia=broken, amd=fake_amdsmi([replace(answers.MI210, asic=None)]))  # type: ignore[arg-type]
    assert CudaPlatform.probe().score == 0 and "NVML:" in CudaPlatform.probe().reason
    assert RocmPlatform.probe().score == 0 and "amdsmi:" in RocmPlatform.probe().reason
    assert sys.modules["pynvml"].open_sessions == sys.modules["amdsmi"].open_sessions == 0


# ---------------------------------------------------------------------------------------------
# The wrong torch
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cards", "driver", "wheel", "why", "index"),
    [
        ([answers.H100], answers.DRIVER_580, CPU_WHEEL, "is built for CPUs", "cu130"),
        ([answers.L4], answers.DRIVER_570, CPU_WHEEL, "is built for CPUs", "cu128"),
        ([answers.H200], answers.DRIVER_580, ROCM_WHEEL, "is built for ROCm", "cu130"),
        ([answers.L4], answers.DRIVER_570, CUDA_WHEEL, "the driver runs CUDA up to 12.8", "cu128"),
        (
            [replace(answers.A100, name="Tesla V100-SXM2-32GB", capability=(7, 0))],
            answers.DRIVER_580,
            CUDA_WHEEL,
            "has no code for sm_70",
            "cu126",
        ),
    ],
)
def test_nvidia_card_and_the_wrong_torch(
    machine: Machine, cards: list[Any], driver: int, wheel: Wheel, why: str, index: str
) -> None:
    machine(nvidia=fake_pynvml(cards, driver), wheel=wheel)
    probe = CudaPlatform.probe()
    assert probe.score == 0 and [d.name for d in probe.devices] == [cards[0].name]
    assert cards[0].name in probe.reason and wheel.version in probe.reason and why in probe.reason
    assert probe.reason.endswith(
        f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{index}"
    )


def test_amd_card_and_the_wrong_torch(machine: Machine) -> None:
    for wheel, why in ((CPU_WHEEL, "built for CPUs"), (CUDA_WHEEL, "built for CUDA")):
        machine(amd=[answers.MI300X], wheel=wheel)
        probe = RocmPlatform.probe()
        assert probe.score == 0 and why in probe.reason
        assert probe.reason.endswith("--index-url https://download.pytorch.org/whl/rocm7.2")


def test_a_card_no_torch_serves_is_told_so(machine: Machine) -> None:
    kepler = replace(answers.A100, name="Tesla K80", capability=(3, 7))
    machine(nvidia=[kepler])
    assert "no build of torch" in CudaPlatform.probe().reason


@pytest.mark.parametrize(
    ("codes", "device", "runs"),
    [
        (("sm_80", "sm_86"), "sm_89", True),  # machine code runs on later minors
        (("sm_80", "sm_90"), "sm_89", True),
        (("sm_90",), "sm_89", False),
        (("sm_100",), "sm_120", False),
        (("compute_90",), "sm_120", True),  # PTX is compiled for what comes later
        (("compute_120",), "sm_100", False),
        (("sm_90a",), "sm_90", True),
        (("sm_100a",), "sm_103", False),
        (("gfx942",), "gfx942", True),
        (("gfx90a",), "gfx942", False),
        ((), "sm_70", True),  # a build that does not tell
    ],
)
def test_what_code_runs_where(codes: tuple[str, ...], device: str, runs: bool) -> None:
    assert Wheel("2", architectures=codes).runs(device) is runs


def test_every_known_card_has_an_index() -> None:
    for indexes, platform in ((CUDA_INDEXES, CudaPlatform), (ROCM_INDEXES, RocmPlatform)):
        for spec in platform.known_devices():
            assert best_index(indexes, [spec.architecture]) is indexes[0], spec.name


def test_the_installed_wheel_is_read_without_starting_anything() -> None:
    wheel = gpu_platform.installed_wheel()
    assert wheel.version == torch.__version__
    assert bool(wheel.cuda) == bool(torch.version.cuda)
    assert not torch.cuda.is_initialized()


# ---------------------------------------------------------------------------------------------
# Visibility
# ---------------------------------------------------------------------------------------------

UUIDS = ("GPU-aa11", "GPU-aa22", "GPU-bb33")


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        (None, [0, 1, 2]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("2,0", [2, 0]),
        (" 1 , 2 ", [1, 2]),
        ("0,-1,2", [0]),  # the list ends at the first that is none
        ("0,7,1", [0]),
        ("1,1", []),  # a device twice: none
        ("GPU-bb33,GPU-aa11", [2, 0]),
        ("GPU-bb", [2]),  # the beginning is enough
        ("gpu-BB33", [2]),
        ("GPU-aa", []),  # of two
        ("GPU-cc", []),
        ("MIG-aa11", []),
    ],
)
def test_visible_lists(setting: str | None, found: list[int]) -> None:
    assert visible(setting, UUIDS) == found


def test_cuda_devices_are_numbered_as_the_variable_says(machine: Machine) -> None:
    machine(nvidia=[answers.H100, answers.RTX4090, answers.L4], CUDA_VISIBLE_DEVICES="2,0")
    probe = CudaPlatform.probe()
    assert [(d.index, d.name) for d in probe.devices] == [
        (0, answers.L4.name),
        (1, answers.H100.name),
    ]
    machine(nvidia=[answers.H100, answers.A100], CUDA_VISIBLE_DEVICES=answers.A100.uuid[:12])
    assert [d.name for d in CudaPlatform.probe().devices] == [answers.A100.name]


def test_numbers_that_cuda_may_read_otherwise_are_noted(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = "set CUDA_DEVICE_ORDER=PCI_BUS_ID"
    machine(nvidia=[answers.L4, answers.A100], CUDA_VISIBLE_DEVICES="0")
    assert note in CudaPlatform.probe().reason
    machine(nvidia=[answers.L4, replace(answers.L4, uuid="GPU-1")], CUDA_VISIBLE_DEVICES="0")
    assert note not in CudaPlatform.probe().reason  # alike, whatever the order
    machine(nvidia=[answers.L4, answers.A100], CUDA_VISIBLE_DEVICES=answers.A100.uuid)
    assert note not in CudaPlatform.probe().reason
    machine(
        nvidia=[answers.L4, answers.A100], CUDA_VISIBLE_DEVICES="0", CUDA_DEVICE_ORDER="PCI_BUS_ID"
    )
    assert note not in CudaPlatform.probe().reason
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    assert note not in CudaPlatform.probe().reason


@pytest.mark.parametrize(
    ("setting", "architecture"),
    [
        ("10.3.0", "gfx1030"),
        ("9.0.10", "gfx90a"),
        (" 11.0.0 ", "gfx1100"),
        ("11.0", ""),
        ("", ""),
        ("gfx1100", ""),
        (None, ""),
    ],
)
def test_a_version_as_an_architecture(setting: str | None, architecture: str) -> None:
    assert Visibility(gfx=setting).overridden == architecture


def test_a_card_made_to_run_anothers_code(machine: Machine) -> None:
    card = answers.AmdCard(
        answers._asic("AMD Radeon RX 6750 XT", "0x73df", "gfx1031", "0x1"), 12272, "a desktop card"
    )
    machine(amd=[card], wheel=ROCM_WHEEL)
    probe = RocmPlatform.probe()
    assert probe.score == 0 and "has no code for gfx1031" in probe.reason
    machine(amd=[card], wheel=ROCM_WHEEL, HSA_OVERRIDE_GFX_VERSION="10.3.0")
    probe = RocmPlatform.probe()
    assert [device.architecture for device in probe.devices] == ["gfx1031"] and probe.score > 10
    assert "has every card run code for gfx1030" in probe.reason


def test_a_card_without_a_serial_has_no_uuid(machine: Machine) -> None:
    card = answers.AmdCard(answers._asic("Radeon 890M", "0x150e", "gfx1150", "0x0"), 512, "an APU")
    machine(amd=[card, answers.MI210], wheel=ROCM_WHEEL)
    assert [bool(card.uuid) for card in RocmPlatform.survey().cards] == [False, True]


def test_hidden_devices_are_a_reason(machine: Machine) -> None:
    for value in ("", "-1"):
        machine(nvidia=[answers.H100, answers.H200], CUDA_VISIBLE_DEVICES=value)
        probe = CudaPlatform.probe()
        assert probe.score == 0
        assert probe.reason == f"no NVIDIA device; CUDA_VISIBLE_DEVICES={value!r} hides 2"


def test_amd_lists_apply_one_after_the_other(machine: Machine) -> None:
    cards = [answers.MI210, answers.MI300X, answers.MI325X]
    machine(amd=cards, wheel=ROCM_WHEEL, ROCR_VISIBLE_DEVICES="1,2", HIP_VISIBLE_DEVICES="1")
    assert [d.name for d in RocmPlatform.probe().devices] == ["AMD Instinct MI325X"]


def test_amd_uuids_and_cudas_variable(machine: Machine) -> None:
    cards = [answers.MI210, answers.MI300X]
    machine(amd=cards, wheel=ROCM_WHEEL, CUDA_VISIBLE_DEVICES="GPU-8af705259683161c")
    assert [d.name for d in RocmPlatform.probe().devices] == ["AMD Instinct MI300X"]
    # HIP's own variable wins over CUDA's.
    machine(amd=cards, wheel=ROCM_WHEEL, HIP_VISIBLE_DEVICES="0")
    assert [d.name for d in RocmPlatform.probe().devices] == ["AMD Instinct MI210"]


def test_the_environment_is_read_where_it_is_given() -> None:
    found = read_visibility({"CUDA_VISIBLE_DEVICES": "0", "OTHER": "1"})
    assert found == Visibility(cuda="0")
    assert found.for_amd == {"ROCR_VISIBLE_DEVICES": None, "CUDA_VISIBLE_DEVICES": "0"}


# ---------------------------------------------------------------------------------------------
# MIG
# ---------------------------------------------------------------------------------------------


def test_one_mig_instance_is_all_cuda_shows(machine: Machine) -> None:
    machine(nvidia=answers.MIG_BOX)
    probe = CudaPlatform.probe()
    (device,) = probe.devices
    assert device.name == "NVIDIA A100-SXM4-80GB MIG" and device.memory == 19968 << 20
    assert "MIG" in probe.reason
    assert CudaPlatform().roofline() is None  # a share of a card has no data sheet


def test_a_mig_instance_by_its_uuid(machine: Machine) -> None:
    third = answers.MIG_BOX[0].instances[2]  # type: ignore[index]
    machine(nvidia=answers.MIG_BOX, CUDA_VISIBLE_DEVICES=f"{third},{answers.MIG_BOX[1].uuid}")
    assert len(CudaPlatform.probe().devices) == 1
    assert CudaPlatform()._cards[0].uuid == third


def test_whole_cards_beside_mig_by_number(machine: Machine) -> None:
    machine(nvidia=answers.MIG_BOX, CUDA_VISIBLE_DEVICES="3,1")
    devices = CudaPlatform.probe().devices
    assert [d.memory for d in devices] == [81920 << 20] * 2
    uuids = [card.uuid for card in CudaPlatform()._cards]
    assert uuids == [answers.MIG_BOX[3].uuid, answers.MIG_BOX[1].uuid]


def test_a_mig_card_without_instances(machine: Machine) -> None:
    machine(nvidia=[replace(answers.A100, instances=())])
    probe = CudaPlatform.probe()
    assert probe.score == 0 and "card 0 is in MIG mode and has no instance" in probe.reason


# ---------------------------------------------------------------------------------------------
# Telemetry
# ---------------------------------------------------------------------------------------------


def test_telemetry(machine: Machine) -> None:
    machine(nvidia=[answers.H100], amd=[answers.MI300X])
    found = nvml.telemetry(CudaPlatform()._cards[0])
    assert (found.power, found.temperature, found.utilization) == (698.5, 61.0, 0.97)
    assert found.memory_used == 81559 << 19
    assert found.clock is None and found.throttled == ("power cap",)
    found = amd_smi.telemetry(RocmPlatform()._cards[0])
    assert (found.power, found.temperature, found.utilization) == (134.0, 43.0, 0.64)
    assert found.memory_used == 288 << 20 and found.clock == 1700.0
    assert found.throttled == ("power cap",)


def test_an_older_library_lacks_functions(machine: Machine) -> None:
    old = fake_pynvml([answers.H100])
    for name in (
        *("nvmlDeviceGetMigMode", "nvmlSystemGetCudaDriverVersion_v2"),
        *("nvmlDeviceGetCurrentClocksThrottleReasons", "nvmlDeviceGetPowerUsage"),
    ):
        delattr(old, name)
    machine(nvidia=old)
    (card,) = CudaPlatform()._cards
    found = nvml.telemetry(card)
    assert found.power is None and found.throttled == () and found.temperature == 61.0


def test_telemetry_without_a_library_is_unknown(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(nvidia=[answers.H100], amd=[answers.MI300X])
    cards = CudaPlatform()._cards[0], RocmPlatform()._cards[0]
    machine(nvidia=[], amd=fake_amdsmi([], init_error="gone"))
    assert nvml.telemetry(cards[0]).power is None
    assert amd_smi.telemetry(cards[1]).power is None
