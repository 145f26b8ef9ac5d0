"""Which files belong to the repository: shared by the lints beside this one."""

import subprocess
from pathlib import Path

PACKAGE_FOLDERS = (
    "cli",
    "conformance",
    "core",
    "kernels_cpu",
    "kernels_cuda",
    "kernels_hip",
    "platforms",
    "server",
)


def repository_files(root: Path) -> list[Path]:
    """Tracked files and new ones that git does not ignore, relative to `root`, sorted.

    Outside a git repository (an unpacked archive), every file that is not below a dot folder.
    """
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if listing.returncode == 0:
        names = {Path(name) for name in listing.stdout.split("\0") if name}
    else:
        names = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
        names = {name for name in names if not any(part.startswith(".") for part in name.parts)}
    return sorted(name for name in names if (root / name).is_file())


def in_package(name: Path) -> bool:
    """Whether a file is part of what is installed as `trimaran`."""
    if len(name.parts) == 1:
        return name.name in ("__init__.py", "__main__.py")
    return name.parts[0] in PACKAGE_FOLDERS
