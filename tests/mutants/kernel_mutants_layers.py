"""Errors to plant in rotation, cache, norms, activations and quantizing."""

from __future__ import annotations

from kernel_mutant import Family, KernelMutant

MUTANTS: list[KernelMutant] = []

of = Family("cache.py", "test_cache.py", MUTANTS)
of.plant(
    "a negative slot is slot 0",
    "test_negative_slots_are_not_written",
    *("_write", "slot = tl.load(slots_ptr + token)", "slot = tl.abs(tl.load(slots_ptr + token))"),
)
of.plant(
    "a negative slot is slot 0, with the rotation",
    "test_negative_slots_are_not_written",
    *("_rope", "slot = tl.load(slots_ptr + token)", "slot = tl.abs(tl.load(slots_ptr + token))"),
)
of.plant(
    "values divided by the scale of keys",
    "test_write_float8[torch.float8_e4m3fn]",
    *("_write", "value_scales_ptr, value_scale, slot", "value_scales_ptr, key_scale, slot"),
)
of.plant(
    "values divided by the scale of keys, with the rotation",
    "test_rope_write_float8[torch.float8_e4m3fn]",
    *("_rope", "value_scales_ptr, value_scale, slot", "value_scales_ptr, key_scale, slot"),
)
of.plant(
    "neighbours are turned together",
    "test_rope[1-(6, 2, 128, 128)-torch.float32]",
    *(
        "_rotated",
        "tl.where(column < half, column + half, tl.where(turned, column - half, column))",
        "tl.where(turned, column ^ 1, column)",
    ),
)
of.plant(
    "turned the other way",
    "test_rope[7-(6, 2, 128, 128)-torch.float32]",
    *("_rotated", "tl.where(column < half, -sin, sin)", "tl.where(column < half, sin, -sin)"),
)
of.plant(
    "channels past the rotary ones turned",
    "test_rope[7-(9, 3, 96, 32)-torch.float32]",
    *("_rotated", "turned = column < ROTARY", "turned = column < ROTARY + 2"),
)
of.plant(
    "a head's mean over its padding",
    "test_rope_write[(5, 5, 80, 80)-torch.float32-as it is-normed]",
    *("_rotated", "axis=1) / DIM + eps", "axis=1) / BLOCK + eps"),
)
of.plant(
    "a head's norm without epsilon",
    "test_heads_of_zeros",
    *("_rotated", "axis=1) / DIM + eps", "axis=1) / DIM"),
)
of.plant(
    "float8 not clamped",
    "test_write_float8[torch.float8_e5m2]",
    *("_keep", "x = tl.clamp(x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)", "x = x * 1.0"),
)
of.plant(
    "what is no number gets a scale",
    "test_what_is_no_number_has_a_scale_of_nan[nan]",
    *("_keep", "scales += tl.sum(x * 0.0, axis=1)", "scales += 0.0"),
)
of.plant(
    "the scale of the slot before",
    "test_write[(6, 2, 128, 128)-torch.int8-torch.int32]",
    *("_keep", "block * scales_stride + place, scales", "block * scales_stride + head, scales"),
)


of = Family("norm.py", "test_norm.py", MUTANTS)
of.plant(
    "a mean over the padding",
    "test_norms[(3, 100)-torch.float32]",
    *("_rms_norm", "axis=1) / SIZE + eps", "axis=1) / BLOCK + eps"),
)
of.plant(
    "no epsilon",
    "test_rows_of_next_to_nothing",
    *("_rms_norm", "axis=1) / SIZE + eps", "axis=1) / SIZE"),
)
of.plant(
    "not rounded before the weight",
    "test_the_norm_is_rounded_before_it_is_multiplied",
    *("_rms_norm", "(wide * scale[:, None]).to(dtype).to(tl.float32)", "(wide * scale[:, None])"),
)
of.plant(
    "the residual not rounded",
    "test_the_sum_is_rounded_before_the_norm",
    *("_rms_norm", "residual.to(tl.float32)).to(dtype)", "residual.to(tl.float32))"),
    *("_rms_norm", "tl.store(total_ptr + at, x, ", "tl.store(total_ptr + at, x.to(dtype), "),
)

of = Family("quantize.py", "test_norm.py", MUTANTS)
of.plant(
    "the scale of a fused norm",
    "test_int8_codes_are_those_of_the_reference",
    *("quantize_rows", "scale = most / LIMIT", "scale = most / (LIMIT + 1.0)"),
)
of.plant(
    "what is no number gets a scale",
    "test_what_is_no_number_stays_in_its_row[nan]",
    *("quantize_rows", "scale + poison", "scale"),
)
of = Family("quantize.py", "test_gemm.py", MUTANTS)
of.plant(
    "halves rounded up",
    "test_int8_ties_go_to_the_even_code[8]",
    *("round_half_even", "(x + magic) - magic", "tl.floor(x + 0.5)"),
)
of.plant(
    "cut off, not rounded",
    "test_int8_codes_of_tokens[(9, 300)]",
    *("encode", "x = round_half_even(x)", "x = x * 1.0"),
)
of.plant(
    "the largest of a row's last part only",
    "test_int8_codes_of_tokens[(3, 5000)]",
    *("_quantize", "tl.maximum(most, tl.abs(x.to(tl.float32)))", "tl.abs(x.to(tl.float32))"),
)
of.plant(
    "a scale of NaN forgotten in long rows",
    "test_a_row_that_is_not_finite_has_no_scale[5000]",
    *("_quantize", "scales += tl.sum(poison, axis=1)", "scales += 0.0"),
)

of = Family("activation.py", "test_activation.py", MUTANTS)
of.plant(
    "gelu's approximation for silu",
    "test_gated[silu-(3, 100)-torch.float32]",
    *("_activate", "return x / (1.0 + tl.exp(-x))", "return x / (1.0 + tl.exp(-1.702 * x))"),
)
of.plant(
    "tanh's approximation for gelu",
    "test_gated[gelu-(3, 100)-torch.float32]",
    *("_activate", 'elif KIND == "gelu":', 'elif KIND == "never":'),
    *("_activate", 'tl.static_assert(KIND == "gelu_tanh")', "pass"),
)
of.plant(
    "the cube left out of gelu_tanh",
    "test_gated[gelu_tanh-(3, 100)-torch.float32]",
    *("_activate", "0.07135481282632148", "0.0"),
)
of.plant(
    "the gate not rounded",
    "test_the_gate_is_rounded_before_it_is_multiplied",
    *("_product", "KIND).to(dtype).to(tl.float32)", "KIND)"),
)
of.plant(
    "gate and up exchanged",
    "test_gated[silu-(3, 100)-torch.float32]",
    *(
        "_product",
        "active = _activate(gate.to",
        "gate, up = up, gate\n    active = _activate(gate.to",
    ),
)
of.plant(
    "one of a program's rows again and again",
    "test_gated[silu-(3, 100)-torch.float32]",
    *("_gated", "ROWS + tl.arange(0, ROWS)", "ROWS + tl.arange(0, ROWS) // 2"),
)
of.plant(
    "the largest of a row's last part only",
    "test_int8_codes_are_those_of_the_reference[silu-17000]",
    *("_gated_quantized", "tl.maximum(most, tl.abs(product))", "tl.abs(product)"),
)
of.plant(
    "a scale of NaN forgotten in long rows",
    "test_what_is_no_number_stays_in_its_row[nan-17000]",
    *("_gated_quantized", "scale + tl.sum(poison)", "scale"),
)
of.plant(
    "a difference for a sum",
    "test_add[(5,)-torch.float32]",
    *("_add", "total += tl.load(b_ptr", "total -= tl.load(b_ptr"),
)
