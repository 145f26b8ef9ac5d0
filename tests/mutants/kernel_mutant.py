"""What an error is that is planted in the portable kernels, and which test has to notice it.

An error is a text that becomes another in one function of a file of `kernels_cuda/portable`. None
of them reads or writes far from the tensors: Triton's interpreter works on the memory of its
process, and what is to fail is an assertion.
"""

from __future__ import annotations

from dataclasses import dataclass

from helpers.mutated_tests import Edit


@dataclass(frozen=True)
class KernelMutant:
    """`test`: an id as pytest has it, from tests/triton on."""

    name: str
    file: str
    test: str
    edits: tuple[Edit, ...]


@dataclass(frozen=True)
class Family:
    """The errors of one file, noticed by one file of tests. `mutants`: where they are added."""

    file: str
    tests: str
    mutants: list[KernelMutant]

    def plant(self, name: str, test: str, *edits: str) -> None:
        """`edits`: function, old text and new text of each."""
        parts = tuple(Edit(*edits[i : i + 3]) for i in range(0, len(edits), 3))
        name = f"{self.file.removesuffix('.py')}: {name}"
        self.mutants.append(KernelMutant(name, self.file, f"{self.tests}::{test}", parts))
