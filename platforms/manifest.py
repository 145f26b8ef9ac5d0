"""`trimaran-platform.toml`: what a vendor's package asks for, read before its code is imported.

It lies beside the `__init__.py` of the top-level package of the entry point and says three PEP 440
ranges, none of which may be left out:

    api = ">=0.5,<0.6"    # of the platform contract
    engine = ">=0.1"      # of trimaran
    torch = ">=2.8"
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path

import torch
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import Version

from .. import __version__
from . import api

FILE_NAME = "trimaran-platform.toml"

_OLDER_MINORS = 100
"""How many minors of the major before are thought of: more than there will be."""


class ManifestError(ValueError):
    """A manifest that is missing, wrong, or asks for something else than is here."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The ranges that a package asks for, and where it says so."""

    api: SpecifierSet
    engine: SpecifierSet
    torch: SpecifierSet
    path: Path

    @property
    def package(self) -> Path:
        """The folder of the package."""
        return self.path.parent


_KEYS = tuple(field.name for field in fields(Manifest) if field.name != "path")


def read_manifest(reference: str) -> Manifest:
    """The manifest of the package that `reference` (`module:Class`) is in; nothing is imported.

    Raises `ManifestError`, naming the file and what to change in it.
    """
    path = _package_folder(reference.partition(":")[0].partition(".")[0]) / FILE_NAME
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ManifestError(
            f'{path} is missing: add it, with the ranges {", ".join(_KEYS)} (api = ">=0.5,<0.6").'
        ) from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ManifestError(f"{path} cannot be read: {error}") from None
    unknown = sorted(values.keys() - set(_KEYS))
    if unknown:
        raise ManifestError(f"{path} says {', '.join(unknown)}; it may say {', '.join(_KEYS)}.")
    ranges = {key: _range(path, key, values.get(key)) for key in _KEYS}
    return Manifest(**ranges, path=path)


def check_manifest(manifest: Manifest, release: str) -> None:
    """Raise `ManifestError`, one line, if this engine is not what `manifest` asks for. `release`:
    the name of the distribution, for the advice."""
    if not any(_text(version) in manifest.api for version in _served()):
        here = _text(api.PLATFORM_API)
        what = f"asks for platform API {manifest.api}; this engine has {here}"
        raise ManifestError(_advise(what, manifest.api, here, "trimaran", release))
    for product, asked, here in (
        ("trimaran", manifest.engine, __version__),
        ("torch", manifest.torch, str(torch.__version__)),
    ):
        if not asked.contains(here, prereleases=True):
            what = f"asks for {product} {asked}; {here} is installed"
            raise ManifestError(_advise(what, asked, here, product, release))


def _package_folder(package: str) -> Path:
    """Where the top-level `package` lies. For a name without dots nothing is imported; editable
    installs leave data files out of RECORD, so that metadata would not tell."""
    spec = find_spec(package)
    if spec is None:
        raise ManifestError(f"there is no module {package}: install the package again.")
    if spec.origin is None or not spec.submodule_search_locations:
        raise ManifestError(
            f"{package} is not a package with an __init__.py, beside which {FILE_NAME} would be."
        )
    return Path(spec.origin).parent


def _range(path: Path, key: str, value: object) -> SpecifierSet:
    if not isinstance(value, str) or not value.strip():
        raise ManifestError(f'{path} lacks a range for {key}: write {key} = ">=…".')
    try:
        return SpecifierSet(value)
    except InvalidSpecifier:
        raise ManifestError(
            f'{path}: {key} = "{value}" is no range of versions; write it as ">=1.2,<2".'
        ) from None


def _served() -> Iterator[tuple[int, int]]:
    """The versions of the contract that this engine serves: see `api.negotiate`."""
    major, minor = api.PLATFORM_API
    for lesser in range(minor if major == 0 else 0, minor + 1):  # from 1.0 on minors only add
        yield major, lesser
    if major - 1 in api.SHIMS:
        yield from ((major - 1, lesser) for lesser in range(_OLDER_MINORS))


def _advise(what: str, asked: SpecifierSet, here: str, product: str, release: str) -> str:
    newer = any(
        Version(one.version.removesuffix(".*")) > Version(here)
        for one in asked
        if not one.contains(here, prereleases=True)
    )
    if newer:
        return f"{what}: upgrade {product}, or install an older release of {release}"
    return f"{what}: install a newer release of {release}"


def _text(version: tuple[int, int]) -> str:
    return api.version_text(version)
