// Dense linears in bfloat16 with many rows, by AMX tiles.
//
// Two tiles of rows times the two tiles of columns of a panel, their four sums kept in tiles while
// K goes by. So many rows of A are taken at once that they stay in the L2 cache, and a panel is
// walked through in chunks of K that stay in L1 while all those rows meet it; sums of a panel with
// several chunks wait in scratch memory. The last tile of rows overlaps the one before it, so that
// no row needs filling up; fewer rows than a tile has, and rows with an odd end of K, are staged.
#pragma once
#include "amx.h"
#include "tile.h"

namespace trimaran::ISA {

// To be measured on a processor with AMX: these follow from its caches (48 KiB and 2 MiB a core),
// not from experiment.
constexpr int64_t TILES_FROM = 5;                 // fewer rows go by dpbf16
constexpr int64_t TILE_CHUNK = 512;               // of K: 32 KiB of a panel
constexpr int64_t TILE_BLOCK_BYTES = 5ll << 18;   // of A

constexpr int64_t TILE_STEP = 32;                 // of K, that one product of tiles takes
constexpr int64_t STEP_ELEMENTS = TILE_STEP * PANEL;
constexpr int64_t PANEL_STRIDE = PANEL * 4;       // bytes of a row of pairs, and of a row of sums
constexpr int64_t TILE_SUMS = TILE_ROWS * PANEL;  // of one tile of rows

template <int C, int A, int B>
INLINE void tile_dot(const bf16*) { tile_dot_bf16<C, A, B>(); }
template <int C, int A, int B>
INLINE void tile_dot(const int8_t*) { tile_dot_s8<C, A, B>(); }

// c [TILES][16][PANEL] = (with `add`, +=) 16 rows at each of `a`, times `steps` steps of a panel:
// bf16 with float sums, int8 with integers. Meanwhile what follows `ahead` comes to the L2 cache,
// `lines` cache lines a step.
template <int TILES, class T, class Sum>
static void multiply_tiles(const T* const* a, int64_t lda, const T* b, int64_t steps, Sum* c, bool add,
                           const char* ahead, int64_t lines) {
    constexpr int64_t HALF = PANEL_STRIDE / 2, DEPTH = TILE_BYTES / sizeof(T);
    Sum* lower = c + TILE_SUMS;
    if (add) {
        tile_load<0>(c, PANEL_STRIDE), tile_load<1>((char*)c + HALF, PANEL_STRIDE);
        if (TILES == 2)
            tile_load<2>(lower, PANEL_STRIDE), tile_load<3>((char*)lower + HALF, PANEL_STRIDE);
    } else {
        tile_zero<0>(), tile_zero<1>();
        if (TILES == 2) tile_zero<2>(), tile_zero<3>();
    }
    for (int64_t step = 0; step < steps; step++, b += DEPTH * PANEL) {
        for (int64_t line = 0; line < lines; line++, ahead += 64) __builtin_prefetch(ahead, 0, 2);
        tile_load<6>(b, PANEL_STRIDE);
        tile_load<4>(a[0] + step * DEPTH, lda * sizeof(T));
        tile_dot<0, 4, 6>(b);
        tile_load<7>((const char*)b + HALF, PANEL_STRIDE);
        tile_dot<1, 4, 7>(b);
        if (TILES == 2) {
            tile_load<5>(a[1] + step * DEPTH, lda * sizeof(T));
            tile_dot<2, 5, 6>(b);
            tile_dot<3, 5, 7>(b);
        }
    }
    tile_store<0>(c, PANEL_STRIDE), tile_store<1>((char*)c + HALF, PANEL_STRIDE);
    if (TILES == 2)
        tile_store<2>(lower, PANEL_STRIDE), tile_store<3>((char*)lower + HALF, PANEL_STRIDE);
}

// Rows of A as tiles take them: at least 16, and K a multiple of a step.
struct TileRows {
    const bf16* a;
    int64_t lda, rows;

    int64_t tiles() const { return (rows + TILE_ROWS - 1) / TILE_ROWS; }
    int64_t first_of(int64_t tile) const { return min(tile * TILE_ROWS, rows - TILE_ROWS); }
};

// A thread's scratch memory. `sums`: of a panel with all rows of a block; `edge`: the odd end of a
// panel; `staged`: rows of A.
struct TileScratch {
    static constexpr int64_t SUMS = 64 * TILE_SUMS, STAGED_AT = SUMS * 4 + STEP_ELEMENTS * 2;
    float* sums;
    bf16 *edge, *staged;

    explicit TileScratch(const Team& team)
        : sums((float*)team.scratch), edge((bf16*)(sums + SUMS)),
          staged((bf16*)(team.scratch + STAGED_AT)) {}
};

INLINE bool needs_staging(int64_t rows, int64_t k_size) {
    return rows < TILE_ROWS || k_size % TILE_STEP;
}
// Two tiles at least, unless staged: then the last of several blocks has more than one tile's rows.
INLINE int64_t rows_of_block(int64_t k_size, bool staging) {
    const int64_t bytes = up(k_size, TILE_STEP) * 2;
    const int64_t room = (staging ? SCRATCH_BYTES - TileScratch::STAGED_AT : TILE_BLOCK_BYTES) / bytes;
    const int64_t least = (staging ? 1 : 2) * TILE_ROWS;
    return min(max(room / TILE_ROWS * TILE_ROWS, least), TileScratch::SUMS / PANEL);
}
INLINE bool fits_tiles(int64_t k_size) {
    const int64_t staged = TILE_ROWS * up(k_size, TILE_STEP) * 2;
    return k_size && staged <= SCRATCH_BYTES - TileScratch::STAGED_AT;
}
INLINE bool by_tiles(int64_t rows, int64_t k_size) { return rows >= TILES_FROM && fits_tiles(k_size); }
INLINE TileRows stage(const bf16* x, int64_t stride, int64_t rows, int64_t k_size, bf16* to) {
    const int64_t lda = up(k_size, TILE_STEP), filled = max(rows, TILE_ROWS);
    __builtin_memset((void*)to, 0, filled * lda * sizeof(bf16));
    for (int64_t row = 0; row < rows; row++)
        __builtin_memcpy((void*)(to + row * lda), x + row * stride, k_size * sizeof(bf16));
    return {to, lda, filled};
}

// The sums of all tiles of rows with a panel: `write(tile, sums [16][PANEL])` has them as soon as
// they are complete.
template <class Write>
INLINE void tiles_by_panel(const TileRows& rows, const bf16* panel, int64_t k_size,
                           const TileScratch& scratch, Write write) {
    const int64_t tiles = rows.tiles(), pairs = (tiles + 1) / 2;
    const int64_t lines = (TILE_CHUNK / TILE_STEP * 2 + pairs - 1) / pairs;
    const bool whole = k_size <= TILE_CHUNK;  // no sums wait: those of two tiles stay in L1
    const int64_t left = k_size % TILE_STEP;
    if (left) {
        __builtin_memset((void*)scratch.edge, 0, STEP_ELEMENTS * sizeof(bf16));
        __builtin_memcpy((void*)scratch.edge, panel + (k_size - left) * PANEL,
                         up(left, 2) * PANEL * sizeof(bf16));
    }
    for (int64_t k = 0; k < k_size; k += TILE_CHUNK) {
        const int64_t size = min(TILE_CHUNK, k_size - k), steps = size / TILE_STEP;
        const char* ahead = (const char*)(panel + (k + size) * PANEL);
        for (int64_t tile = 0; tile < tiles; tile += 2, ahead += lines * steps * 64) {
            const bool both = tile + 1 < tiles;
            const bf16* a[2] = {};
            for (int i = 0; i <= both; i++) a[i] = rows.a + rows.first_of(tile + i) * rows.lda + k;
            float* c = scratch.sums + (whole ? 0 : tile * TILE_SUMS);
            const auto multiply =
                both ? multiply_tiles<2, bf16, float> : multiply_tiles<1, bf16, float>;
            multiply(a, rows.lda, panel + k * PANEL, steps, c, k > 0, ahead, lines);
            if (k + size < k_size) continue;
            if (left) {
                for (int i = 0; i <= both; i++) a[i] += steps * TILE_STEP;
                multiply(a, rows.lda, scratch.edge, 1, c, true, ahead, 0);
            }
            for (int i = 0; i <= both; i++) write(tile + i, c + i * TILE_SUMS);
        }
    }
}

}  // namespace trimaran::ISA
