"""Prints the tail of sizes, and fails beyond the limits.

Lines a file, lines a function, cyclomatic complexity (counted as ruff's C901 does) and parameters.
Raise a number only in a commit that says why.

Usage: python ci/size.py [ROOT]
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sources import repository_files

SUFFIXES = frozenset({".py", ".cpp", ".h", ".cu", ".cuh", ".hip"})
FILE_LINES = 600
KERNEL_FILE_LINES = 1000
TEST_FILE_LINES = 800
FUNCTION_LINES = 100
KERNEL_FUNCTION_LINES = 120  # a kernel's arguments stand one a line
COMPLEXITY = 15
PARAMETERS = 8
TAIL = 5

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
BRANCHES = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.ExceptHandler, ast.match_case)


@dataclass(frozen=True)
class Measure:
    value: int
    limit: int | None
    place: str

    @property
    def over(self) -> bool:
        return self.limit is not None and self.value > self.limit


def is_kernel(name: Path) -> bool:
    return name.parts[0].startswith("kernels_")


def function_limit(name: Path) -> int:
    return KERNEL_FUNCTION_LINES if is_kernel(name) else FUNCTION_LINES


def file_limit(name: Path) -> int:
    if is_kernel(name):
        return KERNEL_FILE_LINES
    return TEST_FILE_LINES if name.parts[0] == "tests" else FILE_LINES


def complexity(function: FunctionNode) -> int:
    """One, plus one for each branch; nested functions count into the one around them."""
    inner = list(ast.walk(function))[1:]
    nested = sum(isinstance(node, FunctionNode) for node in inner)
    return 1 + nested + sum(isinstance(node, BRANCHES) for node in inner)


def parameters(function: FunctionNode) -> int:
    """All of them, keyword-only ones too; `self` and `cls` are not counted."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    bound = bool(positional) and positional[0].arg in ("self", "cls")
    starred = (arguments.vararg is not None) + (arguments.kwarg is not None)
    return len(positional) - bound + len(arguments.kwonlyargs) + starred


def function_lines(function: FunctionNode) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def functions(root: Path, names: list[Path]) -> Iterator[tuple[Path, FunctionNode]]:
    for name in names:
        if name.suffix == ".py":
            tree = ast.parse((root / name).read_bytes(), filename=str(name))
            yield from ((name, node) for node in ast.walk(tree) if isinstance(node, FunctionNode))


def measure(root: Path) -> dict[str, list[Measure]]:
    """The measures under each heading, largest first."""
    names = [name for name in repository_files(root) if name.suffix in SUFFIXES]
    tables: dict[str, list[Measure]] = {
        "lines a file": [
            Measure(len((root / name).read_bytes().splitlines()), file_limit(name), str(name))
            for name in names
        ],
        "lines a function": [],
        "complexity": [],
        "parameters": [],
    }
    for name, function in functions(root, names):
        place = f"{name}:{function.lineno} {function.name}"
        most = None if is_kernel(name) else PARAMETERS
        tables["lines a function"].append(
            Measure(function_lines(function), function_limit(name), place)
        )
        tables["complexity"].append(Measure(complexity(function), COMPLEXITY, place))
        tables["parameters"].append(Measure(parameters(function), most, place))
    return {
        title: sorted(rows, key=lambda row: (-row.value, row.place))
        for title, rows in tables.items()
    }


def main(root: Path) -> int:
    failed = False
    try:
        tables = measure(root)
    except SyntaxError as error:
        print(f"{error.filename}:{error.lineno}: does not parse: {error.msg}")
        return 1
    for title, rows in tables.items():
        over = [row for row in rows if row.over]
        failed = failed or bool(over)
        print(title)
        for row in [*over, *(row for row in rows if not row.over)][: max(TAIL, len(over))]:
            print(f"  {row.value:5d}  {row.place}{f'  over {row.limit}' if row.over else ''}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
