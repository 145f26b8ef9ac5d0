// Linear layers with packed weights.
//
// A weight [N, K] is packed in panels of PANEL outputs: [N / PANEL][K][PANEL] in f32 and f16,
// [N / PANEL][K / 2][PANEL][2] in bf16, edges filled with zeros. The layout is the same for every
// instruction set.
#pragma once
#include "elementwise.h"
#include "tile.h"
#ifdef TRIMARAN_AMX
#include "linear_tiles.h"
#endif

namespace trimaran::ISA {

constexpr int64_t BLOCK_BYTES = 1 << 20;  // most bytes of A at once
constexpr int64_t BLOCK_ROWS = 144;
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

// Calls body(first, filled) for each panel of a weight to be packed: its first output, and how many
// it has.
template <class Body>
INLINE void for_panels(int64_t n_size, const Team& team, Body body) {
    for (Range panels; team.take(up(n_size, PANEL) / PANEL, panels);)
        for (int64_t first = panels.begin * PANEL; first < panels.end * PANEL; first += PANEL)
            body(first, min(PANEL, n_size - first));
}

// in: weight [N, K] of `element`, rows n[2] elements apart. out: packed. n: N, K, row stride.
static void pack_dense(const Call& call, const Team& team) {
    const int64_t n_size = call.n[0], k_size = call.n[1], stride = call.n[2];
    with_element(call.element, [&](auto* of_type) {
        using B = typename Bare<decltype(of_type)>::type;
        const B* weight = (const B*)call.in[0];
        B* packed = (B*)call.out[0];
        for_panels(n_size, team, [&](int64_t first, int64_t filled) {
            pack_panel(weight + first * stride, stride, filled, k_size,
                       packed + first / PANEL * panel_elements<B>(k_size));
        });
    });
}

// As take_rows, from a packed weight [N, K]. n: K, N, bytes of an id, strides of ids and out.
static void take_packed_rows(const Call& call, const Team& team) {
    const int64_t k_size = call.n[0];
    with_element(call.element, [&](auto* of_type) {
        using B = typename Bare<decltype(of_type)>::type;
        constexpr int P = PairsOf<B>::value;
        const B* packed = (const B*)call.in[1];
        for_ids<B>(call, team, call.n[4], [&](B* to, int64_t id, int64_t first, int64_t size) {
            const B* row = packed + id / PANEL * panel_elements<B>(k_size) + id % PANEL * P;
            for (int64_t i = 0; i < size; i++) {
                const int64_t k = first + i;
                to[i] = row[k / P * PANEL * P + k % P];
            }
        });
    });
}

// ---------------------------------------------------------------------------------------------
// Multiplying
// ---------------------------------------------------------------------------------------------

// Rows of x as the factor A, zeros up to `k_padded`.
template <class X, class A>
INLINE void widen(const X* x, int64_t k_size, int64_t k_padded, A* a) {
    int64_t k = 0;
    for (; k + W <= k_size; k += W) store(a + k, load(x + k));
    if (k < k_size) store_part(a + k, load_part(x + k, k_size - k), k_size - k);
    for (k = k_size; k < k_padded; k++) a[k] = A{};
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

// A product and where it lies.
template <class B>
struct Dense {
    const B *x, *packed, *bias;
    B* y;
    int64_t n_size, k_size, x_stride, y_stride;

    explicit Dense(const Call& call)
        : x((const B*)call.in[0]), packed((const B*)call.in[1]), bias((const B*)call.in[2]),
          y((B*)call.out[0]), n_size(call.n[0]), k_size(call.n[1]), x_stride(call.n[2]),
          y_stride(call.n[3]) {}

    int64_t panels() const { return up(n_size, PANEL) / PANEL; }

    // `sums`: of a row with a panel.
    void write(int64_t row, int64_t panel, const float* sums) const {
        const int64_t origin = panel * PANEL;
        write_row(y + row * y_stride + origin, sums, min(PANEL, n_size - origin),
                  bias ? bias + origin : bias);
    }
};

// The products of rows with panels, as threads take them: a thread calls prepare(first, rows) for a
// block of at most `most` rows before it calls meet(first, rows, panel) for some panels. Blocks
// begin at multiples of `grain`, of which `most` is one.
template <class Prepare, class Meet>
INLINE void for_blocks(const Team& team, int64_t num_rows, int64_t most, int64_t grain,
                       int64_t num_panels, Prepare prepare, Meet meet) {
    const int64_t blocks = (num_rows + most - 1) / most;
    int64_t ready = -1;
    for (Range part; team.take(blocks * num_panels, part);)
        for (int64_t i = part.begin; i < part.end; i++) {
            const int64_t block = i / num_panels;
            const Range rows = part_of(num_rows, block, blocks, grain);
            if (block != ready) prepare(rows.begin, rows.end - rows.begin);
            ready = block;
            meet(rows.begin, rows.end - rows.begin, i % num_panels);
        }
}

// Rows of A at once, of `row_bytes` each; `room`: bytes of scratch memory that are left for them.
INLINE int64_t rows_at_once(int64_t row_bytes, int64_t room) {
    const int64_t rows = min(BLOCK_BYTES / row_bytes / MAX_ROWS * MAX_ROWS, BLOCK_ROWS);
    return rows ? rows : max(1, min(MAX_ROWS, room / row_bytes));
}

// A block of rows of x, read once and then multiplied by panels: `emit(row, sums)` is given each of
// its rows, counted from the block's first, with the row's PANEL sums. By vectors.
template <class B>
struct VectorRows {
    using A = typename Factor<B>::type;
    const B* packed;
    int64_t k_size, k_padded, lda, most, rows = 0;
    float* c;
    A* a;

    VectorRows(const B* packed, int64_t k_size, uint8_t* scratch)
        : packed(packed), k_size(k_size), k_padded(up(k_size, PairsOf<B>::value)),
          lda(k_padded + SHIFT), c((float*)scratch), a((A*)(c + BLOCK_ROWS * PANEL)) {
        most = rows_at_once(lda * sizeof(A), SCRATCH_BYTES - ((char*)a - (char*)c));
    }
    int64_t grain() const { return min(MAX_ROWS, most); }

    void read(const B* x, int64_t stride, int64_t count) {
        rows = count;
        for (int64_t row = 0; row < rows; row++)
            widen(x + row * stride, k_size, k_padded, a + row * lda);
    }
    template <class Emit>
    void multiply(int64_t panel, Emit emit) {
        const B* b = packed + panel * panel_elements<B>(k_size);
        product(a, lda, rows, b, PANEL, PANEL, k_size, c, PANEL);
        for (int64_t row = 0; row < rows; row++) emit(row, c + row * PANEL);
    }
};

#ifdef TRIMARAN_AMX
// The same by tiles, which are configured while it lives.
struct TiledRows {
    const bf16* packed;
    int64_t k_size, rows = 0, most = 0;
    TileScratch scratch;
    bool staging = false;
    TileRows block{};

    TiledRows(const bf16* packed, int64_t k_size, const Team& team)
        : packed(packed), k_size(k_size), scratch(team) {
        tile_configure(team);
    }
    TiledRows(const TiledRows&) = delete;
    ~TiledRows() { tile_release(); }
    int64_t grain() const { return TILE_ROWS; }

    // How many rows all blocks will have; comes before the first is read.
    void expect(int64_t num_rows) {
        staging = needs_staging(num_rows, k_size);
        most = rows_of_block(k_size, staging);
    }

    void read(const bf16* x, int64_t stride, int64_t count) {
        rows = count;
        block = staging ? stage(x, stride, rows, k_size, scratch.staged) : TileRows{x, stride, rows};
    }
    template <class Emit>
    void multiply(int64_t panel, Emit emit) {
        const bf16* at = packed + panel * panel_elements<bf16>(k_size);
        tiles_by_panel(block, at, k_size, scratch, [&](int64_t tile, const float* c) {
            const int64_t origin = block.first_of(tile), end = min(TILE_ROWS, rows - origin);
            for (int64_t row = tile * TILE_ROWS - origin; row < end; row++)
                emit(origin + row, c + row * PANEL);
        });
    }
};
#endif

// All rows by all panels; `block`: how.
template <class B, class Block>
static void multiply_dense(const Dense<B>& dense, const Team& team, int64_t num_rows, Block& block) {
    for_blocks(
        team, num_rows, block.most, block.grain(), dense.panels(),
        [&](int64_t first, int64_t rows) {
            block.read(dense.x + first * dense.x_stride, dense.x_stride, rows);
        },
        [&](int64_t first, int64_t, int64_t panel) {
            block.multiply(panel, [&](int64_t row, const float* sums) {
                dense.write(first + row, panel, sums);
            });
        });
}

// in: x [rows, K], packed weight, bias [N] or null, all of `element`. out: y [rows, N].
// n: N, K, row stride of x, row stride of y.
static void linear_dense(const Call& call, const Team& team) {
    const int64_t num_rows = rows_of(call, team);
    with_element(call.element, [&](auto* of_type) {
        using B = typename Bare<decltype(of_type)>::type;
        const Dense<B> dense(call);
#ifdef TRIMARAN_AMX
        if constexpr (PairsOf<B>::value == 2)
            if (by_tiles(num_rows, dense.k_size)) {
                TiledRows block(dense.packed, dense.k_size, team);
                block.expect(num_rows);
                return multiply_dense(dense, team, num_rows, block);
            }
#endif
        VectorRows<B> block(dense.packed, dense.k_size, team.scratch);
        multiply_dense(dense, team, num_rows, block);
    });
}

}  // namespace trimaran::ISA
