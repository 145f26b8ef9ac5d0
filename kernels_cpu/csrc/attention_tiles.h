// The products of attention in bfloat16 by AMX tiles: both panels of the cache are what tiles read.
#pragma once
#include "amx.h"

namespace trimaran::ISA {

constexpr int64_t TILE_K = 32;  // of K, that one product of tiles takes

// B by its steps of K: pairs of rows, `stride` bytes from one pair to the next.
struct TileSteps {
    const bf16* at[MAX_HEAD_DIM / TILE_K];
    int64_t count, stride;
};

// c [16 * R][16 * N] = (with `add`, +=) a times 16 * N columns of B.
template <int R, int N>
static void multiply_steps(const bf16* a, int64_t lda, const TileSteps& b, int64_t column, float* c,
                           int64_t ldc, bool add) {
    float *right = c + 16, *lower = c + TILE_ROWS * ldc, *last = lower + 16;
    const int64_t row = ldc * 4;
    if (add) {
        tile_load<0>(c, row);
        if (N == 2) tile_load<1>(right, row);
        if (R == 2) tile_load<2>(lower, row);
        if (R == 2 && N == 2) tile_load<3>(last, row);
    } else {
        tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
    }
    for (int64_t step = 0; step < b.count; step++, a += TILE_K) {
        tile_load<6>(b.at[step] + 2 * column, b.stride);
        tile_load<4>(a, lda * 2);
        tile_dot_bf16<0, 4, 6>();
        if (N == 2) {
            tile_load<7>(b.at[step] + 2 * column + 32, b.stride);
            tile_dot_bf16<1, 4, 7>();
        }
        if (R == 2) {
            tile_load<5>(a + TILE_ROWS * lda, lda * 2);
            tile_dot_bf16<2, 5, 6>();
            if (N == 2) tile_dot_bf16<3, 5, 7>();
        }
    }
    tile_store<0>(c, row);
    if (N == 2) tile_store<1>(right, row);
    if (R == 2) tile_store<2>(lower, row);
    if (R == 2 && N == 2) tile_store<3>(last, row);
}

// The same for `rows` and `width`, multiples of 16.
static void product_of_tiles(const bf16* a, int64_t lda, int64_t rows, const TileSteps& b,
                             int64_t width, float* c, int64_t ldc, bool add) {
    for (int64_t column = 0; column < width; column += 32)
        for (int64_t row = 0; row < rows; row += 2 * TILE_ROWS) {
            const bool two_rows = row + TILE_ROWS < rows, two_columns = column + 16 < width;
            const auto multiply = two_rows ? two_columns ? multiply_steps<2, 2> : multiply_steps<2, 1>
                                  : two_columns ? multiply_steps<1, 2> : multiply_steps<1, 1>;
            multiply(a + row * lda, lda, b, column, c + row * ldc + column, ldc, add);
        }
}

}  // namespace trimaran::ISA
