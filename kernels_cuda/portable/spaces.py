"""What may be tried in place of a table's values: for each kernel its constants and launch options,
each with the values it may have, in order. A search goes from one to a neighbour; what does not
compile, spills or computes something else it throws away, so that this may be generous."""

from __future__ import annotations

from collections.abc import Mapping

Axis = tuple[int, ...]
Space = Mapping[str, Axis]

WARPS: Axis = (1, 2, 4, 8, 16)
STAGES: Axis = (1, 2, 3, 4, 5, 6)
ROWS: Axis = (1, 2, 4, 8, 16)
TILE: Axis = (16, 32, 64, 128, 256)
LINE: Axis = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
PARTS: Axis = (1, 2, 4, 8, 16, 32, 64)

_PRODUCT: Space = {
    "BLOCK_N": TILE,
    "BLOCK_K": TILE,
    "BLOCK_M": TILE,
    "num_warps": WARPS,
    "num_stages": STAGES,
    "GROUP_M": ROWS,
}
_GEMM: Space = {**_PRODUCT, "SPLIT_K": PARTS}
_SCAN: Space = {"SPLITS": (*PARTS, 128), "TILE": LINE, "num_warps": WARPS}
_HEADS: Space = {"HEADS": ROWS, "num_warps": WARPS}
_ROW: Space = {"BLOCK": LINE, "num_warps": (*WARPS, 32)}

SPACES: Mapping[str, Space] = {
    "rms_norm": {"num_warps": (*WARPS, 32), "ROWS": ROWS},
    "gated": {**_ROW, "ROWS": ROWS},
    "gated_quantized": _ROW,
    "add": {**_ROW, "ROWS": ROWS},
    "rope": _HEADS,
    "cache_write": _HEADS,
    "quantize_tokens": {**_ROW, "ROWS": ROWS},
    "gemm_dense": _GEMM,
    "gemm_scaled": _GEMM,
    "gemm_blocks": _GEMM,
    "gemm_int4": _GEMM,
    "moe_dense": _PRODUCT,
    "moe_scaled": _PRODUCT,
    "moe_blocks": _PRODUCT,
    "moe_int4": _PRODUCT,
    "gemm_reduce": {"BLOCK": LINE, "num_warps": WARPS},
    "moe_route": {"ROWS": ROWS, "num_warps": WARPS},
    "moe_sort": {"BLOCK": LINE, "num_warps": WARPS},
    "moe_combine": {"BLOCK": LINE, "num_warps": WARPS},
    "argmax": _SCAN,
    "draw": _SCAN,
    "draw_choose": {
        "TILE": LINE,
        "PIVOTS": (4, 8, 16, 32),
        "LIST": (1024, 2048, 4096, 8192),
        "num_warps": WARPS,
    },
    "penalties": {"TILE": LINE, "num_warps": WARPS},
    "bitmask": {"WORDS": (16, 32, 64, 128, 256), "num_warps": WARPS},
    "logprobs": _SCAN,
    "batch": {"TILE": LINE, "num_warps": WARPS},
    "lora_shrink": {
        "TOKENS": TILE,
        "BLOCK": TILE,
        "SPLITS": PARTS,
        "num_warps": WARPS,
        "num_stages": STAGES,
    },
    "lora_expand": {"TOKENS": TILE, "BLOCK": TILE, "num_warps": WARPS, "num_stages": STAGES},
    "mla": {
        "SPLITS": PARTS,
        "BLOCK": (16, 32, 64),
        "HEADS": (16, 32, 64),
        "CHUNK": (64, 128, 256, 512),
        "OUT": (128, 256, 512),
        "num_warps": WARPS,
        "num_stages": STAGES,
    },
    "attend_tiles": {
        "BLOCK_N": TILE,
        "BLOCK_M": TILE,
        "num_warps": WARPS,
        "num_stages": STAGES,
    },
    "attend_splits": {
        "BLOCK_N": TILE,
        "num_warps": WARPS,
        "num_stages": STAGES,
        "MIN_TILES": (1, 2, 4, 8, 16, 32),
        "PROGRAMS": (64, 128, 256, 512, 1024, 2048, 4096),
        "SPLITS": (4, 8, 16, 32),
    },
}


def axes_of(
    kernel: str, start: Mapping[str, int], options: Mapping[str, Axis]
) -> dict[str, tuple[int, ...]]:
    """Of the values that `start` has, in the order of the space; a value of its own is among them.
    `options`: the vendor's own launch options, for kernels that have them in `start`."""
    declared = {**SPACES[kernel], **options}
    return {
        name: tuple(sorted({*values, start[name]}))
        for name, values in declared.items()
        if name in start
    }
