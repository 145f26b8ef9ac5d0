"""`import trimaran`: lazy names, no torch."""

import subprocess
import sys

import pytest

import trimaran


def test_importing_the_package_brings_no_torch(tmp_path) -> None:
    code = "import sys, trimaran; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LLMM'"):
        _ = trimaran.LLMM


def test_every_public_name_is_listed() -> None:
    assert set(trimaran.__all__) == {*trimaran._HOMES, "__version__"}
    assert set(trimaran.__all__) <= set(dir(trimaran))
