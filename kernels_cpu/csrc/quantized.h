// Linear layers with weights in 8 and 4 bits, multiplied as integers.
#pragma once
#include "codes.h"
#include "linear.h"
#ifdef TRIMARAN_AMX
#include "quantized_tiles.h"
#endif

namespace trimaran::ISA {

// Runs `body` on tiles of nearly equal height, at most MAX_ROWS; what it is given has the height
// as its type's `value`.
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

// Blocks of tokens as a thread multiplies them.
template <class Weight>
struct Block {
    using Code = typename Weight::Code;
    const Weight& weight;
    int64_t k_size, groups, most;
    float *c, *scales;
    int32_t* sums;
    Code *codes, *one;  // of all tokens, tile by tile; of one, in order

    Block(const Weight& weight, const Team& team)
        : weight(weight), k_size(weight.k_size), groups(k_size / weight.group) {
        const int64_t bytes = k_size * sizeof(Code) + groups * 4;
        most = min(max(BLOCK_BYTES / bytes / MAX_ROWS, 1) * MAX_ROWS, BLOCK_ROWS);
        c = (float*)team.scratch;
        scales = c + most * PANEL;
        sums = (int32_t*)(scales + most);
        codes = (Code*)(sums + most * groups);
        one = codes + most * k_size;
    }
    int64_t grain() const { return min(MAX_ROWS, most); }

    template <class X>
    void read(const X* x, int64_t x_size, int64_t x_stride, int64_t rows) {
        in_tiles(rows, [&](int64_t first, auto height) {
            constexpr int MR = decltype(height)::value;
            for (int m = 0; m < MR; m++) {
                const int64_t row = first + m;
                scales[row] = quantize(x + row * x_stride, x_size, k_size, Weight::OFFSET, one);
                Code* place = codes + first * k_size + m * QUAD;
                for (int64_t k = 0; k < k_size; k += QUAD)
                    __builtin_memcpy(place + k * MR, one + k, QUAD * sizeof(Code));
                if constexpr (Weight::GROUPED)
                    for (int64_t g = 0; g < groups; g++)
                        sums[row * groups + g] = sum_of(one + g * weight.group, weight.group);
            }
        });
    }

    // c [rows, PANEL] = tokens times the panel whose first output is `origin`.
    void multiply(int64_t rows, int64_t origin) {
        in_tiles(rows, [&](int64_t row, auto height) {
            const Tokens<Code> x{codes + row * k_size, scales + row, sums + row * groups};
            weight.template multiply<decltype(height)::value>(x, origin, c + row * PANEL);
        });
    }
};

// All tokens by all panels; `block`: how. n of both linear layers: N, K, row stride of x, row stride
// of y.
template <class T, class Block>
static void meet_panels(const Call& call, const Team& team, Block& block, const T* bias) {
    const int64_t n_size = call.n[0], k_size = call.n[1], x_stride = call.n[2], y_stride = call.n[3];
    for_blocks(
        team, rows_of(call, team), block.most, block.grain(), up(n_size, PANEL) / PANEL,
        [&](int64_t first, int64_t rows) {
            block.read((const T*)call.in[0] + first * x_stride, k_size, x_stride, rows);
        },
        [&](int64_t first, int64_t rows, int64_t panel) {
            const int64_t origin = panel * PANEL, columns = min(PANEL, n_size - origin);
            block.multiply(rows, origin);
            T* y = (T*)call.out[0] + first * y_stride + origin;
            for (int64_t row = 0; row < rows; row++)
                write_row(y + row * y_stride, block.c + row * PANEL, columns,
                          bias ? bias + origin : bias);
        });
}

template <class T, class Weight>
static void multiply_by_codes(const Call& call, const Team& team, const Weight& weight, const T* bias) {
#ifdef TRIMARAN_AMX
    if (by_tiles(weight, rows_of(call, team))) {
        TiledBlock<Weight> block(weight, team);
        return meet_panels(call, team, block, bias);
    }
#endif
    Block<Weight> block(weight, team);
    meet_panels(call, team, block, bias);
}

// in: x [rows, K] of `element`, packed codes, scales, corrections, bias [N] of `element` or null.
// out: y [rows, N].
static void linear_int8(const Call& call, const Team& team) {
    const Int8Weight weight{(const int8_t*)call.in[1], (const float*)call.in[2],
                            (const int32_t*)call.in[3], up(call.n[1], DEPTH)};
    with_element(call.element, [&](auto* of_type) {
        using T = typename Bare<decltype(of_type)>::type;
        multiply_by_codes(call, team, weight, (const T*)call.in[4]);
    });
}

// in: x [rows, K] of `element`, packed codes, scales, zeros, bias [N] of `element` or null.
// out: y [rows, N]. n[4]: inputs in a group, a multiple of 32.
static void linear_int4(const Call& call, const Team& team) {
    const Int4Weight weight{(const uint8_t*)call.in[1], (const float*)call.in[2],
                            (const uint8_t*)call.in[3], call.n[1], call.n[4]};
    with_element(call.element, [&](auto* of_type) {
        using T = typename Bare<decltype(of_type)>::type;
        multiply_by_codes(call, team, weight, (const T*)call.in[4]);
    });
}

}  // namespace trimaran::ISA
