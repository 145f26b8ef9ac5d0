"""Errors to plant in matrix products, experts and adapters."""

from __future__ import annotations

from kernel_mutant import Family, KernelMutant

MUTANTS: list[KernelMutant] = []

of = Family("gemm.py", "test_gemm.py", MUTANTS)
of.plant(
    "no end of the inputs",
    "test_dense[(33, 72, 130)-torch.float32]",
    *(
        "_dense_product",
        "x_ptr + (x_at[:, None] + k[None, :]), (k < IN)",
        "x_ptr + (x_at[:, None] + k[None, :]), (k < IN + 8)",
    ),
    *(
        "_dense_product",
        "w_ptr + (w_at[None, :] + k[:, None]), (k < IN)",
        "w_ptr + (w_at[None, :] + k[:, None]), (k < IN + 8)",
    ),
)
of.plant(
    "ones past the end of the inputs",
    "test_dense[(33, 72, 130)-torch.float32]",
    *("_load", "other=0.0", "other=1.0"),
)
of.plant(
    "no end of the inputs of x",
    "test_what_is_no_number_stays_in_its_row[40]",
    *(
        "_dense_product",
        "x_ptr + (x_at[:, None] + k[None, :]), (k < IN)",
        "x_ptr + (x_at[:, None] + k[None, :]), (k < IN + 8)",
    ),
)
of.plant(
    "no end of the inputs in blocks",
    "test_blocks[(5, 300, 200)-torch.float8_e4m3fn]",
    *(
        "_block_product",
        "x_ptr + (x_at[:, None] + k[None, :]), (k < IN)",
        "x_ptr + (x_at[:, None] + k[None, :]), (k < IN + 8)",
    ),
    *(
        "_block_product",
        "w_ptr + (w_at[None, :] + k[:, None]), (k < IN)",
        "w_ptr + (w_at[None, :] + k[:, None]), (k < IN + 8)",
    ),
)
of.plant(
    "weight scale of the first block of inputs",
    "test_blocks[(5, 300, 200)-torch.float8_e4m3fn]",
    *("_block_product", "tl.load(w_scale_at + group)", "tl.load(w_scale_at)"),
)
of.plant(
    "weight scale of the first block of outputs",
    "test_blocks[(40, 256, 130)-torch.float8_e4m3fn]",
    *("tile_product", "w_scale_ptr + row // GROUP * groups", "w_scale_ptr"),
)
of.plant(
    "activation scale of the first block",
    "test_blocks[(40, 256, 130)-torch.float8_e4m3fn]",
    *("_block_product", "tl.load(x_scale_at + group)", "tl.load(x_scale_at)"),
)
of.plant(
    "the zero of the first group",
    "test_int4[7-32-torch.float16]",
    *("_int4_product", "tl.load(zero_ptr + group * OUTS + ahead)", "tl.load(zero_ptr + ahead)"),
)
of.plant(
    "the scale of the first group",
    "test_int4[7-32-torch.float16]",
    *("_int4_product", "tl.load(scale_ptr + group * OUTS + ahead)", "tl.load(scale_ptr + ahead)"),
)
of.plant(
    "halves of a group exchanged",
    "test_int4[7-64-torch.float16]",
    *("_int4_product", "_less_zero(codes & 15,", "_less_zero(codes >> 4,"),
    *(
        "_int4_product",
        "second_half = _less_zero(codes >> 4,",
        "second_half = _less_zero(codes & 15,",
    ),
)
of.plant(
    "the zero by one, in fp16",
    "test_int4[1-128-torch.float16]",
    *("_less_zero", "(zero + 1024.0)", "(zero + 1025.0)"),
)
of.plant(
    "the zero by one, in bfloat16 by bits",
    "test_int4[1-128-torch.bfloat16]",
    *("_less_zero", "(zero + 8388608.0)", "(zero + 8388609.0)"),
)
of.plant(
    "the zero by one, in bfloat16",
    "test_every_int4_code_with_every_zero[bf16-True]",
    *("_less_zero", "(zero + 128.0)", "(zero + 129.0)"),
)
of.plant(
    "one scale for all rows",
    "test_eight_bits[(5, 200, 100)-torch.int8-rows]",
    *("rescale", "x_row * X_STEP", "x_row * 0"),
)
of.plant(
    "a band shorter than the others",
    "test_dense[(530, 32, 70)-torch.float32]",
    *("tile_of", "tl.minimum(tiles_m - first, GROUP_M)", "GROUP_M"),
)
of.plant(
    "every part of a split sum begins at 0",
    "test_dense[(5, 200, 100)-torch.float16]",
    *("_gemm", "split * steps,", "split * 0,"),
)
of.plant(
    "no bias",
    "test_dense[(33, 72, 130)-torch.float32]",
    *("_gemm", "acc += tl.load(bias_ptr + w_row)", "acc += 0.0 * tl.load(bias_ptr + w_row)"),
)
of.plant(
    "a part of a split sum missing",
    "test_int8_sums_are_exact[2]",
    *("_sum_splits", "tl.static_range(1, SPLIT_K)", "tl.static_range(2, SPLIT_K)"),
)
of.plant(
    "split sums of int8 in fp32",
    "test_int8_sums_are_exact[2]",
    *("_launch", "torch.int32 if x.dtype == torch.int8 else torch.float32", "torch.float32"),
)

of = Family("moe.py", "test_triton_moe.py", MUTANTS)
of.plant(
    "an expert's last tile",
    "test_all_tokens_may_want_one_expert",
    *("_segment", "tiles = (counts + BLOCK_M - 1) // BLOCK_M", "tiles = counts // BLOCK_M"),
)
of.plant(
    "an expert's first tile for all",
    "test_all_tokens_may_want_one_expert",
    *("_segment", "(tile - passed) * BLOCK_M", "(tile - tile) * BLOCK_M"),
)
of.plant(
    "the share of a token's first place",
    "test_dense[(33, 6, 3, 40, 70)-torch.float16]",
    *("_combine", "tl.load(share_ptr + pair + place)", "tl.load(share_ptr + pair)"),
)
of.plant(
    "of equal scores the last",
    "test_routing[(9, 60, 4)-torch.float32]",
    *(
        "_route",
        "_, best = tl.max(key, axis=1, return_indices=True)",
        "best = tl.max(tl.where(key == tl.max(key, axis=1)[:, None], expert, -1), axis=1)",
    ),
)
of.plant(
    "shares not made to sum to one",
    "test_routing[(9, 60, 4)-torch.float32]",
    *("_route", "shares = shares / tl.sum(shares, axis=1)[:, None]", "shares = shares * 1.0"),
)
of.plant(
    "a zero above a negative zero",
    "test_routing_of_odd_scores",
    *("_order_key", "score = tl.where(score == 0.0, 0.0, score)", "score = score * 1.0"),
)
of.plant(
    "an expert's pairs of the turns before",
    "test_sorting[(300, 8, 16)]",
    *("_sort", "first += tl.sum(hit, axis=0)", "first += 0"),
)
of.plant(
    "the gate's scales for up",
    "test_experts_in_eight_bits[21-torch.int8]",
    *("_experts", "w_row = w_first + part * OUT + w_ahead", "w_row = w_first + w_ahead"),
)
of.plant(
    "the weights of an expert before",
    "test_dense[(5, 7, 1, 40, 50)-torch.float16]",
    *("_experts", "w_first = expert * (parts", "w_first = tl.maximum(expert - 1, 0) * (parts"),
)

of = Family("lora.py", "test_lora.py", MUTANTS)
of.plant(
    "no adapter is the first one",
    "test_tokens_without_an_adapter_keep_every_bit",
    *("add_lora", "    if not tokens:", "    index = index.clamp(min=0)\n    if not tokens:"),
)
of.plant(
    "only a tile's highest adapter",
    "test_mixed_adapters[40-24-(64, 64)-torch.float32]",
    *("_shrink", "tl.max(tl.where(index < adapter, index, -1), axis=0)", "adapter * 0 - 1"),
)
of.plant(
    "what is no number spreads to other adapters",
    "test_what_is_no_number_stays_in_its_token",
    *("_shrink", "total = tl.where(mine[:, None], product, total)", "total = total + product"),
)
of.plant(
    "the scale of the first adapter",
    "test_mixed_adapters[3-16-(64, 64)-torch.float32]",
    *("_expand", "tl.load(scales_ptr + adapter)", "tl.load(scales_ptr)"),
)
of.plant(
    "a part of the inputs missing",
    "test_mixed_adapters[3-16-(200, 300)-torch.float32]",
    *("_expand", "for part in range(SPLITS):", "for part in range(1):"),
)
