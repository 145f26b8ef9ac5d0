// The product at the heart of linear layers and attention: a few rows of A times a panel of B.
//
// B is packed in rows of K: f32, f16 and s8 as [K][columns], bf16 in pairs, [K/2][columns][2] (the
// order that dpbf16 and AMX read; elsewhere a shift and a mask take it apart). A is f32, or bf16
// where the processor multiplies that. Each element of C is summed over k in rising order, one
// step after the other, however many rows and columns are computed at once: a row's result does
// not depend on the rows beside it, nor on the number of threads.
#pragma once
#include "vec.h"

namespace trimaran::ISA {

constexpr int64_t PANEL = 32;  // columns of a packed panel of weights

// Rows and vectors of columns that fit the registers: 16 with AVX2, 32 with AVX-512.
#ifdef TRIMARAN_WIDE
constexpr int MAX_ROWS = 12;
constexpr int vectors_for(int) { return 2; }
#else
constexpr int MAX_ROWS = 6;
constexpr int vectors_for(int rows) { return rows <= 2 ? 4 : 2; }
#endif

template <class B>
struct PairsOf {
    static constexpr int value = 1;
};
template <>
struct PairsOf<bf16> {
    static constexpr int value = 2;
};

// What A is converted to before it is multiplied with a B.
template <class B>
struct Factor {
    using type = float;
};
#ifdef TRIMARAN_BF16
template <>
struct Factor<bf16> {
    using type = bf16;
};
#endif

// What is read after B is fetched into the L2 cache meanwhile: `stride` bytes with each step of k.
struct Ahead {
    const char* at;
    int64_t stride;
};
constexpr int64_t LINE = 64;
INLINE void fetch(Ahead& ahead) {
    __builtin_prefetch(ahead.at, 0, 2);
    if (ahead.stride > LINE) __builtin_prefetch(ahead.at + LINE, 0, 2);
    ahead.at += ahead.stride;
}

// acc[m][v] += sum over k of a[m * lda + k] * b[k][v * W ...]; `columns`: of a row of B. K is even
// where B is in pairs.
template <class B, int MR, int NV>
INLINE void multiply(const float* a, int64_t lda, const B* b, int64_t columns, int64_t k_size,
                     vf (&acc)[MR][NV], Ahead ahead) {
    // The vectors of B first, then row by row: all of them, one factor and the sums fit the registers.
    vf row[NV];
    const auto add_row = [&](int64_t k) __attribute__((always_inline)) {
        UNROLL for (int m = 0; m < MR; m++) {
            const vf factor = splat(a[m * lda + k]);
            UNROLL for (int v = 0; v < NV; v++) {
                acc[m][v] = fma(factor, row[v], acc[m][v]);
                in_place(acc[m][v]);
            }
        }
    };
    for (int64_t k = 0; k < k_size; k += PairsOf<B>::value, b += PairsOf<B>::value * columns) {
        fetch(ahead);
        if constexpr (PairsOf<B>::value == 2) {
            UNROLL for (int v = 0; v < NV; v++) row[v] = even(load_pairs(b + 2 * v * W));
            add_row(k);
            UNROLL for (int v = 0; v < NV; v++) row[v] = odd(load_pairs(b + 2 * v * W));
            add_row(k + 1);
        } else {
            UNROLL for (int v = 0; v < NV; v++) row[v] = load(b + v * W);
            add_row(k);
        }
    }
}

#ifdef TRIMARAN_BF16
// dpbf16 adds the pair's products in one step: the order is that of the pairs.
template <int MR, int NV>
INLINE void multiply(const bf16* a, int64_t lda, const bf16* b, int64_t columns, int64_t k_size,
                     vf (&acc)[MR][NV], Ahead ahead) {
    for (int64_t k = 0; k < k_size; k += 2, b += 2 * columns) {
        fetch(ahead);
        UNROLL for (int m = 0; m < MR; m++) {
            uint32_t pair;
            __builtin_memcpy(&pair, a + m * lda + k, 4);
            UNROLL for (int v = 0; v < NV; v++)
                acc[m][v] = dot_pairs(acc[m][v], pair, load_pairs(b + 2 * v * W));
        }
    }
}
#endif

// Rows of a panel that all tiles go through before the next ones: 8 KiB of it, which the L1 cache
// keeps, or 32 KiB. Few tiles wait for memory, so what is fetched ahead for them comes soon; many pay
// more for going through twice.
template <class B>
constexpr int64_t rows_of_part(int64_t tiles) { return (tiles <= 2 ? 256 : 1024) / sizeof(B); }

// Shares out what is fetched ahead among the passes through a part of B.
struct Fetcher {
    const char* at;
    int64_t stride, size;  // of a step, of a pass

    Fetcher(const void* at, int64_t bytes, int64_t passes, int64_t steps)
        : at((const char*)at), stride((bytes + passes * steps - 1) / (passes * steps)), size(steps * stride) {}
    Ahead share() {
        const Ahead ahead{at, stride};
        at += size;
        return ahead;
    }
};

// c[m * ldc + column] = sum over k of a[m * lda + k] * b[k][column]; with `add`, the sum starts from
// what stands in c. `width`: columns of C, a multiple of W.
template <int MR, int NV, class A, class B>
INLINE void columns_at(const A* a, int64_t lda, const B* b, int64_t columns, int64_t k_size, float* c,
                       int64_t ldc, bool add, Ahead ahead) {
    vf acc[MR][NV] = {};
    if (add)
        UNROLL for (int m = 0; m < MR; m++)
            UNROLL for (int v = 0; v < NV; v++) acc[m][v] = load(c + m * ldc + v * W);
    multiply(a, lda, b, columns, k_size, acc, ahead);
    UNROLL for (int m = 0; m < MR; m++)
        UNROLL for (int v = 0; v < NV; v++) store(c + m * ldc + v * W, acc[m][v]);
}
template <int MR, class A, class B>
static void tile(const A* a, int64_t lda, const B* b, int64_t columns, int64_t width, int64_t k_size,
                 float* c, int64_t ldc, bool add, Fetcher& fetcher) {
    constexpr int NV = vectors_for(MR), P = PairsOf<B>::value;
    int64_t at = 0;
    for (; at + NV * W <= width; at += NV * W)
        columns_at<MR, NV>(a, lda, b + at * P, columns, k_size, c + at, ldc, add, fetcher.share());
    for (; at < width; at += W)
        columns_at<MR, 1>(a, lda, b + at * P, columns, k_size, c + at, ldc, add, fetcher.share());
}

// The same for any number of rows but none, in tiles of nearly equal height. `next`: what is read after B, and
// of the same size; null: what lies behind it.
template <class A, class B>
static void product(const A* a, int64_t lda, int64_t rows, const B* b, int64_t columns,
                    int64_t width, int64_t k_size, float* c, int64_t ldc, bool add = false,
                    const void* next = nullptr) {
    const int64_t tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
    const int64_t passes = tiles * ((width + vectors_for(rows) * W - 1) / (vectors_for(rows) * W));
    for (int64_t k = 0; k < k_size; k += rows_of_part<B>(tiles)) {
        const int64_t size = min(rows_of_part<B>(tiles), k_size - k);
        const B *part = b + k * columns, *after = part + size * columns;
        Fetcher fetcher(next && k + size == k_size ? next : after, (char*)after - (char*)part, passes,
                        (size + PairsOf<B>::value - 1) / PairsOf<B>::value);
        for (int64_t t = 0; t < tiles; t++) {
            const Range own = part_of(rows, t, tiles);
            const A* from = a + own.begin * lda + k;
            float* to = c + own.begin * ldc;
            switch (own.end - own.begin) {
#define HEIGHT(MR) \
    case MR: tile<MR>(from, lda, part, columns, width, size, to, ldc, add || k, fetcher); break;
                HEIGHT(1) HEIGHT(2) HEIGHT(3) HEIGHT(4) HEIGHT(5) HEIGHT(6)
#ifdef TRIMARAN_WIDE
                HEIGHT(7) HEIGHT(8) HEIGHT(9) HEIGHT(10) HEIGHT(11) HEIGHT(12)
#endif
#undef HEIGHT
            }
        }
    }
}

}  // namespace trimaran::ISA
