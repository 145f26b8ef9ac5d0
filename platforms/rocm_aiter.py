"""AITER on AMD's Instinct cards, where it is installed."""

from __future__ import annotations

from .cuda_flash_attention import VarlenAttention
from .gpu_library_attention import Library


class Aiter(VarlenAttention):
    """Blocks of 128 tokens or multiples (`csrc/py_itfs_ck/mha_varlen_fwd_kernels.cu`)."""

    name = "aiter"
    library = Library("aiter", "amd-aiter", ">=0.1.4,<0.2", ("gfx942", "gfx950"))
    block_multiple = 128
