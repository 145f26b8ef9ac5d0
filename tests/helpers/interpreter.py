"""Triton's interpreter, mended: it computes as a card does.

As it comes (3.6 to 3.9) it rounds towards zero where a number loses digits, loses the carry where
rounding up reaches a power of two, does not know some 8-bit floats, and computes with the
bits of bfloat16 as if they were integers. torch converts every one of these types rightly. What
stands here is checked by tests/triton/test_interpreter.py.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

TORCH = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.float8e4b8: torch.float8_e4m3fnuz,
    tl.float8e5b16: torch.float8_e5m2fnuz,
}
BITS = {8: (np.uint8, torch.uint8), 16: (np.uint16, torch.int16), 32: (np.uint32, torch.int32)}
BITS[64] = (np.uint64, torch.int64)


def convert(data: Any, given: Any, wanted: Any, rounding: Any) -> Any:
    """The bits of `data`, of type `given`, as the bits of type `wanted`: the nearest, of two the
    even one, as cards have it unless they are asked for something else."""
    _, held = BITS[given.primitive_bitwidth]
    out, as_bits = BITS[wanted.primitive_bitwidth]
    bits = np.frombuffer(data.tobytes(), dtype=f"u{given.primitive_bitwidth // 8}").copy()
    signed = bits.view(f"i{given.primitive_bitwidth // 8}") if held != torch.uint8 else bits
    values = torch.from_numpy(signed).view(TORCH[given]).to(TORCH[wanted])
    return values.view(as_bits).numpy().view(out).reshape(data.shape)


@functools.cache
def skip_unknown(dtype: torch.dtype) -> None:
    """Skip the test where Triton's interpreter has no such type; newer ones have it, and cards."""
    old = triton.__version__.startswith("3.6.") and triton.knobs.runtime.interpret
    if old and dtype == torch.float8_e4m3fnuz:
        pytest.skip(f"Triton {triton.__version__}'s interpreter does not know {dtype}")


def mend() -> None:
    """For this process. What it replaces is named by the interpreter, not by its interface."""
    interpreter._convert_float = convert
    builder = interpreter.InterpreterBuilder
    dot, binary = builder.create_dot, builder.binary_op
    unary, cast = builder.unary_op, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        return dot(self, _widened(a), _widened(b), d, precision, imprecise)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar != tl.bfloat16 or rhs.dtype.scalar != tl.bfloat16:
            return binary(self, lhs, rhs, op)
        found = op(_widened(lhs).data, _widened(rhs).data)
        if found.dtype == np.bool_:  # a comparison
            return interpreter.TensorHandle(found, tl.int1)
        return _narrowed(found)

    def unary_op(self: Any, one: Any, op: Any) -> Any:
        if one.dtype.scalar != tl.bfloat16:
            return unary(self, one, op)
        return _narrowed(op(_widened(one).data))

    def cast_impl(self: Any, one: Any, wanted: Any) -> Any:
        """To and from integers, too."""
        if wanted.scalar == tl.bfloat16 and one.dtype.scalar != tl.bfloat16:
            return _narrowed(one.data)
        return cast(self, _widened(one), wanted)

    builder.create_dot, builder.binary_op = create_dot, binary_op
    builder.unary_op, builder.cast_impl = unary_op, cast_impl
    if triton.__version__.startswith("3.6."):
        _let_one_number_be_an_index()


def _widened(one: Any) -> Any:
    """A handle of bfloat16 as one of fp32; any other as it is."""
    if one.dtype.scalar != tl.bfloat16:
        return one
    wide = convert(one.data, tl.bfloat16, tl.float32, None).view(np.float32)
    return interpreter.TensorHandle(wide, tl.float32)


def _narrowed(values: Any) -> Any:
    """Numbers of any type as a handle of bfloat16."""
    bits = convert(values.astype(np.float32), tl.float32, tl.bfloat16, None)
    return interpreter.TensorHandle(bits, tl.bfloat16)


def _let_one_number_be_an_index() -> None:
    """Triton 3.6's interpreter asks int() of an array with one dimension, which numpy refuses since
    2.4: `range` of a kernel's argument would fail."""
    patch = interpreter._patch_lang_tensor

    def patch_more(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_more
