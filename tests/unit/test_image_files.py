"""ci/docker/lint.py finds what is planted, and the examples of deployment fit the images."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
ACCELERATORS = ("cpu", "cuda", "rocm")
NEEDED = (
    ".dockerignore",
    "pyproject.toml",
    "setup.py",
    "ci/requirements-dev.txt",
    "platforms/gpu_wheels.py",
)
DOCKERFILE = "ci/docker/Dockerfile"
CONSTRAINTS = "ci/docker/constraints.txt"

# file, what stands there, what is written in its place, a word of the finding
FAULTS = [
    (
        f"{DOCKERFILE}.cuda",
        "'trimaran[server,cuda]'",
        "'trimaran[server,cudaa]'",
        "no extra 'cudaa'",
    ),
    (
        f"{DOCKERFILE}.cuda",
        "'trimaran[server,cuda]'",
        "'trimaran[server]'",
        "installs trimaran with",
    ),
    (f"{DOCKERFILE}.rocm", "py server rocm", "py server cuda", "dependencies are those of"),
    (f"{DOCKERFILE}.rocm", "whl/rocm${ROCM}", "whl/cu130", "torch comes from"),
    (
        f"{DOCKERFILE}.cuda",
        "TORCH_INDEX=\n",
        "TORCH_INDEX=https://example.org\n",
        "torch comes from",
    ),
    (f"{DOCKERFILE}.rocm", "ARG ROCM=7.2", "ARG ROCM=6.4", "ROCM is not 7.2"),
    (f"{DOCKERFILE}.cpu", "USER 10001:10001", "USER root", "not a number other than root's"),
    (f"{DOCKERFILE}.cpu", "USER 10001:10001", "USER 10002:10002", "USER differs"),
    (f"{DOCKERFILE}.cpu", "debian:12.12-slim", "debian:latest", "a version for a tag"),
    (f"{DOCKERFILE}.cpu", "debian:12.12-slim", "debian:12.11-slim", "BASE differs"),
    (f"{DOCKERFILE}.cpu", '["trimaran", "serve"', '["sh", "-c", "trimaran"', "entry point"),
    (f"{DOCKERFILE}.rocm", "'/health'", "'/'", "no health check of /health"),
    (f"{DOCKERFILE}.rocm", "STOPSIGNAL SIGTERM", "STOPSIGNAL SIGKILL", "STOPSIGNAL is not"),
    (f"{DOCKERFILE}.cuda", "gcc libc6-dev libpython3-dev", "tini", "no compiler for Triton"),
    (f"{DOCKERFILE}.cpu", "RUN useradd", "RUN apt-get install gcc && useradd", "a compiler in"),
    (f"{DOCKERFILE}.cpu", "ENV PATH", "ENV PYTHONDONTWRITEBYTECODE=1 PATH", "bytecode"),
    (f"{DOCKERFILE}.cpu", "COPY . source/", "ADD . source/", "ADD where COPY does"),
    (CONSTRAINTS, "msgspec==", "msgspec==0", "in ci/requirements-dev.txt"),
    (CONSTRAINTS, "uvloop==", "uvlop==", "uvloop has no version"),
    (".dockerignore", "!kernels_hip\n", "", "kernels_hip is kept out"),
    ("setup.py", '"kernels_cpu",', '"kernels_cpu", "kernels_npu",', "kernels_npu is kept out"),
    ("pyproject.toml", "server = [", 'server = ["orjson",', "orjson has no version"),
]


@pytest.fixture
def lint(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "ci" / "docker"))
    module = importlib.import_module("lint")
    monkeypatch.delitem(sys.modules, "lint")  # a name that others may have, too
    return module


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "ci" / "docker", tmp_path / "ci" / "docker")
    for name in NEEDED:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_the_image_files_agree_with_the_package(lint: ModuleType) -> None:
    assert list(lint.findings(ROOT)) == []


@pytest.mark.parametrize(("name", "old", "new", "word"), FAULTS)
def test_a_planted_fault_is_found(
    lint: ModuleType, copy: Path, name: str, old: str, new: str, word: str
) -> None:
    text = (copy / name).read_text(encoding="utf-8")
    assert old in text
    (copy / name).write_text(text.replace(old, new), encoding="utf-8")
    assert word in "\n".join(lint.findings(copy))
    assert lint.main(copy) == 1


def test_dependencies_are_those_of_the_extras() -> None:
    command = [sys.executable, "ci/docker/dependencies.py", "server", "cuda"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found = result.stdout.split()
    assert {"numpy", "fastapi", "nvidia-ml-py"} <= set(found)
    assert not {"pytest", "amdsmi"} & set(found)


# ------------------------------------------------------------------------------------------
# examples/deploy


def image_facts(lint: ModuleType, accelerator: str) -> dict[str, Any]:
    """What the image's last stage says: user, caches, port, routes it is probed by."""
    lines = lint.parse((ROOT / f"{DOCKERFILE}.{accelerator}").read_text(encoding="utf-8"))
    last = [line for line in lines if line.stage == lines[-1].stage]
    entry = json.loads(lint.values(last, "ENTRYPOINT")[0])
    return {
        "user": lint.values(last, "USER")[0],
        "cache": lint.values(last, "WORKDIR")[0],
        "port": int(entry[entry.index("--port") + 1]),
    }


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_compose_runs_the_image_as_it_is(lint: ModuleType, accelerator: str) -> None:
    facts = image_facts(lint, accelerator)
    path = ROOT / "examples" / "deploy" / f"compose.{accelerator}.yaml"
    service = yaml.safe_load(path.read_text(encoding="utf-8"))["services"]["trimaran"]
    build = service["build"]
    dockerfile = (path.parent / build["context"] / build["dockerfile"]).resolve()
    assert dockerfile == ROOT / f"{DOCKERFILE}.{accelerator}"
    assert service["user"] == facts["user"]
    assert service["read_only"] and service["cap_drop"] == ["ALL"]
    assert any(volume.endswith(f":{facts['cache']}") for volume in service["volumes"])
    assert all(port.endswith(f":{facts['port']}") for port in service["ports"])
    # The environment says which key, and nobody starts without one.
    assert service["environment"]["TRIMARAN_API_KEY"].startswith("${TRIMARAN_API_KEY:?")


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_kubernetes_runs_the_image_as_it_is(lint: ModuleType, accelerator: str) -> None:
    facts = image_facts(lint, accelerator)
    path = ROOT / "examples" / "deploy" / "kubernetes" / f"{accelerator}.yaml"
    found = {part["kind"]: part for part in yaml.safe_load_all(path.read_text(encoding="utf-8"))}
    assert set(found) == {"Secret", "Service", "Deployment"}
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    user = pod["securityContext"]
    assert f"{user['runAsUser']}:{user['runAsGroup']}" == facts["user"] and user["runAsNonRoot"]
    confined = container["securityContext"]
    assert confined["readOnlyRootFilesystem"] and confined["capabilities"]["drop"] == ["ALL"]
    assert confined["allowPrivilegeEscalation"] is False
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert {facts["cache"], "/tmp"} <= set(mounts)
    assert set(mounts.values()) == {volume["name"] for volume in pod["volumes"]}
    (port,) = container["ports"]
    assert port["containerPort"] == facts["port"]
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    # Served without a key, in server/app.py: loading is not a reason to be ended.
    probed = {kind: container[kind]["httpGet"]["path"] for kind in container if "Probe" in kind}
    assert probed == {
        "startupProbe": "/readyz",
        "readinessProbe": "/readyz",
        "livenessProbe": "/livez",
    }
    (key,) = container["env"]
    reference = key["valueFrom"]["secretKeyRef"]
    assert key["name"] == "TRIMARAN_API_KEY"
    assert reference["name"] == found["Secret"]["metadata"]["name"]
    assert reference["key"] in found["Secret"]["stringData"]


@pytest.mark.parametrize(
    ("accelerator", "resource"), [("cuda", "nvidia.com/gpu"), ("rocm", "amd.com/gpu")]
)
def test_kubernetes_asks_for_a_card(accelerator: str, resource: str) -> None:
    path = ROOT / "examples" / "deploy" / "kubernetes" / f"{accelerator}.yaml"
    parts = yaml.safe_load_all(path.read_text(encoding="utf-8"))
    (deployment,) = (part for part in parts if part["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert container["resources"]["limits"][resource] == 1
