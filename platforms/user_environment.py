"""What platforms ask of the process's environment, beyond which devices it shows."""

from __future__ import annotations

import os
from pathlib import Path

FUSION = "TRITON_DEFAULT_FP_FUSION"


def fuse_unless_told() -> None:
    """Have Triton fuse a product and a sum, as the kernels are compiled and tested in CI, where the
    environment says nothing. Triton 3.9 does so by itself, warns at each process's first launch
    that 3.10 will not, and is silent for one who has decided (`triton/knobs.py`)."""
    os.environ.setdefault(FUSION, "1")


def user_cache() -> Path | None:
    """Where this package keeps what it can make again, by the rules of the XDG base directories;
    None where there is no home."""
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "trimaran"
    try:
        return Path.home() / ".cache" / "trimaran"
    except RuntimeError:
        return None
