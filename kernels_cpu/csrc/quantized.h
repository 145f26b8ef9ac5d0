// Linear layers with weights in 8 and 4 bits, multiplied as integers.
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
#include "linear.h"

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
    const Range panels = part_of(up(n_size, PANEL) / PANEL, team.thread, team.num_threads);
    for (int64_t panel = panels.begin; panel < panels.end; panel++) {
        const int64_t first = panel * PANEL, filled = min(PANEL, n_size - first);
        const int8_t* codes = (const int8_t*)call.in[0] + first * stride;
        pack_int8_panel(codes, stride, filled, k_size,
                        (int8_t*)call.out[0] + first * up(k_size, DEPTH));
        int32_t* correction = (int32_t*)call.out[1] + first;
        for (int64_t n = 0; n < PANEL; n++)
            correction[n] = n < filled ? -128 * sum_of(codes + n * stride, k_size) : 0;
    }
}

// ---------------------------------------------------------------------------------------------
// Activations
// ---------------------------------------------------------------------------------------------

// A few tokens in int8, `stride` codes from one to the next.
template <class Code>
struct Tokens {
    Code* codes;
    int64_t stride;
    float* scales;
};

INLINE void store_codes(int8_t* p, vi codes) { *(vb_any*)p = __builtin_convertvector(codes, vb); }
INLINE void store_codes(uint8_t* p, vi codes) { store_codes((int8_t*)p, codes); }
INLINE void store_codes(int16_t* p, vi codes) { *(half_s16*)p = __builtin_convertvector(codes, half_s16); }

INLINE vf magnitude(vf x) { return (vf)((vi)x & 0x7fffffff); }

// max|x| / 127, or NaN where not all of x are finite.
template <class X>
INLINE float scale_of(const X* x, int64_t size) {
    vf most = zero(), wrong = zero();
    const auto see = [&](vf value) __attribute__((always_inline)) {
        most = max(magnitude(value), most);
        wrong = fma(value, zero(), wrong);  // 0, or NaN
    };
    int64_t k = 0;
    for (; k + W <= size; k += W) see(load(x + k));
    if (k < size) see(load_part(x + k, size - k));
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
        const auto codes_of = [&](vf value) __attribute__((always_inline)) {
            return nearest(max(min(value / divisor, most), -most)) + offset;
        };
        for (; k + W <= size; k += W) store_codes(codes + k, codes_of(load(x + k)));
        if (k < size) store_codes(codes + k, codes_of(load_part(x + k, size - k))), k += W;
    }
    for (; k < padded; k += W) store_codes(codes + k, none);
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
    INLINE vi add(vi sums, vs16 x, vs16 codes) {
        return sums + multiply_words(x, codes);
    }
    INLINE vi total(const vi* sums, const int32_t*) {
        return add_pairs(sums[0], sums[1]);
    }
};
#endif

// Vectors of W columns that fit the registers beside so many rows.
constexpr int int8_vectors(int rows) {
    const int fit = 2 * MAX_ROWS / (rows * Int8::PARTS);
    return fit >= PANEL / W ? PANEL / W : fit >= 2 ? 2 : 1;
}

// A panel of int8 weights and what belongs to its columns.
struct Int8Panel {
    const int8_t* codes;
    const float* scales;
    const int32_t* corrections;
};

// c [MR, PANEL] = tokens times a panel, by the quad of K.
template <int MR>
static void int8_tile(const Tokens<Int8::Code>& x, const Int8Panel& panel, int64_t k_size, float* c) {
    constexpr int NV = int8_vectors(MR), P = Int8::PARTS, STEP = W * QUAD / P;
    for (int64_t at = 0; at < PANEL; at += NV * W) {
        const int8_t* codes = panel.codes + at * QUAD;
        vi sums[MR][NV * P] = {};
        for (int64_t k = 0; k < k_size; k += QUAD, codes += PANEL * QUAD) {
            __builtin_prefetch(codes + AHEAD);
            decltype(Int8::weight(codes)) columns[NV * P];
            UNROLL for (int v = 0; v < NV * P; v++) columns[v] = Int8::weight(codes + v * STEP);
            UNROLL for (int m = 0; m < MR; m++) {
                const auto token = Int8::token(x.codes + m * x.stride + k);
                UNROLL for (int v = 0; v < NV * P; v++)
                    sums[m][v] = Int8::add(sums[m][v], token, columns[v]);
            }
        }
        UNROLL for (int m = 0; m < MR; m++)
            UNROLL for (int v = 0; v < NV; v++) {
                const int64_t n = at + v * W;
                const vi total = Int8::total(&sums[m][v * P], panel.corrections + n);
                const vf scale = splat(x.scales[m]) * load(panel.scales + n);
                store(c + m * PANEL + n, __builtin_convertvector(total, vf) * scale);
            }
    }
}

// Runs `body` on tiles of nearly equal height, at most MAX_ROWS; what it is given has the height as
// its type's `value`.
template <int N>
struct Height {
    static constexpr int value = N;
};
template <class Body>
INLINE void in_tiles(int64_t rows, Body body) {
    const int64_t tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t t = 0; t < tiles; t++) {
        const Range part = part_of(rows, t, tiles);
        switch (part.end - part.begin) {
#define HEIGHT(MR) \
    case MR: body(part.begin, Height<MR>{}); break;
            HEIGHT(1) HEIGHT(2) HEIGHT(3) HEIGHT(4) HEIGHT(5) HEIGHT(6)
#ifdef TRIMARAN_WIDE
            HEIGHT(7) HEIGHT(8) HEIGHT(9) HEIGHT(10) HEIGHT(11) HEIGHT(12)
#endif
#undef HEIGHT
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Linear layers
// ---------------------------------------------------------------------------------------------

// in: x [rows, K] of `element`, packed codes, scales, corrections, bias [N] of `element` or null.
// out: y [rows, N]. n: N, K, row stride of x, row stride of y.
static void linear_int8(const Call& call, const Team& team) {
    const int64_t n_size = call.n[0], k_size = call.n[1], x_stride = call.n[2], y_stride = call.n[3];
    const int64_t k_padded = up(k_size, DEPTH), lda = k_padded + SHIFT;
    const Share share = share_of(rows_of(call, team), up(n_size, PANEL) / PANEL, team);
    const int64_t fit = BLOCK_BYTES / (lda * (int64_t)sizeof(Int8::Code)) / MAX_ROWS * MAX_ROWS;
    const int64_t block = min(max(fit, (int64_t)MAX_ROWS), BLOCK_ROWS);
    with_element(call.element, [&](auto* of_type) {
        using T = typename Bare<decltype(of_type)>::type;
        const T *x = (const T*)call.in[0], *bias = (const T*)call.in[4];
        T* y = (T*)call.out[0];
        float *c = (float*)team.scratch, *scales = c + BLOCK_ROWS * PANEL;
        Int8::Code* codes = (Int8::Code*)(scales + BLOCK_ROWS);
        for (int64_t first = share.rows.begin; first < share.rows.end; first += block) {
            const int64_t rows = min(block, share.rows.end - first);
            for (int64_t row = 0; row < rows; row++)
                scales[row] = quantize(x + (first + row) * x_stride, k_size, k_padded, Int8::OFFSET,
                                       codes + row * lda);
            for (int64_t panel = share.panels.begin; panel < share.panels.end; panel++) {
                const int64_t origin = panel * PANEL, columns = min(PANEL, n_size - origin);
                const Int8Panel weight{(const int8_t*)call.in[1] + origin * k_padded,
                                       (const float*)call.in[2] + origin,
                                       (const int32_t*)call.in[3] + origin};
                in_tiles(rows, [&](int64_t row, auto height) {
                    int8_tile<decltype(height)::value>({codes + row * lda, lda, scales + row},
                                                       weight, k_padded, c + row * PANEL);
                });
                for (int64_t row = 0; row < rows; row++)
                    write_row(y + (first + row) * y_stride + origin, c + row * PANEL, columns,
                              bias ? bias + origin : bias);
            }
        }
    });
}

}  // namespace trimaran::ISA
