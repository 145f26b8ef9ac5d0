"""The platform contract's signatures against their golden file.

    python ci/golden_api.py           compare; exit status 1 and a diff where they differ
    python ci/golden_api.py --write   write them; refused where PLATFORM_API was not raised

Whoever changes a signature that vendors implement or call raises PLATFORM_API in the same change.
"""

import dataclasses
import difflib
import inspect
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "data" / "platform_api.txt"


def signatures(interface: ModuleType, ops: ModuleType) -> str:
    """One line a signature, sorted by name; the first line is the version."""
    lines = [f"PLATFORM_API {interface.PLATFORM_API}"]
    for name in interface.__all__:
        member = getattr(interface, name)
        if inspect.isclass(member):
            lines += [f"{name}{line}" for line in class_lines(member)]
        elif not isinstance(member, tuple):  # an alias, or a name that stands for itself
            lines.append(f"{name} = {member}")
    for name, spec in sorted(ops.OPS.items()):
        optional = f"= {' + '.join(spec.composition)}" if spec.composition else "optional"
        need = "required" if spec.required else optional
        lines.append(f"op {name}{inspect.signature(spec.reference)} {need}")
    lines += [f"chain {' + '.join(chain)}" for chain in ops.CHAINS]
    return "\n".join(lines).replace("''", '""').replace("'", "") + "\n"


def class_lines(cls: type[Any]) -> list[str]:
    bases = ", ".join(base.__name__ for base in cls.__bases__ if base is not object)
    lines = [f"({bases})"]
    if dataclasses.is_dataclass(cls):
        for field in dataclasses.fields(cls):
            default = has_default(field)
            lines.append(f".{field.name}: {field.type}{default}")
    else:
        lines += [f".{name}: {kind}" for name, kind in sorted(annotations(cls).items())]
    for name, member in sorted(vars(cls).items()):
        if not name.startswith("_") or name == "__call__":
            lines += method_lines(name, member)
    return lines


def has_default(field: "dataclasses.Field[Any]") -> str:
    if field.default is not dataclasses.MISSING:
        return f" = {field.default!r}"
    return " = …" if field.default_factory is not dataclasses.MISSING else ""


def annotations(cls: type[Any]) -> dict[str, str]:
    """Names to types as they are written; a named tuple keeps them as forward references."""
    found = vars(cls).get("__annotations__", {})
    return {name: getattr(kind, "__forward_arg__", kind) for name, kind in found.items()}


def method_lines(name: str, member: Any) -> list[str]:
    kind = "classmethod " if isinstance(member, classmethod) else ""
    function = getattr(member, "__func__", member)
    if not inspect.isfunction(function):
        return []
    need = " abstract" if getattr(member, "__isabstractmethod__", False) else ""
    return [f".{kind}{name}{inspect.signature(function)}{need}"]


def version(text: str) -> str:
    return text.partition("\n")[0]


def main(write: bool) -> int:
    interface, ops = (import_module(f"trimaran.platforms.{name}") for name in ("interface", "ops"))
    found = signatures(interface, ops)
    golden = GOLDEN.read_text(encoding="utf-8") if GOLDEN.exists() else ""
    if found == golden:
        print(f"{version(golden)}: as in {GOLDEN.name}")
        return 0
    names = (f"{GOLDEN.name} (golden)", "platforms/ (now)")
    print(
        "\n".join(
            difflib.unified_diff(golden.splitlines(), found.splitlines(), *names, lineterm="")
        )
    )
    if version(found) == version(golden):
        print(
            "\nThe contract has changed, its version has not: "
            "raise PLATFORM_API in platforms/api.py."
        )
        return 1
    if write:
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(found, encoding="utf-8")
        print(f"\nwritten to {GOLDEN.name}: {version(found)}")
        return 0
    print(
        "\nThe version was raised: python ci/golden_api.py --write, and say in the CHANGELOG why."
    )
    return 1


if __name__ == "__main__":
    sys.exit(main("--write" in sys.argv[1:]))
