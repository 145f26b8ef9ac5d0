"""Errors to plant in what makes tokens of logits, and batches of tokens."""

from __future__ import annotations

from kernel_mutant import Family, KernelMutant

MUTANTS: list[KernelMutant] = []

of = Family("noise.py", "test_sampling.py", MUTANTS)
of.plant(
    "position and child exchanged in the counter",
    "test_noise[(1, 2, 3, 4)]",
    *("bits_of_blocks", "position + zero, child + zero", "child + zero, position + zero"),
)
of.plant(
    "the word of the token after",
    "test_noise[(1, 2, 3, 4)]",
    *("gumbel_at", "lane = tokens % 4", "lane = (tokens + 1) % 4"),
)
of.plant(
    "words of a block in another order",
    "test_noise[(1, 2, 3, 4)]",
    *(
        "gumbel_from",
        "tl.join(tl.join(w0, w2), tl.join(w1, w3))",
        "tl.join(tl.join(w0, w1), tl.join(w2, w3))",
    ),
)
of.plant(
    "1 - u loses what u has",
    "test_variates_of_few_and_many_bits",
    *("gumbel", "u < 0.29289323, log", "u < 0.0, log"),
)
of.plant(
    "the last term of the logarithm",
    "test_exponential_and_logarithm",
    *("log_of_sum", " - 2.12194440e-4 * exponent", ""),
)
of.plant(
    "the significand from 1 to 2",
    "test_exponential_and_logarithm",
    *("log", "bits - 0x3F3504F3", "bits - 0x3F800000"),
)
of.plant(
    "an exponential that ends too early",
    "test_exponential_and_logarithm",
    *("exp_negative", "x < -87.0, 0.0", "x < -80.0, 0.0"),
)

of = Family("sampling.py", "test_sampling.py", MUTANTS)
of.plant(
    "of equal scores the last",
    "test_argmax_of_equals_and_of_what_is_no_number",
    *("ranked", "(0x7FFFFFFF - index)", "(0 + index)"),
    *("index_of", "0x7FFFFFFF - (rank & 0x7FFFFFFF)", "rank & 0x7FFFFFFF"),
)
of.plant(
    "a zero above a negative zero",
    "test_argmax_of_equals_and_of_what_is_no_number",
    *("ranked", "score = tl.where(score == 0.0, 0.0, score)", "score = score * 1.0"),
)
of.plant(
    "the end of a row",
    "test_argmax[1000-20]",
    *("_argmax", "column < end, tl.maximum", "column < end + 1, tl.maximum"),
    *("_argmax", "mask=column < end, other=0.0)", "mask=column < end, other=99.0)"),
)
of.plant(
    "the first part of a row alone",
    "test_argmax[5003-20]",
    *("_best_of_splits", "SPLITS + tl.arange(0, SPLITS)", "SPLITS + 0 * tl.arange(0, SPLITS)"),
)
of.plant(
    "NaN passed over",
    "test_rows_that_fail",
    *("_largest", 'tl.where(x == x, x, float("inf"))', 'tl.where(x == x, x, float("-inf"))'),
)
of.plant(
    "the noise of a row's first tile for all",
    "test_draws_are_the_references[1000-3.0]",
    *("_survey", "gumbel_from(start, TILE", "gumbel_from(0, TILE"),
)
of.plant(
    "noise by the place in the list",
    "test_draws_are_the_references[1000-3.0]",
    *("_choose", "score = gumbel_at(token,", "score = gumbel_at(column,"),
)
of.plant(
    "the nucleus ends after its boundary",
    "test_a_nucleus_that_ends_exactly",
    *("_search", "found.to(tl.float64) >= enough", "found.to(tl.float64) > enough"),
)
of.plant(
    "the nucleus of all, not of the top k",
    "test_draws_are_the_references[1000-0.5]",
    *(
        "_choose",
        "total = tl.max(found, axis=0).to(tl.float64)",
        "total = total + 0.0 * tl.max(found, axis=0)",
    ),
)
of.plant(
    "what is near a pivot counts as before it",
    "test_draws_are_the_references[1000-0.5]",
    *("_above", "bits[:, None] <= pivots[None, :]", "bits[:, None] <= pivots[None, :] + 65536"),
)
of.plant(
    "the list of a top k is one short",
    "test_draws_are_the_references[1000-3.0]",
    *("_last_bin", ">= top_k", ">= top_k - 1"),
)
of.plant(
    "the list of a nucleus ends too early",
    "test_logits_at_the_edges_of_bins",
    *("_last_bin", "tl.maximum(number - 1, 0)", "tl.maximum(number - 2, 0)"),
)
of.plant(
    "ids of a list from the start of a tile",
    "test_draws_are_the_references[1000-3.0]",
    *("_collect", "tl.store(ids_ptr + at, column, ", "tl.store(ids_ptr + at, column - start, "),
)
of.plant(
    "ids of the first row's list",
    "test_draws_are_the_references[1000-3.0]",
    *("_choose", "ids_ptr + row * LIST + column", "ids_ptr + column"),
)
of.plant(
    "no temperature",
    "test_draws_are_the_references[50-3.0]",
    *("_distance", "temperature + tl.zeros_like(x)", "1.0 + tl.zeros_like(x)"),
)
of.plant(
    "weights that fall too slowly",
    "test_draws_are_the_references[1000-0.5]",
    *("_weight", "exp_negative(-distance)", "exp_negative(-distance * 0.99)"),
)
of.plant(
    "bins half as wide as they are taken to be",
    "test_logits_at_the_edges_of_bins",
    *("_bin", "distance * 4.0", "distance * 8.0"),
)
of.plant(
    "min_p left out",
    "test_settings_at_their_ends",
    *("_settings", "tl.where(min_p > 0.0,", "tl.where(min_p > 1.0,"),
)

of = Family("logits.py", "test_logits.py", MUTANTS)
of.plant(
    "penalized once for every time a prompt has a token",
    "test_penalties[1500]",
    *(
        "_penalized",
        "    tl.store(new_ptr + place * longest + column, x, mask=inside)",
        """    tl.store(new_ptr + place * longest + column, x, mask=inside)
    tl.store(logits_ptr + index * stride + token, x, mask=inside)""",
    ),
)
of.plant(
    "presence of what was not generated",
    "test_penalties[50]",
    *("_penalized", "tl.where(count > 0.0, presence, 0.0)", "presence"),
)
of.plant(
    "negative logits divided",
    "test_penalties[50]",
    *("_penalized", "x * repetition)", "x / repetition)"),
)
of.plant(
    "the last token of a row not replaced",
    "test_penalties[50]",
    *("_replace", "inside = column < length", "inside = column < length - 1"),
)
of.plant(
    "bans beyond the vocabulary",
    "test_bitmask_does_not_write_past_a_row",
    *("_bitmask", "mask=banned & (column < VOCAB)", "mask=banned"),
)
of.plant(
    "masks for the first rows",
    "test_bitmask[100-torch.int32]",
    *("_bitmask", "row = tl.load(index_ptr + place).to(tl.int64)", "row = place"),
)
of.plant(
    "a logit is higher than itself",
    "test_logprobs[100-1-torch.float32]",
    *("_weigh", "x[:, None] > chosen[None, :]", "x[:, None] >= chosen[None, :]"),
)
of.plant(
    "the parts of a row have one largest",
    "test_logprobs[5003-1-torch.float32]",
    *("_logprobs", "tl.sum(sums * tl.exp(most - largest), axis=0)", "tl.sum(sums, axis=0)"),
)

of = Family("batch.py", "test_batch.py", MUTANTS)
of.plant(
    "positions without what is computed",
    "test_batches[decode-0]",
    *(
        "_gather_tokens",
        "position = tl.load(computed_ptr + row, mask=used, other=0) + token",
        "position = token",
    ),
)
of.plant(
    "positions counted from the first sequence",
    "test_batches[decode-0]",
    *("_gather_tokens", "position - tl.load(starts_ptr + low, mask=used, other=0)", "position"),
)
of.plant(
    "a sequence without tokens has no length",
    "test_batches[mixed-0]",
    *("_starts", "seq, computed + count,", "seq, tl.where(count > 0, computed + count, 0),"),
)
of.plant(
    "a sequence without tokens takes the next one's",
    "test_batches[mixed-0]",
    *(
        "_gather_tokens",
        "begun = tl.load(starts_ptr + middle, mask=inside, other=0) <= token",
        "begun = tl.load(starts_ptr + middle, mask=inside, other=0) < tl.maximum(token, 1)",
    ),
)
of.plant(
    "a search one step short",
    "test_batches[one-5]",
    *("prepare", "seqs.bit_length()", "(seqs - 1).bit_length()"),
)
of.plant(
    "sequences of the tiles before forgotten",
    "test_more_sequences_than_a_tile",
    *("_starts", "total += tl.sum(count, axis=0)", "total += 0"),
)
of.plant(
    "slots past a block table",
    "test_tokens_past_their_row_are_not_written",
    *("_gather_tokens", "slot = tl.where(held,", "slot = tl.where(used,"),
)
of.plant(
    "a part of a block table left to the tokens",
    "test_batches[decode-0]",
    *("_gather", "if pid < token_tiles:", "if pid <= token_tiles:"),
)
of.plant(
    "a last block that is not full",
    "test_batches[decode-0]",
    *("_gather_blocks", "+ BLOCK_SIZE - 1) // BLOCK_SIZE", ") // BLOCK_SIZE"),
)
