"""Fails where something leaks into a place that must not know it.

Vendors into the shared deck (`core/`, `server/`), pickles and swallowed errors anywhere in the
package, the environment outside `core/env.py`, torch into the scheduler and the KV manager,
imports hidden in functions, and paths of somebody's machine into any text file.

Usage: python ci/leaks.py [ROOT]
"""

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sources import in_package, repository_files

SHARED_FOLDERS = ("core", "server")
ENVIRONMENT_FILE = Path("core/env.py")
# Drivers hide devices by variables of their own, which must be known before a driver is started;
# platforms cannot import the core, and kernels nothing of ours. Triton is told in its own. The
# compiler's is read when the package is built.
OTHER_ENVIRONMENT_FILES = (
    Path("platforms/visible.py"),
    Path("platforms/cpu_threads.py"),
    Path("platforms/user_environment.py"),
    Path("kernels_cpu/library.py"),
    Path("kernels_cpu/build.py"),
)
MAX_ENVIRONMENT_VARIABLES = 10
CONCRETE_PLATFORMS = frozenset({"cpu", "cuda", "rocm", "strict"})
TORCH_FREE = ("core/kv", "core/request", "core/scheduler")
LAZY_IMPORTS_ALLOWED = ("cli/", "platforms/registry.py")
PICKLING_MODULES = frozenset(
    {"cloudpickle", "dill", "jsonpickle", "joblib", "marshal", "pickle", "shelve"}
)
# Each of these pickles, or unpickles, whatever it is given.
PICKLING_CALLS = frozenset(
    {
        "all_gather_object",
        "broadcast_object_list",
        "gather_object",
        "recv_object_list",
        "recv_pyobj",
        "scatter_object_list",
        "send_object_list",
        "send_pyobj",
    }
)
DEVICE_TYPES = frozenset({"cpu", "cuda", "hip", "mps", "npu", "xla", "xpu"})
VENDOR_WORD = re.compile(
    r"cuda|rocm|nvidia|radeon|cublas|cudnn|hipblas|miopen|nccl|rccl|ascend|flashinfer"
    r"|(?<![a-z])(?:amd|hip|npu|tpu|xpu|nvml|amdsmi)(?![a-z])"
    r"|(?<![a-z0-9])(?:sm_?[0-9]{2,3}|gfx[0-9]{3,4}[a-z]?)(?![0-9])"
)
VENDOR_QUESTION = re.compile(r"is_(?:cpu|cuda|rocm|hip|xpu|npu|tpu|mps)$")
VARIABLE_NAME = re.compile(r"[A-Z][A-Z0-9]*(?:_[A-Z0-9]+)+")
LAZY_REASON = re.compile(r"#\s*lazy:\s*\S")
# A path of one machine; spelled so that this file does not contain it.
MACHINE_PATH = re.compile(r"(?<![\w.-])/" + "work/")

Finding = tuple[int, str]


@dataclass(frozen=True)
class Source:
    name: Path
    tree: ast.Module
    lines: list[str]

    @property
    def shared(self) -> bool:
        return self.name.parts[0] in SHARED_FOLDERS


def dotted(node: ast.expr) -> str:
    """`torch.version.cuda` for that expression; the empty string for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        before = dotted(node.value)
        return f"{before}.{node.attr}" if before else ""
    return ""


def imported_names(name: Path, node: ast.stmt) -> list[str]:
    """Every absolute dotted name that an import statement of the file `name` may bring in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = ("trimaran", *name.parts[:-1])
        base = ".".join((*package[: len(package) - node.level + 1], *base.split("."))).rstrip(".")
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def docstrings(tree: ast.Module) -> set[ast.AST]:
    """Strings that stand alone as statements: documentation, in which any word may be used."""
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def words_of(node: ast.AST) -> list[str]:
    """The names that a node brings into the text: identifiers, attributes, arguments, imports."""
    match node:
        case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word):
            return [word]
        case ast.FunctionDef(name=word) | ast.AsyncFunctionDef(name=word):
            return [word]
        case ast.ClassDef(name=word) | ast.alias(name=word):
            return [word]
        case ast.keyword(arg=str(word)):
            return [word]
    return []


def vendor_words(source: Source) -> Iterator[Finding]:
    prose = docstrings(source.tree)
    for node in ast.walk(source.tree):
        line = getattr(node, "lineno", 0)
        for word in words_of(node):
            if VENDOR_QUESTION.search(word):
                yield line, f"asks for the vendor: `{word}`; ask the platform for a capability"
            elif VENDOR_WORD.search(word.lower()):
                yield line, f"names a vendor: `{word}`"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            found = VENDOR_WORD.search(node.value.lower())
            if found:
                yield line, f"names a vendor in a string: {found.group()!r}"


def device_comparisons(source: Source) -> Iterator[Finding]:
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Compare):
            continue
        sides = [node.left, *node.comparators]
        asked = any(isinstance(side, ast.Attribute) and side.attr == "type" for side in sides)
        literals = {
            leaf.value
            for side in sides
            for leaf in ast.walk(side)
            if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str)
        }
        if asked and literals & DEVICE_TYPES:
            yield node.lineno, "compares a device's type; ask the platform for a capability"


def concrete_platforms(source: Source) -> Iterator[Finding]:
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.stmt):
            continue
        for name in imported_names(source.name, node):
            parts = name.split(".")
            concrete = (
                parts[:2] == ["trimaran", "platforms"] and set(parts[2:3]) & CONCRETE_PLATFORMS
            )
            if concrete or (parts[0] == "trimaran" and "".join(parts[1:2]).startswith("kernels_")):
                yield node.lineno, f"imports a concrete platform: {name}"
                break


def torch_imports(source: Source) -> Iterator[Finding]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.stmt):
            names = imported_names(source.name, node)
            if any(name.split(".")[0] == "torch" for name in names):
                yield node.lineno, "imports torch: the scheduler and the KV manager do without"


def pickles(source: Source) -> Iterator[Finding]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = imported_names(source.name, node)
            if any(name.split(".")[0] in PICKLING_MODULES for name in names):
                yield node.lineno, f"imports a pickling module: {names[0]}"
            if "torch.load" in names:
                yield node.lineno, "torch.load unpickles; read safetensors"
        elif isinstance(node, ast.Attribute):
            if node.attr in PICKLING_CALLS:
                yield node.lineno, f"{node.attr} pickles; send typed messages or tensors"
            elif dotted(node) == "torch.load":
                yield node.lineno, "torch.load unpickles; read safetensors"
        elif (
            isinstance(node, ast.keyword)
            and node.arg == "allow_pickle"
            and not is_false(node.value)
        ):
            yield node.value.lineno, "allow_pickle unpickles"


def is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def environment_reads(source: Source) -> Iterator[Finding]:
    for node in ast.walk(source.tree):
        names = (
            imported_names(source.name, node)
            if isinstance(node, ast.ImportFrom)
            else [dotted(node)]
            if isinstance(node, ast.Attribute)
            else []
        )
        for name in names:
            if name in ("os.environ", "os.environb", "os.getenv", "os.putenv", "os.unsetenv"):
                yield getattr(node, "lineno", 0), f"{name} outside {ENVIRONMENT_FILE}"


def environment_variables(source: Source) -> Iterator[Finding]:
    prose = docstrings(source.tree)
    names = {
        node.value
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node not in prose
        and VARIABLE_NAME.fullmatch(node.value)
    }
    if len(names) > MAX_ENVIRONMENT_VARIABLES:
        listed = ", ".join(sorted(names))
        yield 1, f"{len(names)} variables, {MAX_ENVIRONMENT_VARIABLES} at most: {listed}"


def hidden_imports(source: Source) -> Iterator[Finding]:
    inside = {
        node
        for function in ast.walk(source.tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    for node in sorted(inside, key=lambda node: node.lineno):
        nearby = source.lines[max(node.lineno - 2, 0) : node.end_lineno]
        if not any(LAZY_REASON.search(line) for line in nearby):
            yield node.lineno, "import inside a function without `# lazy: reason`"


def swallowed_errors(source: Source) -> Iterator[Finding]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.ExceptHandler) and all(map(is_nothing, node.body)):
            yield node.lineno, "swallows an error; say why with contextlib.suppress, or handle it"


def is_nothing(statement: ast.stmt) -> bool:
    ellipsis = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Pass) or ellipsis


def lazy_imports_forbidden(source: Source) -> bool:
    path = source.name.as_posix()
    return source.name.name != "__init__.py" and not path.startswith(LAZY_IMPORTS_ALLOWED)


def torch_free(source: Source) -> bool:
    return source.name.with_suffix("").as_posix().startswith(TORCH_FREE)


RULES: tuple[tuple[Callable[[Source], bool], Callable[[Source], Iterator[Finding]]], ...] = (
    (lambda source: source.shared, vendor_words),
    (lambda source: source.shared, device_comparisons),
    (lambda source: source.shared, concrete_platforms),
    (torch_free, torch_imports),
    (lambda source: True, pickles),
    (lambda source: True, swallowed_errors),
    (
        lambda source: source.name not in (ENVIRONMENT_FILE, *OTHER_ENVIRONMENT_FILES),
        environment_reads,
    ),
    (lambda source: source.name == ENVIRONMENT_FILE, environment_variables),
    (lazy_imports_forbidden, hidden_imports),
)


def code_findings(name: Path, text: str) -> Iterator[Finding]:
    try:
        tree = ast.parse(text, filename=str(name))
    except SyntaxError as error:
        yield error.lineno or 0, f"does not parse: {error.msg}"
        return
    source = Source(name, tree, text.splitlines())
    for applies, check in RULES:
        if applies(source):
            yield from check(source)


def text_findings(text: str) -> Iterator[Finding]:
    for number, line in enumerate(text.splitlines(), start=1):
        if MACHINE_PATH.search(line):
            yield number, "contains a path of one machine"


def findings(root: Path) -> Iterator[str]:
    for name in repository_files(root):
        try:
            text = (root / name).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # not a text file
        found = list(text_findings(text))
        if name.suffix == ".py" and in_package(name):
            found += code_findings(name, text)
        for line, message in sorted(found):
            yield f"{name}:{line}: {message}"


def main(root: Path) -> int:
    found = list(findings(root))
    print("\n".join(found) if found else "no leaks")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
