"""Lets tests import `helpers.…` from this folder, which is no package; sets the environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Tiny models gain nothing from a second thread, and processes side by side lose a lot. Before
# torch is imported; processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where there is no card, Triton's interpreter runs its kernels; asked before triton is imported.
if not any(Path(card).exists() for card in ("/dev/nvidiactl", "/dev/kfd")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parent))
