"""What hadolint cannot know: do the image files agree with pyproject.toml, with the pins, with each
other, and with what a container of this server must be?

    python3 ci/docker/lint.py [ROOT]
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PYTORCH = "https://download.pytorch.org/whl"
# accelerator → the extras it serves with, and the start of where torch comes from
IMAGES = {
    "cpu": (["server"], f"{PYTORCH}/cpu"),
    "cuda": (["server", "cuda"], ""),  # the ordinary index has the CUDA build
    "rocm": (["server", "rocm"], f"{PYTORCH}/rocm"),
}
COMPILERS = re.compile(r"\b(?:gcc|g\+\+|clang|build-essential)(?![\w-])")
# With torch: exact versions stand in its own metadata, or come with the vendor's packages.
UNPINNED = {"torch", "triton", "amdsmi"}


@dataclass(frozen=True)
class Instruction:
    stage: int
    name: str
    text: str


def parse(text: str) -> list[Instruction]:
    """Instructions with continuation lines joined and comments left out. Stage 0 is what stands
    before the first FROM."""
    lines = [line for line in text.splitlines() if not re.match(r"\s*#", line)]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = []
    stage = 0
    for line in filter(None, map(str.strip, joined.splitlines())):
        name, _, rest = line.partition(" ")
        stage += name.upper() == "FROM"
        found.append(Instruction(stage, name.upper(), " ".join(rest.split())))
    return found


def values(instructions: list[Instruction], name: str) -> list[str]:
    return [found.text for found in instructions if found.name == name]


def default_of(instructions: list[Instruction], argument: str) -> str | None:
    for text in values(instructions, "ARG"):
        name, _, value = text.partition("=")
        if name == argument:
            return value
    return None


def pins(text: str) -> dict[str, str]:
    """`name==version` lines, names as the index spells them."""
    pairs = (line.split("==") for line in text.splitlines() if "==" in line and line[0] != "#")
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def installs(root: Path, accelerator: str, instructions: list[Instruction]) -> Iterator[str]:
    """The extras in the install lines, and the index of torch."""
    extras, index = IMAGES[accelerator]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = " ".join(values(instructions, "RUN"))
    installed = re.findall(r"'trimaran\[([\w,]*)\]'", lines)
    prepared = re.findall(r"dependencies\.py ([\w ]+?) ?>", lines)
    for name in sorted({name for group in installed for name in group.split(",")}):
        if name not in project["optional-dependencies"]:
            yield f"pyproject.toml has no extra {name!r}"
    if installed != [",".join(extras)]:
        yield f"installs trimaran with {installed}, not with [{','.join(extras)}]"
    if prepared != [" ".join(extras)]:
        yield f"dependencies are those of {prepared}, not of {extras}"
    given = default_of(instructions, "TORCH_INDEX")
    if given is None or not given.startswith(index) or bool(given) != bool(index):
        yield f"torch comes from {given!r}, not from {index!r}"
    if accelerator == "rocm" and newest_rocm(root) != default_of(instructions, "ROCM"):
        yield f"ROCM is not {newest_rocm(root)}, the newest in platforms/gpu_wheels.py"


def newest_rocm(root: Path) -> str:
    """The first of ROCM_INDEXES, read without torch, which that file imports."""
    tree = ast.parse((root / "platforms" / "gpu_wheels.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and str(node.value).startswith("rocm"):
            return str(node.value).removeprefix("rocm")
    raise LookupError("platforms/gpu_wheels.py names no index of ROCm")


def versions(root: Path) -> Iterator[str]:
    """The constraints are what is pinned for development, and miss nothing."""
    locked = pins((root / "ci/docker/constraints.txt").read_text(encoding="utf-8"))
    pinned = pins((root / "ci/requirements-dev.txt").read_text(encoding="utf-8"))
    for name in sorted(set(locked) & set(pinned)):
        if locked[name] != pinned[name]:
            yield f"{name} is {locked[name]}, and {pinned[name]} in ci/requirements-dev.txt"
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(x for extra in ("server", "cuda") for x in optional[extra]),
    ]
    names = {re.split(r"[<>=!~\[; ]", line, maxsplit=1)[0].lower() for line in wanted}
    for name in sorted(names - UNPINNED - set(locked)):
        yield f"{name} has no version; run ci/docker/lock"


def runtime(accelerator: str, instructions: list[Instruction]) -> Iterator[str]:
    """What the last stage, which is the image, must be."""
    last = [found for found in instructions if found.stage == instructions[-1].stage]
    base = default_of(instructions, "BASE") or ""
    if not re.fullmatch(r"[\w./-]+:\d[\w.-]*", base):
        yield f"BASE is {base!r}: not an image with a version for a tag"
    users = values(last, "USER")
    if not users or not re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]):
        yield f"runs as {users[-1:]}: not a number other than root's, with a group's"
    entry = values(last, "ENTRYPOINT")
    if not entry or not entry[-1].startswith('["trimaran", "serve"'):
        yield 'the entry point is not ["trimaran", "serve", …]'
    health = values(last, "HEALTHCHECK")
    if not health or "'/health'" not in health[-1] or 'CMD ["' not in health[-1]:
        yield "no health check of /health in exec form"
    if "SIGTERM" not in values(last, "STOPSIGNAL"):
        yield "STOPSIGNAL is not SIGTERM, by which the server drains"
    compiler = any(map(COMPILERS.search, values(last, "RUN")))
    if compiler != (accelerator != "cpu"):
        yield "a compiler in the CPU's image" if compiler else "no compiler for Triton"
    if "PYTHONDONTWRITEBYTECODE" in " ".join(values(instructions, "ENV")):
        yield "PYTHONDONTWRITEBYTECODE: bytecode is what makes the start quick"
    names = [found.name for found in instructions]
    if "ADD" in names and accelerator != "rocm":
        yield "ADD where COPY does"


def shared(files: dict[str, list[Instruction]]) -> Iterator[str]:
    """How a container of the three behaves may not differ."""
    alike = ("USER", "WORKDIR", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD")
    for name in alike:
        found = {accelerator: tuple(values(lines, name)) for accelerator, lines in files.items()}
        if len(set(found.values())) > 1:
            yield f"{name} differs: {found}"
    bases = {default_of(lines, "BASE") for lines in files.values()}
    if len(bases) > 1:
        yield f"BASE differs: {sorted(map(str, bases))}"


def context(root: Path) -> Iterator[str]:
    """.dockerignore lets through what setup.py packs."""
    setup = ast.parse((root / "setup.py").read_text(encoding="utf-8"))
    (folders,) = (
        ast.literal_eval(node.value)
        for node in setup.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FOLDERS"
    )
    let_through = (root / ".dockerignore").read_text(encoding="utf-8").splitlines()
    for name in sorted({*folders, "default_model", "pyproject.toml", "setup.py"}):
        if f"!{name}" not in let_through:
            yield f"{name} is kept out of the build"


def findings(root: Path) -> Iterator[str]:
    files = {}
    for accelerator in IMAGES:
        name = f"ci/docker/Dockerfile.{accelerator}"
        files[accelerator] = parse((root / name).read_text(encoding="utf-8"))
        for found in (
            *installs(root, accelerator, files[accelerator]),
            *runtime(accelerator, files[accelerator]),
        ):
            yield f"{name}: {found}"
    yield from (f"ci/docker/Dockerfile.*: {found}" for found in shared(files))
    yield from (f"ci/docker/constraints.txt: {found}" for found in versions(root))
    yield from (f".dockerignore: {found}" for found in context(root))


def main(root: Path) -> int:
    found = list(findings(root))
    print("\n".join(found) or f"the image files of {', '.join(IMAGES)} agree with the package")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else ".")))
