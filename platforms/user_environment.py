"""What the GPU hulls want of the process's environment beyond which cards it shows."""

from __future__ import annotations

import os

FUSION = "TRITON_DEFAULT_FP_FUSION"


def fuse_unless_told() -> None:
    """Have Triton fuse a product and a sum, as the kernels are compiled and tested in CI, where the
    environment says nothing. Triton 3.9 does so by itself, warns at each process's first launch
    that 3.10 will not, and is silent for one who has decided (`triton/knobs.py`)."""
    os.environ.setdefault(FUSION, "1")
