"""The part of the packaging that pyproject.toml cannot say: the root directory is the package, and
the native x86 kernels are built with it."""

import importlib.util
import platform
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
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
ROOT = Path(__file__).resolve().parent


def native_build():
    """kernels_cpu/build.py, read as a file: the package itself cannot be imported while it is
    built."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "kernels_cpu" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildPy(build_py):
    """Keeps this very file, which lies beside the package's `__init__.py`, out of the wheel."""

    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return [entry for entry in modules if entry[:2] != ("trimaran", "setup")]


class BuildNative(build_ext):
    """The kernels for x86 by their own builder. Without a compiler the package is built all the
    same: then torch's implementations serve, and `trimaran platforms` says so."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")).with_name(native_build().LIBRARY))

    def build_extension(self, ext):
        native = native_build()
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)  # of an earlier build: nobody may take it for this one's
        try:
            native.build(target, Path(self.build_temp).resolve())
        except native.BuildError as error:
            print(f"The native x86 kernels are left out: {error}", file=sys.stderr)

    def copy_extensions_to_source(self):
        (native,) = self.extensions
        if Path(self.build_lib, self.get_ext_filename(native.name)).exists():
            super().copy_extensions_to_source()
        else:
            (ROOT / "kernels_cpu" / native_build().LIBRARY).unlink(missing_ok=True)


class AnyPython(bdist_wheel):
    """The library knows nothing of Python: the wheel is bound to the machine alone."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


on_x86 = platform.machine() in ("x86_64", "AMD64")
setup(
    packages=["trimaran", *(f"trimaran.{name}" for name in find_packages(include=INCLUDE))],
    ext_modules=[Extension("trimaran.kernels_cpu.native", sources=[])] if on_x86 else [],
    cmdclass={"build_py": BuildPy, "build_ext": BuildNative, "bdist_wheel": AnyPython},
)
