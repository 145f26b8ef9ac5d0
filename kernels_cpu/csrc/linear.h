// Linear layers with packed weights.
//
// A weight [N, K] is packed in panels of PANEL outputs: [N / PANEL][K][PANEL] in f32 and f16,
// [N / PANEL][K / 2][PANEL][2] in bf16, edges filled with zeros. The layout is the same for every
// instruction set.
#pragma once
#include "tile.h"

namespace trimaran::ISA {

constexpr int64_t PANEL = 32;
constexpr int64_t BLOCK_BYTES = 1 << 20;  // most bytes of A at once
constexpr int64_t BLOCK_ROWS = 144;
constexpr int64_t CHUNK = 512;      // of K, that a panel is widened in
constexpr int64_t WIDEN_ROWS = 24;  // from so many rows on, widening a panel once pays
constexpr int64_t SHIFT = 16;  // elements that rows of A are shifted, so that they share no sets

template <class B>
INLINE int64_t panel_elements(int64_t k_size) {
    return up(k_size, PairsOf<B>::value) * PANEL;
}

// ---------------------------------------------------------------------------------------------
// Packing
// ---------------------------------------------------------------------------------------------

template <class B>
static void pack_panel(const B* weight, int64_t stride, int64_t filled, int64_t k_size, B* packed) {
    constexpr int P = PairsOf<B>::value;
    __builtin_memset((void*)packed, 0, panel_elements<B>(k_size) * sizeof(B));
    for (int64_t n = 0; n < filled; n++)
        for (int64_t k = 0; k < k_size; k++)
            packed[(k / P * PANEL + n) * P + k % P] = weight[n * stride + k];
}

// in: weight [N, K] of `element`, rows n[2] elements apart. out: packed. n: N, K, row stride.
static void pack_dense(const Call& call, const Team& team) {
    const int64_t n_size = call.n[0], k_size = call.n[1], stride = call.n[2];
    const Range panels = part_of(up(n_size, PANEL) / PANEL, team.thread, team.num_threads);
    with_element(call.element, [&](auto* of_type) {
        using B = typename Bare<decltype(of_type)>::type;
        const B* weight = (const B*)call.in[0];
        B* packed = (B*)call.out[0];
        for (int64_t panel = panels.begin; panel < panels.end; panel++) {
            const int64_t first = panel * PANEL;
            pack_panel(weight + first * stride, stride, min(PANEL, n_size - first), k_size,
                       packed + panel * panel_elements<B>(k_size));
        }
    });
}

// ---------------------------------------------------------------------------------------------
// Multiplying
// ---------------------------------------------------------------------------------------------

// A thread's share of a product [rows, N]: all rows of a few panels; where there are more threads
// than panels, several threads share panels and divide the rows.
struct Share {
    Range rows, panels;
};
INLINE Share share_of(int64_t rows, int64_t num_panels, const Team& team) {
    const int64_t across = min(team.num_threads, num_panels);
    const int64_t down = team.num_threads / across;
    if (team.thread >= across * down) return {{0, 0}, {0, 0}};
    return {part_of(rows, team.thread / across, down, MAX_ROWS),
            part_of(num_panels, team.thread % across, across)};
}

// Rows of x as the factor A, zeros up to `k_padded`.
template <class X, class A>
INLINE void widen(const X* x, int64_t k_size, int64_t k_padded, A* a) {
    int64_t k = 0;
    for (; k + W <= k_size; k += W) store(a + k, load(x + k));
    if (k < k_size) store_part(a + k, load_part(x + k, k_size - k), k_size - k);
    for (k = k_size; k < k_padded; k++) a[k] = A{};
}

// Packed rows of a panel as floats, [K][PANEL].
INLINE void widen_rows(const bf16* packed, int64_t pairs, float* wide) {
    for (int64_t p = 0; p < pairs; p++, packed += 2 * PANEL, wide += 2 * PANEL)
        for (int64_t n = 0; n < PANEL; n += W) {
            const vu both = load_pairs(packed + 2 * n);
            store(wide + n, even(both));
            store(wide + PANEL + n, odd(both));
        }
}
template <class B>
INLINE void widen_rows(const B* packed, int64_t rows, float* wide) {
    for (int64_t i = 0; i < rows * PANEL; i += W) store(wide + i, load(packed + i));
}

// c [rows, PANEL] = a [rows, K] times a panel. With many rows the panel's 16-bit numbers are widened
// once, a chunk of K at a time, instead of in each tile; the sums are the same.
template <class A, class B>
INLINE void multiply_panel(const A* a, int64_t lda, int64_t rows, const B* panel, int64_t k_size,
                           float* c, float* wide) {
    constexpr int64_t P = PairsOf<B>::value;
    if (sizeof(B) == sizeof(float) || sizeof(A) < sizeof(float) || rows < WIDEN_ROWS)
        return product(a, lda, rows, panel, PANEL, PANEL, k_size, c, PANEL);
    for (int64_t k = 0; k < k_size; k += CHUNK) {
        const int64_t size = min(CHUNK, k_size - k);
        widen_rows(panel + k * PANEL, size / P, wide);
        product((const float*)a + k, lda, rows, (const float*)wide, PANEL, PANEL, size, c, PANEL, k > 0);
    }
}

// One row of a panel's results, and the columns of y they belong to.
template <class T>
static void write_row(T* y, const float* c, int64_t columns, const T* bias) {
    int64_t n = 0;
    for (; n + W <= columns; n += W) store(y + n, bias ? load(c + n) + load(bias + n) : load(c + n));
    if (const int64_t left = columns - n) {
        const vf value = load(c + n);
        store_part(y + n, bias ? value + load_part(bias + n, left) : value, left);
    }
}

// in: x [rows, K], packed weight, bias [N] or null, all of `element`. out: y [rows, N].
// n: N, K, row stride of x, row stride of y.
static void linear_dense(const Call& call, const Team& team) {
    const int64_t n_size = call.n[0], k_size = call.n[1], x_stride = call.n[2], y_stride = call.n[3];
    const Share share = share_of(rows_of(call, team), up(n_size, PANEL) / PANEL, team);
    with_element(call.element, [&](auto* of_type) {
        using B = typename Bare<decltype(of_type)>::type;
        using A = typename Factor<B>::type;
        const B *x = (const B*)call.in[0], *packed = (const B*)call.in[1];
        const B* bias = (const B*)call.in[2];
        B* y = (B*)call.out[0];
        float* c = (float*)team.scratch;
        float* wide = c + BLOCK_ROWS * PANEL;
        A* a = (A*)(wide + CHUNK * PANEL);
        const int64_t k_padded = up(k_size, PairsOf<B>::value), lda = k_padded + SHIFT;
        const int64_t fit = BLOCK_BYTES / (lda * (int64_t)sizeof(A)) / MAX_ROWS * MAX_ROWS;
        const int64_t block = min(max(fit, (int64_t)MAX_ROWS), BLOCK_ROWS);
        for (int64_t first = share.rows.begin; first < share.rows.end; first += block) {
            const int64_t rows = min(block, share.rows.end - first);
            for (int64_t row = 0; row < rows; row++)
                widen(x + (first + row) * x_stride, k_size, k_padded, a + row * lda);
            for (int64_t panel = share.panels.begin; panel < share.panels.end; panel++) {
                const int64_t origin = panel * PANEL, columns = min(PANEL, n_size - origin);
                multiply_panel(a, lda, rows, packed + origin * k_padded, k_padded, c, wide);
                for (int64_t row = 0; row < rows; row++)
                    write_row(y + (first + row) * y_stride + origin, c + row * PANEL, columns,
                              bias ? bias + origin : bias);
            }
        }
    });
}

}  // namespace trimaran::ISA
