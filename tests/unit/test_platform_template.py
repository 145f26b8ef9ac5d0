"""examples/platform_template: small, independent of the hulls in the box, and right.

`ci/platform_template` does the same with wheels in a fresh environment, and the whole kit.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from trimaran import LLM, SamplingParams
from trimaran.conformance.base import Subject
from trimaran.conformance.report import FAILED, PASSED, Outcome
from trimaran.conformance.worker import Request, answers
from trimaran.core.errors import TrimaranError
from trimaran.core.ops import OpBinder
from trimaran.platforms import interface, ops, registry
from trimaran.platforms.interface import DeviceOutOfMemory, OpSignature
from trimaran.platforms.manifest import check_manifest, read_manifest

TEMPLATE = Path(__file__).parents[2] / "examples" / "platform_template"
SOURCES = sorted(TEMPLATE.rglob("*.py"))
PARTS = ("attention", "device", "ops")
CONTRACT = {"trimaran.platforms.interface": set(interface.__all__), "trimaran.platforms.ops": None}
PROMPTS = ["What is the capital of France?", "Hello", "Add 12 and 30."] * 2
GREEDY = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)


# ---------------------------------------------------------------------------------------------
# As it is written
# ---------------------------------------------------------------------------------------------


def test_it_stays_under_300_lines() -> None:
    lines = {path.name: len(path.read_text().splitlines()) for path in SOURCES}
    assert len(lines) == 4 and sum(lines.values()) < 300, lines


def imports(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(module, name) of each absolute import; the name is empty where all of it is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((node.module or "", alias.name) for alias in node.names)


def outside_the_contract(source: str) -> list[str]:
    """What a source file uses of Trimaran that is not the contract, and of others than torch."""
    tree = ast.parse(source)
    found = []
    for module, name in imports(tree):
        whole = f"{module}.{name}"
        if module.split(".")[0] in {*sys.stdlib_module_names, "torch"} or whole in CONTRACT:
            continue
        known = CONTRACT.get(module, set())
        if module not in CONTRACT or (known is not None and name not in known):
            found.append(whole)
    attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    named = (node.attr for node in attributes if ast.unparse(node.value) == "tri")
    found += [f"tri.{name}" for name in named if name not in interface.__all__]
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_it_uses_nothing_but_the_contract(path: Path) -> None:
    assert outside_the_contract(path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "from trimaran.platforms.cpu import CpuPlatform",
        "from trimaran.platforms import strict",
        "from trimaran.platforms.ledger import MemoryLedger",
        "import trimaran.platforms.attention_reference",
        "from trimaran.core.ops import OpBinder",
        "from trimaran.platforms.interface import check",
        "from trimaran.platforms import interface as tri\ntri.dataclass",
        "import numpy",
    ],
)
def test_what_is_not_the_contract_would_be_noticed(line: str) -> None:
    assert outside_the_contract(line)


# ---------------------------------------------------------------------------------------------
# As it is installed
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package and its metadata, as pip leaves them."""
    source, target = tmp_path_factory.mktemp("source") / "it", tmp_path_factory.mktemp("site")
    shutil.copytree(TEMPLATE, source, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    command += ["--no-build-isolation", "--no-index", "--target", str(target), str(source)]
    subprocess.run(command, check=True, timeout=120)
    return target


@pytest.fixture
def acme(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(str(site))
    yield importlib.import_module("trimaran_acme")
    for name in [name for name in sys.modules if name.startswith("trimaran_acme")]:
        del sys.modules[name]
    registry._loaded.clear()


@pytest.mark.real
def test_it_is_found_by_its_entry_point_and_never_chosen_unasked(acme: ModuleType) -> None:
    (found,) = (one for one in registry.available() if one.name == "acme")
    assert found.cls is acme.AcmePlatform and found.origin == "trimaran-acme 0.1.0"
    assert found.probe.score < 10 and len(found.probe.devices) == 2
    assert registry.choose().name != "acme"


def test_its_classes_derive_from_the_contract_alone(acme: ModuleType) -> None:
    modules = ("trimaran.platforms.interface", "trimaran.platforms.compute", "trimaran_acme")
    allowed = (*modules, "trimaran.platforms.api", "abc", "builtins")
    parts = [acme, *(importlib.import_module(f"trimaran_acme.{n}") for n in PARTS)]
    classes = [one for part in parts for _, one in inspect.getmembers(part, inspect.isclass)]
    own = [one for one in classes if one.__module__.startswith("trimaran_acme")]
    assert len({*own}) >= 5
    for one in own:
        assert all(base.__module__.startswith(allowed) for base in one.__mro__), one.__mro__


def test_its_manifest_and_its_class_agree_with_this_engine(acme: ModuleType, site: Path) -> None:
    manifest = read_manifest("trimaran_acme:AcmePlatform")
    assert manifest.package == site / "trimaran_acme"
    check_manifest(manifest, "trimaran-acme")
    assert interface.PLATFORM_API in acme.AcmePlatform.api
    assert set(tomllib.loads(manifest.path.read_text())) == {"api", "engine", "torch"}


def test_memory_ends_where_the_device_does_and_begins_again(acme: ModuleType) -> None:
    class Small(acme.AcmePlatform):  # type: ignore[name-defined, misc]
        memory = 1000

    device = Small().open(1)
    held = device.alloc((200,), torch.float32, "weights")
    with pytest.raises(DeviceOutOfMemory, match="400 bytes wanted for kv, 200 are free"):
        device.alloc_kv((100,), torch.float32)
    assert device.memory().by_tag == {"weights": 800}
    del held
    assert device.memory().free == 1000
    device.close()
    with pytest.raises(ValueError, match="no device 2"):
        Small().open(2)


def test_what_it_refuses_it_explains(acme: ModuleType) -> None:
    platform = acme.AcmePlatform()
    impls = platform.ops()
    (norm,), (linear,) = impls["rms_norm"], impls["linear"]
    refusal = norm.supports(OpSignature("rms_norm", torch.float32, {"size": 40}))
    assert not refusal and "multiple of 16" in refusal.reason
    refusal = linear.supports(OpSignature("linear", torch.float16, {}))
    assert not refusal and "float16" in refusal.reason
    findings = platform.review({"max_num_seqs": 256})
    assert [(one.kind, one.field, one.value) for one in findings] == [
        ("adjust", "max_num_seqs", 64)
    ]
    assert not platform.review({"max_num_seqs": 64})


def test_its_fusion_is_what_models_ask_for(acme: ModuleType) -> None:
    (fusion,) = acme.AcmePlatform().fusions()
    assert fusion.composition in ops.CHAINS
    assert fusion.impl.op == "+".join(fusion.composition)
    sizes = {"in_features": 32, "out_features": 64}
    binder = OpBinder(acme.AcmePlatform())
    bound = binder.bind_chain(torch.float32, ("linear", sizes), ("silu_mul", {"size": 32}))
    weight = torch.randn(64, 32)
    packed = acme.AcmePacker().pack({"weight": weight}, (64, 32))
    assert packed.tensors[0].shape == (32, 64)
    x, bias = torch.randn(3, 32), torch.randn(64)
    expected = ops.silu_mul(torch.nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(bound(x, packed, bias), expected)


def generate(platform: str) -> list[list[int]]:
    with LLM("default", platform=platform, dtype="float32", max_model_len="256") as llm:
        return [one.outputs[0].token_ids for one in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.real
def test_it_yields_the_tokens_of_cpu(acme: ModuleType) -> None:
    assert generate("acme") == generate("cpu")


@pytest.mark.real
def test_a_copy_for_a_later_contract_is_refused_in_one_line(
    acme: ModuleType, site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in site.iterdir():
        target = tmp_path / "later" / path.name.replace("acme", "later")
        shutil.copytree(path, target, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (path for path in (tmp_path / "later").rglob("*") if path.is_file()):
        path.write_text(path.read_text().replace("acme", "later").replace("Acme", "Later"))
    manifest = tmp_path / "later" / "trimaran_later" / "trimaran-platform.toml"
    manifest.write_text(manifest.read_text().replace('">=0.5,<0.6"', '">=2.0"'))
    monkeypatch.syspath_prepend(str(tmp_path / "later"))
    (later,) = (one for one in registry.available() if one.name == "later")
    assert later.cls is None and later.origin == "trimaran-later 0.1.0"
    assert "asks for platform API >=2.0" in later.probe.reason and "\n" not in later.probe.reason
    assert "trimaran_later" not in sys.modules
    assert registry.choose("acme") is acme.AcmePlatform
    with pytest.raises(TrimaranError, match="'later' is not usable"):
        LLM("default", platform="later")


@pytest.mark.real
@pytest.mark.parametrize("level", ["L0", "L1"])
def test_the_kit_in_short_passes(
    level: str, acme: ModuleType, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process, so that the tests of every change run it; the whole kit is
    `ci/platform_template`'s."""
    paths = filter(None, [str(site), os.environ.get("PYTHONPATH")])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    said = answers(Request(Subject("acme", quick=True), level))
    outcomes = [Outcome(**message["outcome"]) for message in said if "outcome" in message]
    assert [(one.full_name, one.detail) for one in outcomes if one.status == FAILED] == []
    assert sum(one.status == PASSED for one in outcomes) > 10
