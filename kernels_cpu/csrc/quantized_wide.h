// Linear layers with weights in 4 bits and activations that are not rounded (W4A16): codes become
// floats as they are read, products are summed in fp32. The packed layout is that of linear_int4.
//
// A code at bit 4 * i of a number with the exponent of 2^(19 - 4 * i) adds code / 16 to that power:
// less the power and zero / 16 it is (code - zero) / 16, exactly. (No more than 1, so that a product
// overflows only where the result may.) Each group is summed over k in rising order, one step after
// the other, then the groups likewise: results are the same for every instruction set, number of
// threads and batch.
#pragma once
#include "quantized.h"

namespace trimaran::ISA {

constexpr int64_t CHUNK = 512;      // inputs of a group, that a panel is widened in
constexpr int64_t WIDEN_ROWS = 24;  // from so many rows on, widening a panel once pays
constexpr int PLACES = 4;  // codes in half a lane
constexpr float CODE_RANGE = 16;

constexpr uint32_t exponent_at(int place) { return (127u + 19 - 4 * place) << 23; }
constexpr float power_at(int place) { return (float)(1 << (19 - 4 * place)); }

// What W * NV columns have to take off in a group.
template <int NV>
struct Zeros {
    vf at[PLACES][NV];

    INLINE Zeros of(const uint8_t* zeros) {
        Zeros made;
        UNROLL for (int v = 0; v < NV; v++) {
            const vf zero = __builtin_convertvector(load_integers(zeros + v * W), vf) / CODE_RANGE;
            UNROLL for (int place = 0; place < PLACES; place++)
                made.at[place][v] = zero + power_at(place);
        }
        return made;
    }
};

// Calls body(k, weights) for two quads of inputs, k of 0..7, with what NV vectors of columns weigh
// them by: (code - zero) / CODE_RANGE.
template <int NV, class Body>
INLINE void for_inputs(const uint8_t* codes, const Zeros<NV>& zeros, Body body) {
    vu halves[2][NV];
    UNROLL for (int v = 0; v < NV; v++) {
        halves[0][v] = (vu)load_bytes(codes + v * W * QUAD);
        halves[1][v] = halves[0][v] >> 16;
    }
    UNROLL for (int k = 0; k < 2 * QUAD; k++) {
        const int place = k % 2 * 2 + k / QUAD;
        vf weights[NV];
        UNROLL for (int v = 0; v < NV; v++) {
            const vu code = halves[k % QUAD / 2][v] & (15u << 4 * place);
            weights[v] = (vf)(code | exponent_at(place)) - zeros.at[place][v];
        }
        body(k, weights);
    }
}

struct WideInt4 {
    const uint8_t* codes;
    const float* scales;   // [N / PANEL][groups][PANEL]
    const uint8_t* zeros;  // the same
    int64_t k_size, group;

    // c [MR, PANEL] += a times the panel whose first output is `origin`.
    template <int MR>
    void multiply(const float* a, int64_t lda, int64_t origin, float* c) const {
        constexpr int NV = vectors_for(MR);
        for (int64_t at = 0; at < PANEL; at += NV * W) {
            const uint8_t* column = codes + origin * k_size / 2 + at * QUAD;
            int64_t place = origin * (k_size / group) + at;
            for (int64_t first = 0; first < k_size; first += group, place += PANEL) {
                const Zeros<NV> zero = Zeros<NV>::of(zeros + place);
                vf dots[MR][NV] = {};
                for (int64_t k = first; k < first + group; k += 2 * QUAD, column += PANEL * QUAD) {
                    fetch_ahead<NV>(column);
                    for_inputs(column, zero, [&](int i, const vf (&weights)[NV]) __attribute__((always_inline)) {
                        UNROLL for (int m = 0; m < MR; m++) {
                            const vf factor = splat(a[m * lda + k + i]);
                            UNROLL for (int v = 0; v < NV; v++)
                                dots[m][v] = fma(factor, weights[v], dots[m][v]);
                        }
                    });
                }
                UNROLL for (int m = 0; m < MR; m++)
                    UNROLL for (int v = 0; v < NV; v++)
                        add_group(scales + place + v * W, dots[m][v], c + m * PANEL + at + v * W);
            }
        }
    }
    INLINE void add_group(const float* scale, vf dots, float* c) {
        store(c, fma(load(scale) * CODE_RANGE, dots, load(c)));
    }

    // The same for many rows: the panel is widened once, a chunk of K at a time, into `wide`.
    void multiply_many(const float* a, int64_t lda, int64_t rows, int64_t origin, float* c, float* dots,
                       float* wide) const {
        int64_t place = origin * (k_size / group);
        for (int64_t first = 0; first < k_size; first += group, place += PANEL) {
            for (int64_t k = 0; k < group; k += CHUNK) {
                const int64_t size = min(CHUNK, group - k);
                widen_codes(origin, first + k, size, place, wide);
                product(a + first + k, lda, rows, (const float*)wide, PANEL, PANEL, size, dots, PANEL, k > 0);
            }
            for (int64_t i = 0; i < rows * PANEL; i += W)
                add_group(scales + place + i % PANEL, load(dots + i), c + i);
        }
    }
    void widen_codes(int64_t origin, int64_t first, int64_t size, int64_t place, float* wide) const {
        constexpr int NV = PANEL / W;
        const Zeros<NV> zero = Zeros<NV>::of(zeros + place);
        const uint8_t* row = codes + origin * k_size / 2 + first / 2 * PANEL;
        for (int64_t k = 0; k < size; k += 2 * QUAD, row += PANEL * QUAD)
            for_inputs(row, zero, [&](int i, const vf (&weights)[NV]) __attribute__((always_inline)) {
                UNROLL for (int v = 0; v < NV; v++) store(wide + (k + i) * PANEL + v * W, weights[v]);
            });
    }
};

// A block of tokens as a thread multiplies them, like `Block` of quantized.h.
struct WideBlock {
    const WideInt4& weight;
    int64_t lda, most;
    float *c, *dots, *wide, *a;

    WideBlock(const WideInt4& weight, const Team& team)
        : weight(weight), lda(weight.k_size + SHIFT), c((float*)team.scratch),
          dots(c + BLOCK_ROWS * PANEL), wide(dots + BLOCK_ROWS * PANEL), a(wide + CHUNK * PANEL) {
        most = rows_at_once(lda * sizeof(float), SCRATCH_BYTES - (a - c) * (int64_t)sizeof(float));
    }
    int64_t grain() const { return min(MAX_ROWS, most); }

    template <class X>
    void read(const X* x, int64_t x_size, int64_t x_stride, int64_t rows) {
        for (int64_t row = 0; row < rows; row++) widen(x + row * x_stride, x_size, x_size, a + row * lda);
    }

    // c [rows, PANEL] = tokens times the panel whose first output is `origin`.
    void multiply(int64_t rows, int64_t origin) {
        __builtin_memset(c, 0, rows * PANEL * sizeof(float));
        if (rows >= WIDEN_ROWS) return weight.multiply_many(a, lda, rows, origin, c, dots, wide);
        in_tiles(rows, [&](int64_t row, auto height) {
            weight.multiply<decltype(height)::value>(a + row * lda, lda, origin, c + row * PANEL);
        });
    }
};

// in: x [rows, K] of `element`, codes as pack_int4 packs them, scales, zeros, bias [N] of `element`
// or null. out: y [rows, N]. n: N, K, row stride of x, row stride of y, inputs in a group, a multiple
// of 32.
static void linear_int4_wide(const Call& call, const Team& team) {
    const WideInt4 weight{(const uint8_t*)call.in[1], (const float*)call.in[2],
                          (const uint8_t*)call.in[3], call.n[1], call.n[4]};
    WideBlock block(weight, team);
    with_element(call.element, [&](auto* of_type) {
        using T = typename Bare<decltype(of_type)>::type;
        meet_panels(call, team, block, (const T*)call.in[4]);
    });
}

}  // namespace trimaran::ISA
