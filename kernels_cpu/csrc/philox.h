// Sampling noise, as platforms/philox.py defines it: Philox-4x32-10 (Salmon et al. 2011).
#pragma once
#include "math.h"

namespace trimaran::ISA {

// What keys the noise of a row: the halves of the seed, the child index, the token's position.
struct NoiseKey {
    uint32_t seed_low, seed_high, child, position;
};

constexpr int LANES = 4;  // tokens that share a block
struct Words {
    vu lane[LANES];
};

// The words of W blocks from `first` on; word `lane` of block b is that of token 4 b + lane.
INLINE Words philox(uint32_t first, const NoiseKey& key) {
    constexpr uint32_t M0 = 0xD2511F53, M1 = 0xCD9E8D57, WEYL0 = 0x9E3779B9, WEYL1 = 0xBB67AE85;
    Words words = {};
    // Words are the low halves of 64-bit elements: even blocks first, then the odd ones. Products
    // leave something in the high halves, which the next product does not read.
    for (int odd = 0; odd < 2; odd++) {
        vu64 c0, c1 = key.position - vu64{}, c2 = key.child - vu64{}, c3 = {};
        for (int i = 0; i < W / 2; i++) c0[i] = (uint64_t)first + odd + 2 * i;
        uint32_t k0 = key.seed_low, k1 = key.seed_high;
        UNROLL for (int round = 0; round < 10; round++) {
            const vu64 p0 = wide_product(c0, M0 - vu64{}), p1 = wide_product(c2, M1 - vu64{});
            c0 = p1 >> 32 ^ c1 ^ (uint64_t)k0;
            c2 = p0 >> 32 ^ c3 ^ (uint64_t)k1;
            c1 = p1;
            c3 = p0;
            k0 += WEYL0;
            k1 += WEYL1;
        }
        const vu64 made[LANES] = {c0, c1, c2, c3};
        UNROLL for (int lane = 0; lane < LANES; lane++)
            words.lane[lane] |= odd ? (vu)(made[lane] << 32) : (vu)(made[lane] & 0xffffffffu);
    }
    return words;
}

constexpr float MAX_GUMBEL = 22.88f;  // no noise exceeds this

// 32 random bits as a number in (0, 1).
INLINE vf uniform(vu bits) {
    const vf x = (__builtin_convertvector(bits, vf) + 0.5f) * 0x1p-32f;
    return min(splat(1.0f - 0x1p-24f), x);
}

// -log(E), E = -log(1 - u) exponential; 1 - u is rounded, and what it was rounded by is added.
INLINE vf gumbel(vf u) {
    const vf rest = 1.0f - u, lost = (1.0f - rest) - u;
    return -vlog(-(vlog(rest) + lost / rest));
}

}  // namespace trimaran::ISA
