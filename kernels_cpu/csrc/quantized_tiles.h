// Linear layers with weights in 8 and 4 bits and many tokens, by AMX tiles.
//
// Tiles read the panels that vectors read: int8 where it lies; int4 is widened, less its zeros, a chunk
// of K at a time that all tokens of a block meet. Tokens are rounded row by row and kept in order.
// Products are summed as integers over a group of inputs (int8: over all), and sums become floats by
// the arithmetic of codes.h: the results are the same.
#pragma once
#include "codes.h"
#include "linear_tiles.h"

namespace trimaran::ISA {

// To be measured on a processor with AMX, as those of linear_tiles.h are.
constexpr int64_t INT8_TILES_FROM = 5;   // fewer tokens go by dpbusd
constexpr int64_t INT4_TILES_FROM = 13;  // widening costs as much as dpbusd for several tokens
constexpr int64_t CODE_CHUNK = 1024;     // of K: 32 KiB of a panel
constexpr int64_t CODE_ROWS = 256;       // of a block: each thread that meets it rounds it anew

INLINE int64_t tiles_from(const Int8Weight&) { return INT8_TILES_FROM; }
INLINE int64_t tiles_from(const Int4Weight&) { return INT4_TILES_FROM; }

// ---------------------------------------------------------------------------------------------
// Chunks of panels, and what becomes of sums
// ---------------------------------------------------------------------------------------------

// The codes of `size` inputs from `k` on, of the panel whose first output is `origin`.
INLINE const int8_t* chunk_of(const Int8Weight& weight, int64_t origin, int64_t k, int64_t, int8_t*) {
    return weight.codes + origin * weight.k_size + k * PANEL;
}
// The same from int4, in `wide`: inputs up to a whole tile are zeros.
static const int8_t* chunk_of(const Int4Weight& weight, int64_t origin, int64_t k, int64_t size,
                              int8_t* wide) {
    const int64_t groups = weight.k_size / weight.group;
    const uint8_t* zeros = weight.zeros + origin * groups + k / weight.group * PANEL;
    const uint8_t* packed = weight.codes + (origin * weight.k_size + k * PANEL) / 2;
    for (int64_t at = 0; at < PANEL; at += W) {
        const vu8 zero = (vu8)(load_integers(zeros + at) * 0x01010101);
        const uint8_t* from = packed + at * QUAD;
        int8_t* to = wide + at * QUAD;
        for (int64_t i = 0; i < size; i += 2 * QUAD, from += PANEL * QUAD, to += 2 * PANEL * QUAD) {
            fetch_ahead<1>(from);
            const vu8 low = low_halves(from) - zero, high = high_halves(from) - zero;
            __builtin_memcpy(to, &low, sizeof low);
            __builtin_memcpy(to + PANEL * QUAD, &high, sizeof high);
        }
    }
    __builtin_memset(wide + size * PANEL, 0, (up(size, DEPTH) - size) * PANEL);
    return wide;
}

// y [16][PANEL] of tokens with `scales`, from the sums of one group of inputs after the other.
static void fold(const Int8Weight& weight, const int32_t* sums, const float* scales, int64_t origin,
                 int64_t, float* y) {
    for (int64_t row = 0; row < TILE_ROWS; row++)
        for (int64_t n = 0; n < PANEL; n += W) {
            const vi total = *(const vi_any*)(sums + row * PANEL + n);
            const vf scale = splat(scales[row]) * load(weight.scales + origin + n);
            store(y + row * PANEL + n, __builtin_convertvector(total, vf) * scale);
        }
}
static void fold(const Int4Weight& weight, const int32_t* sums, const float* scales, int64_t origin,
                 int64_t group, float* y) {
    const int64_t groups = weight.k_size / weight.group;
    const float* of_group = weight.scales + origin * groups + group * PANEL;
    for (int64_t n = 0; n < PANEL; n += W) {
        const vf scale = load(of_group + n);
        for (int64_t row = 0; row < TILE_ROWS; row++) {
            float* at = y + row * PANEL + n;
            const vi total = *(const vi_any*)(sums + row * PANEL + n);
            vf value = fma(scale, __builtin_convertvector(total, vf), group ? load(at) : zero());
            if (group + 1 == groups) value *= splat(scales[row]);
            store(at, value);
        }
    }
}

// ---------------------------------------------------------------------------------------------
// Multiplying
// ---------------------------------------------------------------------------------------------

// A block of tokens as a thread multiplies them, like `Block` of quantized.h; tiles are configured
// while it lives. In its scratch memory: `sums` and `c`, of each tile of rows with a panel; `wide`, a
// chunk of a panel; `codes` [tiles * 16][lda], zeros where there is no token or no input.
template <class Weight>
struct TiledBlock {
    static constexpr int64_t SUMS = CODE_ROWS * PANEL, WIDE = CODE_CHUNK * PANEL;
    static constexpr int64_t CODES_AT = SUMS * 8 + WIDE + CODE_ROWS * 4;
    const Weight& weight;
    int64_t lda, most, tiles = 0;
    int32_t* sums;
    float *c, *scales;
    int8_t *wide, *codes;

    // A tile's depth more than K has: a group may end in the middle of one, and rows of a power of 2
    // would share sets of the cache.
    INLINE int64_t row_bytes(int64_t k_size) { return up(k_size, DEPTH) + DEPTH; }
    INLINE bool fits(const Weight& weight) {
        return weight.k_size && TILE_ROWS * row_bytes(weight.k_size) <= SCRATCH_BYTES - CODES_AT;
    }

    TiledBlock(const Weight& weight, const Team& team)
        : weight(weight), lda(row_bytes(weight.k_size)),
          most(min((SCRATCH_BYTES - CODES_AT) / lda / TILE_ROWS * TILE_ROWS, CODE_ROWS)),
          sums((int32_t*)team.scratch), c((float*)(sums + SUMS)), scales(c + SUMS),
          wide((int8_t*)(scales + CODE_ROWS)), codes(wide + WIDE) {
        tile_configure(team);
    }
    TiledBlock(const TiledBlock&) = delete;
    ~TiledBlock() { tile_release(); }
    int64_t grain() const { return TILE_ROWS; }

    template <class X>
    void read(const X* x, int64_t x_size, int64_t x_stride, int64_t rows) {
        tiles = up(rows, TILE_ROWS) / TILE_ROWS;
        for (int64_t row = 0; row < rows; row++)
            scales[row] = quantize(x + row * x_stride, x_size, lda, 0, codes + row * lda);
        __builtin_memset(codes + rows * lda, 0, (tiles * TILE_ROWS - rows) * lda);
    }

    // c [rows, PANEL] = tokens times the panel whose first output is `origin`.
    void multiply(int64_t, int64_t origin) {
        for (int64_t k = 0, size; k < weight.k_size; k += size) {
            size = min(CODE_CHUNK, weight.group - k % weight.group);
            meet_chunk(origin, k, size, chunk_of(weight, origin, k, size, wide));
        }
    }

   private:
    // Adds the products with inputs k … k + size; where these end a group, its sums are folded into
    // c. Sums of a group of several chunks wait, those of another one stay in the L1 cache.
    void meet_chunk(int64_t origin, int64_t k, int64_t size, const int8_t* chunk) {
        const int64_t done = k % weight.group, steps = up(size, DEPTH) / DEPTH;
        const int64_t pairs = (tiles + 1) / 2;
        const int64_t lines = Weight::GROUPED ? 0 : (DEPTH * PANEL / 64 + pairs - 1) / pairs;
        const char* ahead = (const char*)chunk + size * PANEL;
        for (int64_t tile = 0; tile < tiles; tile += 2, ahead += lines * steps * 64) {
            const bool both = tile + 1 < tiles;
            const int8_t* first = codes + tile * TILE_ROWS * lda + k;
            const int8_t* a[] = {first, first + TILE_ROWS * lda};
            int32_t* here = sums + (weight.group <= CODE_CHUNK ? 0 : tile * TILE_SUMS);
            const auto multiply =
                both ? multiply_tiles<2, int8_t, int32_t> : multiply_tiles<1, int8_t, int32_t>;
            multiply(a, lda, chunk, steps, here, done > 0, ahead, lines);
            if (done + size < weight.group) continue;
            for (int64_t i = 0; i <= both; i++)
                fold(weight, here + i * TILE_SUMS, scales + (tile + i) * TILE_ROWS, origin,
                     k / weight.group, c + (tile + i) * TILE_SUMS);
        }
    }
};

template <class Weight>
INLINE bool by_tiles(const Weight& weight, int64_t rows) {
    return rows >= tiles_from(weight) && TiledBlock<Weight>::fits(weight);
}

}  // namespace trimaran::ISA
