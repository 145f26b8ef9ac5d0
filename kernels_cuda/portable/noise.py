"""Sampling noise inside a kernel: Philox bits, and the functions that make Gumbel variates of them.

The noise of a token is a pure function of (seed, child index, position, token id): token t is lane
t % 4 of the Philox-4x32-10 block (Salmon et al., SC 2011, section 4.3) whose counter is (t // 4,
position, child, 0) under the key (low, high half of the seed). Exponential and logarithm are
computed here, to about an ulp and alike on every device: the hardware's are too coarse where
-log(1 - u) is small, and that is where Gumbel-max decides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .quantize import round_half_even


@triton.jit
def log_of_sum(r, exponent):
    """log((1 + r) * 2^exponent) for r in [sqrt(1/2) - 1, sqrt(2) - 1]; the polynomial is that of
    Cephes' logf (Moshier 1992)."""
    z = r * r
    y = 7.0376836292e-2 * r - 1.1514610310e-1
    y = y * r + 1.1676998740e-1
    y = y * r - 1.2420140846e-1
    y = y * r + 1.4249322787e-1
    y = y * r - 1.6668057665e-1
    y = y * r + 2.0000714765e-1
    y = y * r - 2.4999993993e-1
    y = y * r + 3.3333331174e-1
    y = y * r * z - 2.12194440e-4 * exponent - 0.5 * z
    return r + y + 0.693359375 * exponent


@triton.jit
def log(x):
    """Of fp32 that is positive, finite and not subnormal."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # the significand is from sqrt(1/2) to sqrt(2)
    significand = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    return log_of_sum(significand - 1.0, exponent.to(tl.float32))


@triton.jit
def exp_negative(x):
    """e^x for fp32 x <= 0; 0 below -87. Reduction and polynomial are those of Cephes' expf."""
    bounded = tl.maximum(x, -87.0)
    n = round_half_even(bounded * 1.44269504088896341)
    r = bounded - n * 0.693359375 + n * 2.12194440e-4
    y = 1.9875691500e-4 * r + 1.3981999507e-3
    y = y * r + 8.3334519073e-3
    y = y * r + 4.1665795894e-2
    y = y * r + 1.6666665459e-1
    y = y * r + 5.0000001201e-1
    y = y * r * r + r + 1.0
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.0, 0.0, y * power)


@triton.jit
def gumbel(bits):
    """32 random bits (uint32) -> a standard Gumbel variate, -log(-log(1 - u)), with u =
    (bits + 1/2) / 2^32 and at most 1 - 2^-24."""
    u = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # Below 1 - sqrt(1/2) nothing is subtracted from 1, which would lose what u has below 2^-24.
    exponential = -tl.where(u < 0.29289323, log_of_sum(-tl.minimum(u, 0.29289323), 0.0), log(1 - u))
    return -log(exponential)


@triton.jit
def bits_of_blocks(blocks, key_ptr, stride):
    """The four words of each Philox block, uint32 like `blocks`. A row's key: low and high half of
    its seed, child index, position, int64, `stride` apart."""
    low = tl.load(key_ptr).to(tl.uint32)
    high = tl.load(key_ptr + stride).to(tl.uint32)
    child = tl.load(key_ptr + 2 * stride).to(tl.uint32)
    position = tl.load(key_ptr + 3 * stride).to(tl.uint32)
    counter = blocks.to(tl.uint32)
    zero = counter * 0
    return tl.philox_impl(counter, position + zero, child + zero, zero, low, high)


@triton.jit
def gumbel_at(tokens, key_ptr, stride):
    """The noise of any tokens, fp32 like `tokens`."""
    w0, w1, w2, w3 = bits_of_blocks(tokens // 4, key_ptr, stride)
    lane = tokens % 4
    return gumbel(tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3)))


@triton.jit
def gumbel_from(start, COUNT: tl.constexpr, key_ptr, stride):
    """The noise of the tokens from `start`, a multiple of 4, on: fp32 `[COUNT]`. A block's four
    words serve four tokens."""
    blocks = start // 4 + tl.arange(0, COUNT // 4)
    w0, w1, w2, w3 = bits_of_blocks(blocks, key_ptr, stride)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [blocks, 2, 2], whose order is 0 1 2 3
    return gumbel(tl.reshape(words, [COUNT]))
