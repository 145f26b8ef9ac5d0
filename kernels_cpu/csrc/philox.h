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
    // Words are the low halves of 64-bit elements, even blocks in the first vector, odd ones in the
    // second. Products leave something in the high halves, which the next product does not read.
    vu64 c[LANES][2];
    UNROLL for (int odd = 0; odd < 2; odd++) {
        for (int i = 0; i < W / 2; i++) c[0][odd][i] = 2 * i;
        c[0][odd] += (uint64_t)first + odd;
        c[1][odd] = key.position - vu64{};
        c[2][odd] = key.child - vu64{};
        c[3][odd] = vu64{};
    }
    uint32_t k0 = key.seed_low, k1 = key.seed_high;
    UNROLL for (int round = 0; round < 10; round++, k0 += WEYL0, k1 += WEYL1) {
        UNROLL for (int odd = 0; odd < 2; odd++) {
            const vu64 p0 = wide_product(c[0][odd], M0 - vu64{});
            const vu64 p1 = wide_product(c[2][odd], M1 - vu64{});
            c[0][odd] = (p1 >> 32) ^ (c[1][odd] ^ (uint64_t)k0);
            c[2][odd] = (p0 >> 32) ^ (c[3][odd] ^ (uint64_t)k1);
            c[1][odd] = p1;
            c[3][odd] = p0;
        }
    }
    Words words;
    UNROLL for (int lane = 0; lane < LANES; lane++)
        words.lane[lane] = (vu)(c[lane][0] & 0xffffffffu) | (vu)(c[lane][1] << 32);
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
