"""Prints the package's requirements with those of the extras named, one a line, from pyproject.toml
in the working directory. So an image's layer of dependencies needs none of the sources.

    python3 ci/docker/dependencies.py server cuda
"""

import sys
import tomllib
from pathlib import Path
from typing import Any


def requirements(project: dict[str, Any], extras: list[str]) -> list[str]:
    """Raises KeyError for an extra that there is not."""
    optional: dict[str, list[str]] = project["optional-dependencies"]
    wanted = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    return list(dict.fromkeys(wanted))


if __name__ == "__main__":
    pyproject = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    print("\n".join(requirements(pyproject["project"], sys.argv[1:])))
