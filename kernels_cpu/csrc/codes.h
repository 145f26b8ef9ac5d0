// Weights in 8 and 4 bits, tokens in 8, and their products by vectors.
//
// The activations of each token are rounded to int8 first, code = x / scale, scale = max|x| / 127,
// so that products are summed exactly: results are the same for every instruction set, number of
// threads and batch. A token that holds a NaN or an infinity has a scale of NaN.
//
// Codes lie in panels of PANEL outputs by quads of four inputs, the order that dpbusd and AMX read:
// int8 as [N / PANEL][K / 4][PANEL][4], K filled up to a multiple of DEPTH; int4 two quads in a
// byte, [N / PANEL][K / 8][PANEL][4], the first in its low half. What belongs to an output or a
// group of them lies apart, in the same order. The layout is the same for every instruction set.
#pragma once
#include "tile.h"

namespace trimaran::ISA {

constexpr int64_t QUAD = 4;
constexpr int64_t DEPTH = 64;  // inputs that an AMX tile of int8 has

// ---------------------------------------------------------------------------------------------
// Packing
// ---------------------------------------------------------------------------------------------

INLINE int32_t sum_of(const int8_t* codes, int64_t size) {
    vf total = zero();
    int64_t k = 0;
    for (; k + W <= size; k += W) total += load(codes + k);
    if (k < size) total += load_part(codes + k, size - k);
    return (int32_t)sum(total);  // exact: below 2^24
}

static void pack_int8_panel(const int8_t* codes, int64_t stride, int64_t filled, int64_t k_size,
                            int8_t* packed) {
    const int64_t quads = k_size / QUAD, left = k_size % QUAD;
    if (filled < PANEL || k_size % DEPTH) __builtin_memset(packed, 0, up(k_size, DEPTH) * PANEL);
    for (int64_t q = 0; q < quads; q++)
        for (int64_t n = 0; n < filled; n++)
            __builtin_memcpy(packed + (q * PANEL + n) * QUAD, codes + n * stride + q * QUAD, QUAD);
    for (int64_t n = 0; left && n < filled; n++)
        __builtin_memcpy(packed + (quads * PANEL + n) * QUAD, codes + n * stride + quads * QUAD, left);
}

// in: codes [N, K], rows n[2] elements apart. out: packed codes; for each output, edges filled up,
// -128 times the sum of its codes. n: N, K, row stride.
static void pack_int8(const Call& call, const Team& team) {
    const int64_t n_size = call.n[0], k_size = call.n[1], stride = call.n[2];
    for_panels(n_size, team, [&](int64_t first, int64_t filled) {
        const int8_t* codes = (const int8_t*)call.in[0] + first * stride;
        pack_int8_panel(codes, stride, filled, k_size,
                        (int8_t*)call.out[0] + first * up(k_size, DEPTH));
        int32_t* correction = (int32_t*)call.out[1] + first;
        for (int64_t n = 0; n < PANEL; n++)
            correction[n] = n < filled ? -128 * sum_of(codes + n * stride, k_size) : 0;
    });
}

// in: codes [N, K] in 0..15, one a byte, rows n[2] elements apart. out: packed codes. n: N, K, a
// multiple of 8, row stride.
static void pack_int4(const Call& call, const Team& team) {
    const int64_t n_size = call.n[0], k_size = call.n[1], stride = call.n[2];
    for_panels(n_size, team, [&](int64_t first, int64_t filled) {
        const uint8_t* codes = (const uint8_t*)call.in[0] + first * stride;
        uint8_t* packed = (uint8_t*)call.out[0] + first * k_size / 2;
        for (int64_t k = 0; k < k_size; k += 2 * QUAD)
            for (int64_t n = 0; n < PANEL; n++, packed += QUAD) {
                uint32_t quads[2] = {};
                if (n < filled) __builtin_memcpy(quads, codes + n * stride + k, sizeof quads);
                quads[0] |= quads[1] << 4;
                __builtin_memcpy(packed, quads, QUAD);
            }
    });
}

// ---------------------------------------------------------------------------------------------
// Activations
// ---------------------------------------------------------------------------------------------

// A tile of `height` tokens in int8 by quads, [K / 4][height][4]; the scale of each; and where
// weights have groups of inputs, the sum of its codes in each group, [height][groups].
template <class Code>
struct Tokens {
    const Code* codes;
    const float* scales;
    const int32_t* sums;
};

INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

// max|x| / 127, or NaN where not all of x are finite.
template <class X>
INLINE float scale_of(const X* x, int64_t size) {
    vf most = zero(), wrong = zero();  // `wrong`: a sum of zeros, or NaN
    int64_t k = 0;
    for (; k + W <= size; k += W) {
        const vf value = load(x + k);
        most = max(magnitude(value), most);
        wrong = fma(value, zero(), wrong);
    }
    if (k < size) {
        const vf value = load_part(x + k, size - k);
        most = max(magnitude(value), most);
        wrong = fma(value, zero(), wrong);
    }
    return largest(most) / 127.0f + sum(wrong);
}

// Codes of x with `offset` added, up to `padded`; those of fillings, and of a token that is not
// finite, are the offset alone. Returns the scale.
template <class X, class Code>
static float quantize(const X* x, int64_t size, int64_t padded, int offset, Code* codes) {
    const float scale = scale_of(x, size);
    const vf divisor = splat(scale), most = splat(127.0f);
    const vi none = offset - vi{};
    int64_t k = 0;
    if (scale > 0) {
        const auto codes_of = [=](vf value) __attribute__((always_inline)) {
            return nearest(max(min(value / divisor, most), -most)) + none;
        };
        for (; k + W <= size; k += W) store_narrow(codes + k, codes_of(load(x + k)), Code{});
        if (k < size)
            store_narrow(codes + k, codes_of(load_part(x + k, size - k)), Code{}), k += W;
    }
    for (; k < padded; k += W) store_narrow(codes + k, none, Code{});
    return scale;
}

// ---------------------------------------------------------------------------------------------
// int8 weights
// ---------------------------------------------------------------------------------------------

// How quads of a token and of a weight are multiplied. With VNNI as bytes, the token's offset by 128
// because one of the two has no sign; the corrections take the offset out again. Otherwise as 16-bit
// integers, whose products are summed in pairs exactly (those of bytes would saturate): then a
// column has the sums of its even and of its odd pairs side by side.
#ifdef TRIMARAN_VNNI
struct Int8 {
    using Code = uint8_t;
    static constexpr int OFFSET = 128, PARTS = 1;
    INLINE vu8 token(const Code* x) { return (vu8)splat4(x); }
    INLINE vs8 weight(const int8_t* codes) { return (vs8)load_bytes(codes); }
    INLINE vi add(vi sums, vu8 x, vs8 codes) { return dot_bytes(sums, x, codes); }
    INLINE vi total(const vi* sums, const int32_t* correction) {
        return sums[0] + *(const vi_any*)correction;
    }
};
#else
struct Int8 {
    using Code = int16_t;
    static constexpr int OFFSET = 0, PARTS = 2;
    INLINE vs16 token(const Code* x) { return (vs16)splat8(x); }
    INLINE vs16 weight(const int8_t* codes) { return load_words(codes); }
    INLINE vi add(vi sums, vs16 x, vs16 codes) { return sums + multiply_words(x, codes); }
    INLINE vi total(const vi* sums, const int32_t*) { return add_pairs(sums[0], sums[1]); }
};
#endif

// Vectors of W columns that fit the registers with so many sums for each.
constexpr int vectors_of(int sums) {
    const int fit = 2 * MAX_ROWS / sums;
    return fit >= PANEL / W ? PANEL / W : fit >= 2 ? 2 : 1;
}

// Bytes of a panel that all columns go through before the next ones: they stay in the L1 cache, and
// those are fetched into L2 meanwhile, with each step of NV vectors as much as it reads.
constexpr int64_t CODES_PART = 8 << 10;
template <int NV>
struct NextPart {
    const char* at;
};
template <int NV>
INLINE void fetch(NextPart<NV>& next) {
    UNROLL for (int i = 0; i < NV * W * QUAD; i += 64) __builtin_prefetch(next.at + i, 0, 2);
    next.at += NV * W * QUAD;
}

// What goes through a panel once fetches as many columns of it, some lines ahead.
constexpr int64_t CODES_AHEAD = 2048;
template <int VECTORS, class T>
INLINE void fetch_ahead(const T* codes) {
    UNROLL for (int i = 0; i < VECTORS * W * QUAD; i += 64) __builtin_prefetch(codes + CODES_AHEAD + i);
}

// c [MR, PANEL] = tokens times a panel of codes.
struct Int8Weight {
    using Code = Int8::Code;
    static constexpr int OFFSET = Int8::OFFSET;
    static constexpr bool GROUPED = false;
    const int8_t* codes;
    const float* scales;
    const int32_t* corrections;
    int64_t k_size, group = k_size;

    template <int MR>
    void multiply(const Tokens<Code>& x, int64_t origin, float* c) const {
        constexpr int P = Int8::PARTS;
        vi sums[MR][PANEL / W * P] = {};
        for (int64_t first = 0; first < k_size; first += CODES_PART / PANEL)
            add_part<MR>(x.codes + first * MR, codes + origin * k_size + first * PANEL,
                         min(CODES_PART / PANEL, k_size - first), sums);
        UNROLL for (int m = 0; m < MR; m++)
            UNROLL for (int v = 0; v < PANEL / W; v++) {
                const int64_t n = v * W;
                const vi total = Int8::total(&sums[m][v * P], corrections + origin + n);
                const vf scale = splat(x.scales[m]) * load(scales + origin + n);
                store(c + m * PANEL + n, __builtin_convertvector(total, vf) * scale);
            }
    }

    // total += `size` inputs of a panel.
    template <int MR>
    INLINE void add_part(const Code* tokens, const int8_t* part, int64_t size,
                         vi (&total)[MR][PANEL / W * Int8::PARTS]) {
        constexpr int NV = vectors_of(MR * Int8::PARTS), P = Int8::PARTS, STEP = W * QUAD / P;
        NextPart<NV> next{(const char*)(part + size * PANEL)};
        for (int64_t at = 0; at < PANEL; at += NV * W) {
            const int8_t* column = part + at * QUAD;
            const Code* token = tokens;
            vi sums[MR][NV * P];
            UNROLL for (int m = 0; m < MR; m++)
                UNROLL for (int v = 0; v < NV * P; v++) sums[m][v] = total[m][at / W * P + v];
            for (int64_t k = 0; k < size; k += QUAD, column += PANEL * QUAD, token += MR * QUAD) {
                fetch(next);
                decltype(Int8::weight(column)) weight[NV * P];
                UNROLL for (int v = 0; v < NV * P; v++) weight[v] = Int8::weight(column + v * STEP);
                UNROLL for (int m = 0; m < MR; m++) {
                    const auto factor = Int8::token(token + m * QUAD);
                    UNROLL for (int v = 0; v < NV * P; v++)
                        sums[m][v] = Int8::add(sums[m][v], factor, weight[v]);
                }
            }
            UNROLL for (int m = 0; m < MR; m++)
                UNROLL for (int v = 0; v < NV * P; v++) total[m][at / W * P + v] = sums[m][v];
        }
    }
};

// ---------------------------------------------------------------------------------------------
// int4 weights
// ---------------------------------------------------------------------------------------------

// Bytes by bytes, of which the weights' have no sign. Without VNNI eight products of pairs, at most
// 2 * 15 * 127 each, are summed in 16 bits before they are widened.
struct Int4 {
    static constexpr int64_t RUN = 8 * QUAD;
#ifdef TRIMARAN_VNNI
    using Sums = vi;
    INLINE Sums add(Sums sums, vu8 codes, vs8 x) { return dot_bytes(sums, codes, x); }
    INLINE vi widened(Sums sums) { return sums; }
#else
    using Sums = vs16;
    INLINE Sums add(Sums sums, vu8 codes, vs8 x) { return sums + multiply_bytes(codes, x); }
    INLINE vi widened(Sums sums) { return multiply_words(sums, vs16{} + 1); }
#endif
};
INLINE vu8 low_halves(const uint8_t* codes) { return load_bytes(codes) & 15; }
INLINE vu8 high_halves(const uint8_t* codes) { return (vu8)((vu16)load_bytes(codes) >> 4) & 15; }

struct Int4Weight {
    using Code = int8_t;
    static constexpr int OFFSET = 0;
    static constexpr bool GROUPED = true;
    const uint8_t* codes;
    const float* scales;   // [N / PANEL][groups][PANEL]
    const uint8_t* zeros;  // the same
    int64_t k_size, group;

    // dots += a run of inputs.
    template <int MR, int NV>
    INLINE void add_run(const Code* token, const uint8_t* column, NextPart<NV>& next,
                        vi (&dots)[MR][NV]) {
        Int4::Sums sums[MR][NV] = {};
        const auto add_quad = [&](const Code* x, vu8 (&halves)[NV]) __attribute__((always_inline)) {
            UNROLL for (int m = 0; m < MR; m++) {
                const vs8 factor = (vs8)splat4(x + m * QUAD);
                UNROLL for (int v = 0; v < NV; v++) {
                    sums[m][v] = Int4::add(sums[m][v], halves[v], factor);
                    in_place(sums[m][v]);
                }
            }
        };
        UNROLL for (int64_t k = 0; k < Int4::RUN; k += 2 * QUAD, column += PANEL * QUAD) {
            fetch(next);
            vu8 half[NV];
            UNROLL for (int v = 0; v < NV; v++) half[v] = low_halves(column + v * W * QUAD);
            add_quad(token + k * MR, half);
            UNROLL for (int v = 0; v < NV; v++) half[v] = high_halves(column + v * W * QUAD);
            add_quad(token + (k + QUAD) * MR, half);
        }
        UNROLL for (int m = 0; m < MR; m++)
            UNROLL for (int v = 0; v < NV; v++) dots[m][v] += Int4::widened(sums[m][v]);
    }

    template <int MR>
    void multiply(const Tokens<Code>& x, int64_t origin, float* c) const {
        const int64_t groups = k_size / group, at_once = max(1, 2 * CODES_PART / PANEL / group);
        for (int64_t first = 0; first < groups; first += at_once)
            add_groups<MR>(x, origin, {first, min(groups, first + at_once)}, c);
        for (int m = 0; m < MR; m++)
            for (int64_t n = 0; n < PANEL; n += W)
                store(c + m * PANEL + n, load(c + m * PANEL + n) * x.scales[m]);
    }

    // c += groups of inputs; the first are what it starts from.
    template <int MR>
    void add_groups(const Tokens<Code>& x, int64_t origin, Range part, float* c) const {
        constexpr int NV = vectors_of(MR);
        const int64_t groups = k_size / group;
        const uint8_t* panel = codes + origin * k_size / 2;
        NextPart<NV> next{(const char*)(panel + part.end * group / 2 * PANEL)};
        for (int64_t at = 0; at < PANEL; at += NV * W) {
            const uint8_t* column = panel + part.begin * group / 2 * PANEL + at * QUAD;
            const Code* token = x.codes + part.begin * group * MR;
            vf y[MR][NV] = {};
            if (part.begin)
                UNROLL for (int m = 0; m < MR; m++)
                    UNROLL for (int v = 0; v < NV; v++) y[m][v] = load(c + m * PANEL + at + v * W);
            for (int64_t g = part.begin; g < part.end; g++) {
                vi dots[MR][NV] = {};
                for (int64_t k = 0; k < group; k += Int4::RUN) {
                    add_run(token, column, next, dots);
                    token += Int4::RUN * MR;
                    column += Int4::RUN / 2 * PANEL;
                }
                const int64_t place = origin * groups + g * PANEL + at;
                UNROLL for (int v = 0; v < NV; v++) {
                    const vi zero = load_integers(zeros + place + v * W);
                    const vf scale = load(scales + place + v * W);
                    UNROLL for (int m = 0; m < MR; m++) {
                        const vi dot = dots[m][v] - zero * x.sums[m * groups + g];
                        y[m][v] = fma(scale, __builtin_convertvector(dot, vf), y[m][v]);
                    }
                }
            }
            UNROLL for (int m = 0; m < MR; m++)
                UNROLL for (int v = 0; v < NV; v++) store(c + m * PANEL + at + v * W, y[m][v]);
        }
    }
};

}  // namespace trimaran::ISA
