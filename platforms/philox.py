"""Counter-based sampling noise: Philox-4x32-10 in tensor integer arithmetic.

J. K. Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011, section 4.3.

The noise of a draw is a pure function of (seed, child index, position, token id): the same
whatever else is in the batch, on every device, after a preemption and for any batch shape. Token
`t` is lane `t % 4` of the block whose counter is (t // 4, position, child index, 0) under the key
(low and high half of the seed), so that noise can be had for any subset of a vocabulary alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_MULTIPLIER_0 = 0xD2511F53
_MULTIPLIER_1 = 0xCD9E8D57
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_MASK = 0xFFFFFFFF
_ROUNDS = 10
_LANES = 4

_CHUNK = 1 << 17
"""Counters worked on at once: their words stay in the second-level cache."""

_LARGEST_UNIFORM = 1.0 - 2.0**-24
MAX_GUMBEL = 22.88
"""No draw exceeds this: -log(-log1p(-2**-33)) = 33 log 2 = 22.874, and rounding."""


class NoiseKey(NamedTuple):
    """What keys a row's noise, int64 `[rows]` each: the two unsigned 32-bit halves of the seed,
    the child index, and the position of the token that is drawn (0 is the prompt's first)."""

    seed_low: Tensor
    seed_high: Tensor
    child: Tensor
    position: Tensor

    def rows(self, selected: Tensor | slice) -> NoiseKey:
        return NoiseKey(*(part[selected] for part in self))

    def column(self) -> NoiseKey:
        """The same, as `[rows, 1]`."""
        return NoiseKey(*(part[:, None] for part in self))


Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Ten rounds; words are int64 tensors below 2**32, of shapes that broadcast.

    Products need 64 bits and int64 wraps, which keeps every bit: the low half is masked off, the
    high half is shifted down and masked (the shift is arithmetic). Only what is multiplied next
    needs masking; the other two words carry stray high bits to the end.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1 = _mix(product1, c1, k0), product1
        c2, c3 = _mix(product0, c3, k1), product0
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def _mix(product: Tensor, word: Tensor, key: Tensor) -> Tensor:
    """High half of the product ^ word ^ key; the last two first: in early rounds they are small."""
    return (product >> 32).bitwise_xor(word ^ key).bitwise_and_(_MASK)


def uniform(bits: Tensor) -> Tensor:
    """32 random bits → fp32 in (0, 1). Dense near 0, where Gumbel-max decides; never 0 or 1."""
    return bits.to(torch.float32).add_(0.5).mul_(2.0**-32).clamp_(max=_LARGEST_UNIFORM)


def gumbel(bits: Tensor) -> Tensor:
    """32 random bits → a standard Gumbel variate, -log(E) with E = -log(1 - u) exponential."""
    return uniform(bits).neg_().log1p_().neg_().log_().neg_()


def gumbel_at(key: NoiseKey, token_ids: Tensor) -> Tensor:
    """Noise of the given tokens, int64 `[rows, k]` → fp32 `[rows, k]`."""
    key = key.column()
    zero = torch.zeros_like(key.child)
    words = philox4x32(
        (token_ids // _LANES, key.position, key.child, zero), (key.seed_low, key.seed_high)
    )
    lanes = torch.stack([word.expand(token_ids.shape) for word in words])
    return gumbel(lanes.gather(0, (token_ids % _LANES)[None])[0])


def gumbel_rows(key: NoiseKey, vocab: int) -> Tensor:
    """Noise of a whole vocabulary → fp32 `[rows, vocab]`; four tokens share one block."""
    rows = len(key.position)
    blocks = -(-vocab // _LANES)
    counters = torch.arange(blocks, device=key.position.device)[None]
    noise = torch.empty((rows, blocks, _LANES), dtype=torch.float32, device=counters.device)
    step = max(1, _CHUNK // blocks)
    for start in range(0, rows, step):
        part = key.rows(slice(start, start + step)).column()
        zero = torch.zeros_like(part.child)
        words = philox4x32(
            (counters, part.position, part.child, zero), (part.seed_low, part.seed_high)
        )
        for lane, word in enumerate(words):
            noise[start : start + step, :, lane] = gumbel(word)
    return noise.view(rows, -1)[:, :vocab]
