"""The threads of the pool that kernels and torch run on, as the system knows them."""

from __future__ import annotations

import ctypes

import torch

from .library import NativeUnavailable, library


def pool_threads() -> list[int]:
    """The thread ids of the calling thread's pool, of torch's number of threads; its own first.
    Raises NativeUnavailable."""
    native, count = library().entry_points, torch.get_num_threads()
    if not hasattr(native, "trimaran_thread_ids"):
        raise NativeUnavailable("the native library knows no threads: build it again")
    ids = (ctypes.c_int32 * count)()
    native.trimaran_thread_ids(ids, count)
    return [one for one in ids if one]
