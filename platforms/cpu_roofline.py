"""What bounds this processor, measured: bytes/s read from memory, and flop/s of the products that
the linear layers here really run."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .cpu_weights import linear, packers
from .interface import Roofline
from .ops import DENSE

READ_BYTES = 128 * 2**20
"""Beyond the caches, or most of it is."""
ROWS, WIDTH = 128, 1024
SECONDS = 0.06
"""Each measurement takes about this long: the whole stays below half a second."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@functools.cache
def measured_roofline(threads: int) -> Roofline:
    """With `threads` compute threads. A lower bound of the hardware's own limit: the best of a few
    passes, on a machine that others may use as well."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            bandwidth = _read_bandwidth()
            flops = {name: _product_rate(dtype) for name, dtype in DTYPES.items()}
    finally:
        torch.set_num_threads(before)
    counted = f"{threads} thread" + ("s" if threads > 1 else "")
    return Roofline(bandwidth, flops, f"measured here just now with {counted}")


def _read_bandwidth() -> float:
    """One product of a large matrix and a vector reads it once, as decoding does."""
    matrix = torch.ones(READ_BYTES // 4 // WIDTH, WIDTH)
    vector = torch.ones(WIDTH)
    return READ_BYTES / _best_seconds(lambda: torch.mv(matrix, vector))


def _product_rate(dtype: torch.dtype) -> float:
    """By the packer and the linear layer of this platform, whatever road they take."""
    weight = torch.full((WIDTH, WIDTH), 0.5, dtype=dtype)
    packer = next(one for one in packers() if one.format == DENSE)
    packed = packer.pack({"weight": weight}, (WIDTH, WIDTH))
    multiply = linear()
    few = torch.ones(1, WIDTH, dtype=dtype)
    # Where a plain loop is all there is, even this many rows would take too long.
    rows = ROWS if packed.format != DENSE or dtype == torch.float32 else 8
    many = few.expand(rows, WIDTH).contiguous()
    seconds = _best_seconds(lambda: multiply(many, packed, None))
    return 2 * rows * WIDTH * WIDTH / seconds


def _best_seconds(work: Callable[[], Tensor]) -> float:
    """Of as many runs as `SECONDS` hold, two at least; the first one only warms up."""
    work()
    best, end = float("inf"), time.perf_counter() + SECONDS
    while True:
        start = time.perf_counter()
        work()
        now = time.perf_counter()
        best = min(best, now - start)
        if now >= end:
            return best
