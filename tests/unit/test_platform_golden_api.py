"""The golden file of the contract's signatures: as they are, and a change demands the bump."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).parents[2] / "ci" / "golden_api.py"


@pytest.fixture
def golden_api() -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_api", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_contract_is_as_in_its_golden_file(golden_api: ModuleType) -> None:
    assert golden_api.main(write=False) == 0


def altered(golden_api: ModuleType, tmp_path: Path, old: str, new: str) -> Path:
    text = golden_api.GOLDEN.read_text()
    assert old in text
    path = tmp_path / "platform_api.txt"
    path.write_text(text.replace(old, new))
    golden_api.GOLDEN = path
    return path


@pytest.mark.parametrize(
    "old",
    [
        "Platform.open(self, device: int = 0, num_threads: int | None = None) -> Device abstract\n",
        "Capabilities.run_ahead: int = 0\n",
        "op silu_mul(gate_up: Tensor) -> Tensor required\n",
        "Device.alloc(self, shape: Sequence[int],",
        "Platform.classmethod probe(",
        "KVRegion.stride: int\n",
    ],
)
@pytest.mark.parametrize("write", [False, True])
def test_a_changed_signature_without_a_bump_is_refused(
    golden_api: ModuleType, tmp_path: Path, old: str, write: bool
) -> None:
    path = altered(golden_api, tmp_path, old, "")
    before = path.read_text()
    assert golden_api.main(write) == 1
    assert path.read_text() == before


def test_a_bump_is_written_down_and_only_on_demand(
    golden_api: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = altered(golden_api, tmp_path, "PLATFORM_API (0,", "PLATFORM_API (9,")
    assert golden_api.main(write=False) == 1
    assert "CHANGELOG" in capsys.readouterr().out
    assert golden_api.main(write=True) == 0
    assert golden_api.main(write=False) == 0
    assert path.read_text().startswith("PLATFORM_API (0, ")
