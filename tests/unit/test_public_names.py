"""`import trimaran`: lazy names, no torch."""

import subprocess
import sys

import pytest

import trimaran


def test_importing_the_package_brings_no_torch(tmp_path) -> None:
    code = "import sys, trimaran; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0


def test_the_server_beside_its_engine_brings_no_torch() -> None:
    """It starts the engine's process, and only then may anything heavy follow."""
    modules = "trimaran.server.serve, trimaran.core.engine.process_client"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LLMM'"):
        _ = trimaran.LLMM


def test_every_public_name_is_listed() -> None:
    assert set(trimaran.__all__) == {*trimaran._HOMES, "__version__"}
    assert set(trimaran.__all__) <= set(dir(trimaran))


def test_importing_an_engine_collects_no_garbage_and_leaves_the_collector_as_it_was() -> None:
    code = """
import gc, trimaran
runs = []
gc.collect()  # the first of the younger generations would otherwise fall anywhere
gc.callbacks.append(lambda phase, info: runs.append((phase, info["generation"])))
trimaran.LLM
old = gc.get_count()
gc.callbacks.clear()
assert gc.isenabled() and not gc.get_freeze_count() and not runs, runs
assert old[0] < 700, old  # modules are in the oldest generation, not waiting in the youngest
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_collector_that_is_off_stays_off_and_what_is_frozen_stays_frozen(frozen: bool) -> None:
    code = f"""
import gc
from trimaran.core.imports import uncollected
gc.disable()
{"gc.freeze()" if frozen else ""}
count = gc.get_freeze_count()
with uncollected():
    pass
assert not gc.isenabled() and gc.get_freeze_count() == count, gc.get_freeze_count()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
