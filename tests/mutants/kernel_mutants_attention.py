"""Errors to plant in the attention kernels, and what must notice each."""

from __future__ import annotations

from kernel_mutant import Family, KernelMutant

MUTANTS: list[KernelMutant] = []

of = Family("attention_tile.py", "test_triton_attention.py", MUTANTS)
of.plant(
    "ALiBi without the absolute value",
    "test_features[not causal, alibi]",
    *("attend_keys", "tl.abs(distance).to(tl.float32)", "distance.to(tl.float32)"),
)
of.plant(
    "a window one longer",
    "test_features[window]",
    *("attend_keys", "(distance < WINDOW)", "(distance <= WINDOW)"),
)
of.plant(
    "the oldest key of a window one later",
    "test_features[window]",
    *("oldest_key", "position - WINDOW + 1, 0", "position - WINDOW + 2, 0"),
)
of.plant(
    "no softcap",
    "test_features[softcap]",
    *("attend_keys", "scores = cap - 2.0 * cap / (tl.exp2(scores) + 1.0)", "scores = scores * cap"),
)
of.plant(
    "no sinks",
    "test_sinks[None]",
    *("empty_state", "total = tl.exp2(sink - most)", "total = tl.exp2(sink - most) * 0.0"),
)
of.plant(
    "a query sees the key after its own",
    "test_few_sequences[[(5, 35)]]",
    *("attend_keys", "distance >= 0 if CAUSAL", "distance >= -1 if CAUSAL"),
)
of.plant(
    "a query does not see its own key",
    "test_few_sequences[[(1, 700)]]",
    *("attend_keys", "distance >= 0 if CAUSAL", "distance > 0 if CAUSAL"),
)
of.plant(
    "a key past the last one",
    "test_features[not causal]",
    *("attend_keys", "(at < limit)[None, :]", "(at <= limit)[None, :]"),
)
of.plant(
    "reads behind the last key",
    "test_few_sequences[[(5, 35)]]",
    *("attend_keys", "newest = tl.maximum(limit - 1, 0)", "newest = limit + 0"),
)
of.plant(
    "what was found does not fade",
    "test_few_sequences[[(5, 35)]]",
    *("attend_keys", "acc = acc * fade[:, None]", "acc = acc * 1.0"),
)
of.plant(
    "the weights do not fade",
    "test_few_sequences[[(5, 35)]]",
    *("attend_keys", "total = total * fade + ", "total = total + "),
)
of.plant(
    "key scale of a block's first token",
    "test_int8_cache[None-torch.float32]",
    *("attend_keys", "tl.load(key_scale_ptr + beside)", "tl.load(key_scale_ptr + beside - within)"),
)
of.plant(
    "value scale of a block's first token",
    "test_int8_cache[None-torch.float32]",
    *("attend_keys", "load(value_scale_ptr + beside)", "load(value_scale_ptr + beside - within)"),
)
of.plant(
    "int8 to bfloat16 loses its last bit",
    "test_every_int8_code_as_bfloat16",
    *("decode", "bitcast=True) >> 16", "bitcast=True) >> 16 & -4"),
)
of.plant(
    "int8 to bfloat16 one bit off",
    "test_int8_cache[None-torch.bfloat16]",
    *("decode", "bitcast=True) >> 16", "bitcast=True) >> 15"),
)
of.plant(
    "a column more than a head has",
    "test_head_sizes[80]",
    *("load_rows", "(column < HEAD_DIM)[None, :]", "(column <= HEAD_DIM)[None, :]"),
)
of.plant(
    "sequences looked at together forgotten",
    "test_many_sequences",
    *("find_sequence", "found += tl.sum", "found = (base == 0) * found + tl.sum"),
)

of = Family("attention.py", "test_triton_attention.py", MUTANTS)
of.plant(
    "unmasked too far",
    "test_few_sequences[[(33, 33)]]",
    *("_attend_tiles", "common // BLOCK_N * BLOCK_N, middle", "limit // BLOCK_N * BLOCK_N, middle"),
)
of.plant(
    "unmasked before the window of the last query",
    "test_a_window_that_ends_within_a_tile_of_queries",
    *(
        "_attend_tiles",
        "oldest_key(last_position, WINDOW), BLOCK_N)",
        "oldest_key(first_position, WINDOW), BLOCK_N)",
    ),
)
of.plant(
    "the last query does not see its own key",
    "test_few_sequences[[(5, 35)]]",
    *("_attend_tiles", "limit = last_position + 1", "limit = last_position"),
)
of.plant(
    "the sequences' last tile left out",
    "test_few_sequences[[(33, 33)]]",
    *(
        "_attend_tiles",
        "(first_query >= queries) |",
        "(first_query + BLOCK_Q > tl.maximum(queries, BLOCK_Q)) |",
    ),
)
of.plant(
    "the scale of float8 values left out",
    "test_float8_cache[torch.float8_e4m3fn]",
    *("attend", "cache.value_scale if cache.value_scales", "1.0 if cache.value_scales"),
)
of.plant(
    "the scale of float8 keys left out",
    "test_float8_cache[torch.float8_e4m3fn]",
    *("attend", "plan.score_scale * cache.key_scale", "plan.score_scale"),
)

of = Family("attention_split.py", "test_triton_attention.py", MUTANTS)
of.plant(
    "the end of a split",
    "test_few_sequences[[(1, 700)]]",
    *("_attend_splits", "tiles * (split + 1) // count", "tiles * split // count + tiles // count"),
)
of.plant(
    "the last, partial tile",
    "test_few_sequences[[(1, 700)]]",
    *("_attend_splits", "tl.cdiv(keys, BLOCK_N) - first", "keys // BLOCK_N - first"),
)
of.plant(
    "a sink in every split",
    "test_sinks[None]",
    *("_attend_splits", "tl.where(split == 0, queries * GROUP, 0)", "queries * GROUP"),
)
of.plant(
    "shares rounded down",
    "test_a_plan_follows_the_lengths",
    *("_plan_splits", "tl.maximum(tl.cdiv(tiles, share), 1)", "tl.maximum(tiles // share, 1)"),
)
of.plant(
    "a last tile of keys that nobody counts",
    "test_a_plan_follows_the_lengths",
    *("_key_tiles", "tl.cdiv(keys, BLOCK_N) - oldest_key", "keys // BLOCK_N - oldest_key"),
)
of.plant(
    "those planned before forgotten",
    "test_many_sequences",
    *("_plan_splits", "taken + tl.cumsum(count, axis=0)", "tl.cumsum(count, axis=0)"),
)
of.plant(
    "splits merged without their weights",
    "test_few_sequences[[(1, 700)]]",
    *("_merge_splits", "weights[:, None] * partial", "partial"),
)
of.plant(
    "splits merged before do not fade",
    "test_splits_agree_with_tiles[1]",
    *("_merge_splits", "acc = acc * fade + ", "acc = acc + "),
)

of = Family("mla.py", "test_mla.py", MUTANTS)
of.plant(
    "no mask over the keys",
    "test_decode[[1]-16-torch.float32]",
    *("_attend", "scores = tl.where(inside[None, :], scores, _LOWEST)", "scores = scores * 1.0"),
)
of.plant(
    "a key too many",
    "test_decode[[1]-16-torch.float32]",
    *("_attend", "inside = key < length", "inside = key <= length"),
)
of.plant(
    "the end of a split",
    "test_decode[[70, 16]-5-torch.float32]",
    *("_attend", "tiles * (split + 1) // SPLITS", "tiles * split // SPLITS + tiles // SPLITS"),
)
of.plant(
    "every token is a sequence's only one",
    "test_several_queries_of_a_sequence",
    *("_attend", "tl.load(sequences_ptr + token).to(tl.int64)", "token"),
)
of.plant(
    "the rotary channels left out",
    "test_decode[[70, 16]-5-torch.float32]",
    *("_attend", "LATENT + tl.arange(0, ROTARY)", "LATENT - ROTARY + tl.arange(0, ROTARY)"),
)
of.plant(
    "a chunk of channels left out",
    "test_decode[[70, 16]-5-torch.float32]",
    *("_add_products", "range(0, LATENT, CHUNK)", "range(CHUNK, LATENT, CHUNK)"),
)
of.plant(
    "splits merged without their weights",
    "test_decode[[70, 16]-5-torch.float32]",
    *("_merge", "weights[:, None] * partial", "partial"),
)
