"""The part of the packaging that pyproject.toml cannot say: the root directory is the package."""

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

FOLDERS = (
    "cli",
    "conformance",
    "core",
    "kernels_cpu",
    "kernels_cuda",
    "kernels_hip",
    "platforms",
    "server",
)
INCLUDE = [pattern for folder in FOLDERS for pattern in (folder, f"{folder}.*")]


class BuildPy(build_py):
    """Keeps this very file, which lies beside the package's `__init__.py`, out of the wheel."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [entry for entry in modules if entry[:2] != ("trimaran", "setup")]


setup(
    packages=["trimaran", *(f"trimaran.{name}" for name in find_packages(include=INCLUDE))],
    cmdclass={"build_py": BuildPy},
)
