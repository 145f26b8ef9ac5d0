"""The tests of the kernels are worth something: each error planted in a kernel makes one fail."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "mutants"))

import kernel_mutants_attention
import kernel_mutants_layers
import kernel_mutants_products
import kernel_mutants_tokens
from helpers.mutated_tests import KERNELS, Edit, MutatedTests, plant
from kernel_mutant import KernelMutant

KERNEL_MUTANTS = [
    *kernel_mutants_attention.MUTANTS,
    *kernel_mutants_layers.MUTANTS,
    *kernel_mutants_products.MUTANTS,
    *kernel_mutants_tokens.MUTANTS,
]
TESTS = "tests/triton/"


@pytest.fixture(scope="module")
def mutated() -> Iterator[MutatedTests]:
    with MutatedTests() as running:
        yield running


@pytest.fixture(scope="module")
def sound() -> set[str]:
    """Tests that were seen to pass without an error."""
    return set()


@pytest.mark.slow
@pytest.mark.parametrize("mutant", KERNEL_MUTANTS, ids=lambda mutant: mutant.name)
def test_planted_error_is_found(
    mutant: KernelMutant, mutated: MutatedTests, sound: set[str]
) -> None:
    """Found: by an assertion of the test that names it, which passes without the error."""
    test = TESTS + mutant.test
    if test not in sound:
        result = mutated.run([test])
        assert result.status == 0, f"without an error: {result.output}"
        sound.add(test)
    result = mutated.run([test], mutant.file, mutant.edits)
    assert result.caught, f"status {result.status}, {result.failures}\n{result.output}"


def test_planted_errors_stand_in_the_kernels(tmp_path: Path) -> None:
    """Each text exactly once in its function; what comes out is Python."""
    for number, mutant in enumerate(KERNEL_MUTANTS):
        path = tmp_path / f"{number}.py"
        path.write_text((KERNELS / "portable" / mutant.file).read_text(encoding="utf-8"))
        plant(path, mutant.edits)
        ast.parse(path.read_text(encoding="utf-8"))
    assert len({mutant.name for mutant in KERNEL_MUTANTS}) == len(KERNEL_MUTANTS)


def kernels(path: Path) -> set[str]:
    """The functions of a file that a GPU runs."""
    functions = (n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef))
    return {
        one.name
        for one in functions
        if any("triton.jit" in ast.unparse(decorator) for decorator in one.decorator_list)
    }


@pytest.mark.parametrize("path", sorted((KERNELS / "portable").glob("*.py")), ids=lambda p: p.stem)
def test_every_kernel_has_an_error_to_be_found(path: Path) -> None:
    planted = {e.function for m in KERNEL_MUTANTS if m.file == path.name for e in m.edits}
    assert kernels(path) - planted == set()


def test_texts_that_are_not_there_once_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("def f():\n    return 1\n\n\ndef g():\n    return 1 + 1\n")
    with pytest.raises(ValueError, match="'1' stands 2 times in g"):
        plant(path, [Edit("g", "1", "2")])
    with pytest.raises(ValueError, match="no function h"):
        plant(path, [Edit("h", "1", "2")])
    plant(path, [Edit("f", "1", "2")])
    assert "return 2" in path.read_text() and "return 1 + 1" in path.read_text()
