"""How the trials of installed packages ended, kept between processes in the user's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from .. import __version__
from .manifest import Manifest
from .user_environment import user_cache

_FORMAT = 1


def fingerprint(reference: str, release: str, manifest: Manifest) -> str:
    """Of everything that a trial depends on. Another one, and the package is tried again."""
    digest = hashlib.sha256()
    facts = (_FORMAT, reference, release, sys.version, sys.prefix, torch.__version__, __version__)
    digest.update(repr(facts).encode())
    digest.update(manifest.path.read_bytes())
    for pattern in ("*.py", "*.so"):
        for path in sorted(manifest.package.rglob(pattern)):
            stat = path.stat()
            digest.update(repr((str(path), stat.st_mtime_ns, stat.st_size)).encode())
    return digest.hexdigest()


class TrialMemory:
    """Verdicts by reference (`module:Class`), each valid for one fingerprint only.

    What cannot be read is taken as empty, and what cannot be written is not remembered: a home
    that is read-only or missing costs time, nothing else.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path or _default_path()

    def recall(self, reference: str, mark: str) -> str | None:
        """The verdict (empty: a good one), or None where there is none."""
        entry = self._read().get(reference, {})
        return entry.get("verdict") if entry.get("fingerprint") == mark else None

    def remember(self, reference: str, mark: str, verdict: str) -> None:
        entries = {**self._read(), reference: {"fingerprint": mark, "verdict": verdict}}
        text = json.dumps({"format": _FORMAT, "trials": entries}, indent=1)
        if self._path is None:
            return
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self._path, text)

    def forget(self) -> None:
        if self._path is not None:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _read(self) -> dict[str, dict[str, str]]:
        try:
            read = json.loads(self._path.read_text()) if self._path is not None else {}
            if read["format"] == _FORMAT and all(map(_is_entry, read["trials"].values())):
                return dict(read["trials"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        return {}


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and all(isinstance(value, str) for value in entry.values())


def _default_path() -> Path | None:
    cache = user_cache()
    return None if cache is None else cache / "platforms.json"


def _replace(path: Path, text: str) -> None:
    """Write a whole file or none: other processes read it at any time."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise
