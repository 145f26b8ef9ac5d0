// Attention over the paged cache (its layout: kv_cache.h), prefill and decode alike.
//
// A tile is some consecutive queries of one sequence times the heads that share one KV head: the
// rows of A. Softmax is computed online (Milakov and Gimelshein 2018, algorithm 3) over chunks of
// keys, and begins anew at each split; splits are merged in their order, whether one thread went
// through all of them or several did. The borders of chunks and splits are positions in the
// sequence and nothing else: a row's result depends on its query and its keys alone. (Of AMX tiles,
// which sum in another order than dpbf16, also on whether its tile has 16 rows.)
#pragma once
#include "kv_cache.h"
#include "math.h"
#ifdef TRIMARAN_AMX
#include "attention_tiles.h"
#endif

namespace trimaran::ISA {

constexpr int64_t KEYS = 128;       // in a chunk
constexpr int64_t SPLIT = 512;      // keys; the same in platforms/cpu_attention.py
constexpr int64_t TILE_MAX = 256;   // rows of a tile, likewise
constexpr int64_t GAP = 16;         // elements between rows of A, so that they share no sets
constexpr int64_t LD_SCORES = KEYS + GAP;
constexpr float NEVER = -__builtin_inff();

// A plan as cpu_attention.py writes it: this header, the tiles, the merges.
struct PlanHeader {
    int64_t num_tiles, num_merges;
};
struct Tile {
    int64_t token, queries;  // of the batch
    int64_t position;        // of the first query in its sequence
    int64_t begin, end;      // the keys to go through
    const int32_t* blocks;   // of the sequence
    float* partial;          // where the states of this split go, head by head; null: it is whole
};
struct Merge {
    int64_t token, queries, splits;
    float* partial;  // of the first split
};

struct Layer {
    Paging paging;
    int64_t group;   // heads that share a KV head
    int64_t window;  // keys that a query sees; 0: all
    bool causal;
    float scale, softcap;
    const void* cache;
    const float* slopes;  // of ALiBi, one a head; null: none
};

// Where online softmax stands: for each row the weighted sum of values [D], the largest score and
// the sum of the weights.
struct State {
    float *sum, *largest, *weight;
    int64_t rows, dim;
};
// In memory the rows are a multiple of 16, as tiles write them.
INLINE int64_t state_floats(int64_t rows, int64_t dim) { return up(rows, 16) * (dim + 2); }
INLINE State state_at(float* memory, int64_t rows, int64_t dim) {
    const int64_t kept = up(rows, 16);
    return {memory, memory + kept * dim, memory + kept * (dim + 1), rows, dim};
}
INLINE void clear(const State& state) {
    __builtin_memset(state.sum, 0, state.rows * state.dim * sizeof(float));
    for (int64_t row = 0; row < state.rows; row++) state.largest[row] = NEVER, state.weight[row] = 0;
}

// By what weights are multiplied when the largest score rises from `before` to `now`.
INLINE float factor(float before, float now) {
    return before == now ? 1 : vexp(splat(before - now))[0];
}

// One function, never inlined: each caller's sums are rounded alike.
__attribute__((noinline)) static void merge(const State& into, const State& from) {
    for (int64_t row = 0; row < into.rows; row++) {
        const float top = max(into.largest[row], from.largest[row]);
        const float a = factor(into.largest[row], top), b = factor(from.largest[row], top);
        into.largest[row] = top;
        into.weight[row] = fma(from.weight[row], b, into.weight[row] * a);
        float* sum = into.sum + row * into.dim;
        const float* other = from.sum + row * into.dim;
        for (int64_t d = 0; d < into.dim; d += W)
            store(sum + d, fma(load(other + d), splat(b), load(sum + d) * a));
    }
}

// ---------------------------------------------------------------------------------------------
// One chunk of keys
// ---------------------------------------------------------------------------------------------

// What is multiplied with the cache: bf16 where the processor does that and the queries are bf16.
template <class X, class C>
struct FactorOf {
    using type = float;
};
template <class C>
struct FactorOf<bf16, C> {
    using type = typename Factor<C>::type;
};

// A thread's memory for one tile.
template <class A>
struct Room {
    A* query;       // [rows][D + GAP]
    float* scores;  // [rows][LD_SCORES]
    A* weights;     // of the values, likewise; in the place of the scores where A is float
    float *key_scale, *value_scale;  // [KEYS]
    bf16* filled;   // [KEYS][D]: values of AMX steps that are not as they lie
    float *total, *part;  // states
};
template <class A>
INLINE Room<A> room_in(uint8_t* scratch, int64_t dim) {
    Room<A> room;
    room.scores = (float*)scratch;
    room.key_scale = room.scores + TILE_MAX * LD_SCORES;
    room.value_scale = room.key_scale + KEYS;
    room.filled = (bf16*)(room.value_scale + KEYS);
    room.total = (float*)(room.filled + KEYS * dim);
    room.part = room.total + state_floats(TILE_MAX, dim);
    room.query = (A*)(room.part + state_floats(TILE_MAX, dim));
    room.weights = sizeof(A) == sizeof(float) ? (A*)room.scores : room.query + TILE_MAX * (dim + GAP);
    return room;
}

template <class A>
struct Work {
    const Layer& layer;
    const Tile& tile;
    int64_t head;  // the KV head
    const Room<A>& room;
};

// Are the products of so many rows by AMX tiles?
template <class A>
INLINE bool tiled([[maybe_unused]] int64_t rows, [[maybe_unused]] int64_t dim) {
#ifdef TRIMARAN_AMX
    return sizeof(A) == sizeof(bf16) && rows >= TILE_ROWS && dim % TILE_K == 0;
#else
    return false;
#endif
}

// Keys [from, to) of a chunk, and the rows that see any of them; for tiles, in steps of 16 rows.
struct Chunk {
    int64_t from, to;
    Range rows;
    bool tiled;
};
template <class A>
INLINE Chunk chunk_of(const Layer& layer, const Tile& tile, int64_t from, int64_t to) {
    Range rows{0, tile.queries * layer.group};
    const bool by_tiles = tiled<A>(rows.end, layer.paging.dim);
    if (layer.causal) rows.begin = max(0, from - tile.position) * layer.group;
    if (layer.window)
        rows.end = min(rows.end, (to + layer.window - 1 - tile.position) * layer.group);
    if (by_tiles && rows.begin < rows.end)
        rows = {rows.begin / 16 * 16, min(tile.queries * layer.group, up(rows.end, 16))};
    return {from, to, rows, by_tiles};
}

// The keys that are read after a panel of values: of the chunk behind this one.
template <class C, class A>
INLINE const C* next_keys(const Work<A>& work, int64_t key) {
    const Paging& at = work.layer.paging;
    if (key + KEYS >= work.tile.end) return nullptr;
    return panels_of<C>(work.layer.cache, at, work.tile.blocks[(key + KEYS) / at.size], work.head).key;
}

// Calls body(panels, offset, count, column) for each block with keys of the chunk: `count` keys from
// `offset` on, which are columns of the scores.
template <class C, class A, class Body>
INLINE void for_blocks(const Work<A>& work, const Chunk& chunk, Body body) {
    const Paging& at = work.layer.paging;
    for (int64_t key = chunk.from; key < chunk.to;) {
        const int64_t offset = key % at.size, count = min(at.size - offset, chunk.to - key);
        const int64_t block = work.tile.blocks[key / at.size];
        body(panels_of<C>(work.layer.cache, at, block, work.head), offset, count, key - chunk.from);
        key += count;
    }
}

#ifdef TRIMARAN_AMX
// Queries times the keys of one block, `width` of them.
INLINE void score_by_tiles(const bf16* query, int64_t rows, const bf16* panel, const Paging& at,
                           int64_t width, float* scores) {
    TileSteps steps{{}, at.dim / TILE_K, at.size * 4};
    for (int64_t step = 0; step < steps.count; step++) steps.at[step] = panel + step * TILE_K * at.size;
    product_of_tiles(query, at.dim + GAP, up(rows, 16), steps, width, scores, LD_SCORES, false);
}

// Weights times values of a chunk, added to the sums. Steps that go over the border of a block, or
// the last token, are copied, filled up with zeros.
static void weigh_by_tiles(const Work<bf16>& work, const Chunk& chunk, float* sum) {
    const Paging& at = work.layer.paging;
    TileSteps steps{{}, up(chunk.to - chunk.from, TILE_K) / TILE_K, at.dim * 4};
    for_blocks<bf16>(work, chunk, [&](const Panels<bf16>& block, int64_t offset, int64_t count, int64_t column) {
        const bf16* panel = block.value + offset * at.dim;
        for (int64_t key = 0, size; key < count; key += size) {
            const int64_t step = (column + key) / TILE_K, within = (column + key) % TILE_K;
            size = min(TILE_K - within, count - key);
            if (size == TILE_K) {
                steps.at[step] = panel + key * at.dim;
                continue;
            }
            bf16* copy = work.room.filled + step * TILE_K * at.dim;
            steps.at[step] = copy;
            if (within == 0) __builtin_memset((void*)copy, 0, TILE_K * at.dim * sizeof(bf16));
            bf16* to = copy + within * at.dim;
            const bf16* from = panel + key * at.dim;
            __builtin_memcpy((void*)to, from, size / 2 * 2 * at.dim * sizeof(bf16));
            if (size % 2)
                for (int64_t d = 0; d < at.dim; d++)
                    to[(size - 1) * at.dim + 2 * d] = from[(size - 1) * at.dim + 2 * d];
        }
    });
    const int64_t rows = up(chunk.rows.end - chunk.rows.begin, 16);
    product_of_tiles(work.room.weights + chunk.rows.begin * LD_SCORES, LD_SCORES, rows, steps, at.dim,
                     sum, at.dim, true);
}
#endif

// Queries times keys. Columns that hold no token yet are computed too, in steps of 16.
template <class C, class A>
static void score(const Work<A>& work, const Chunk& chunk) {
    const Paging& at = work.layer.paging;
    const Room<A>& room = work.room;
    const int64_t lda = at.dim + GAP, rows = chunk.rows.end - chunk.rows.begin;
    const A* query = room.query + chunk.rows.begin * lda;
    float* scores = room.scores + chunk.rows.begin * LD_SCORES;
    for_blocks<C>(work, chunk, [&](const Panels<C>& block, int64_t offset, int64_t count, int64_t column) {
        const int64_t width = up(count, 16);
        const C* panel = block.key + offset * PairsOf<C>::value;
        if constexpr (QUANTIZED<C>) {
            __builtin_memcpy(room.key_scale + column, block.key_scale + offset, width * sizeof(float));
            __builtin_memcpy(room.value_scale + column, block.value_scale + offset, width * sizeof(float));
        }
#ifdef TRIMARAN_AMX
        if constexpr (sizeof(A) == sizeof(bf16))
            if (chunk.tiled) return score_by_tiles(query, rows, panel, at, width, scores + column);
#endif
        product(query, lda, rows, panel, at.size, width, at.dim, scores + column, LD_SCORES, false,
                block.value);
    });
}

INLINE vi lanes_from(int64_t first) {
    vi lanes;
    for (int i = 0; i < W; i++) lanes[i] = (int32_t)first + i;
    return lanes;
}

// What a row's scores are lowered by: a slope for each position between a column's key and the
// query, which stands at column `query`.
struct Alibi {
    float slope;
    int64_t query;
};
INLINE vf lowered(vf scores, const Alibi& alibi, int64_t column) {
    const vf distance = __builtin_convertvector(lanes_from(column - alibi.query), vf);
    return fma(splat(-alibi.slope), max(distance, -distance), scores);
}

// Scores of one row -> weights, the row's state moved on. `seen`: the columns that the row sees.
template <bool quantized, class A>
INLINE void soften_row(const Layer& layer, const Room<A>& room, int64_t row, int64_t width, Range seen,
                       const Alibi& alibi, const State& state) {
    float* scores = room.scores + row * LD_SCORES;
    vf top = splat(NEVER);
    for (int64_t c = 0; c < width; c += W) {
        vf x = load(scores + c) * layer.scale;
        if constexpr (quantized) x *= load(room.key_scale + c);
        if (layer.softcap != 0) x = layer.softcap * vtanh(x / layer.softcap);
        if (alibi.slope != 0) x = lowered(x, alibi, c);
        if (c < seen.begin || c + W > seen.end) {
            const vi column = lanes_from(c);
            const vi inside = (column >= (int32_t)seen.begin) & (column < (int32_t)seen.end);
            x = select(inside, x, splat(NEVER));
        }
        store(scores + c, x);
        top = max(top, x);
    }
    const float before = state.largest[row], now = max(before, largest(top));
    const float base = now == NEVER ? 0 : now;  // nothing seen so far: all weights are 0
    A* weights = room.weights + row * LD_SCORES;
    vf added = zero();
    for (int64_t c = 0; c < width; c += W) {
        vf weight = vexp(load(scores + c) - base);
        added += weight;
        if constexpr (quantized)
            weight = select(weight == 0.0f, zero(), weight * load(room.value_scale + c));
        store(weights + c, weight);
    }
    const float kept = factor(before, now);
    state.largest[row] = now;
    state.weight[row] = fma(state.weight[row], kept, sum(added));
    if (kept == 1) return;
    float* sums = state.sum + row * state.dim;
    for (int64_t d = 0; d < state.dim; d += W) store(sums + d, load(sums + d) * kept);
}

template <class C, class A>
static void soften(const Work<A>& work, const Chunk& chunk, const State& state) {
    const Layer& layer = work.layer;
    const int64_t width = up(chunk.to - chunk.from, 32);  // a step of tiles; weights of 0 at the end
    for (int64_t row = chunk.rows.begin; row < chunk.rows.end; row++) {
        const int64_t position = work.tile.position + row / layer.group;
        Range seen{0, chunk.to - chunk.from};
        if (layer.causal) seen.end = min(seen.end, position + 1 - chunk.from);
        if (layer.window) seen.begin = max(0, position + 1 - layer.window - chunk.from);
        Alibi alibi{0, position - chunk.from};
        if (layer.slopes) alibi.slope = layer.slopes[work.head * layer.group + row % layer.group];
        soften_row<QUANTIZED<C>>(layer, work.room, row, width, seen, alibi, state);
    }
}

// The last value of a panel whose other half of the pair is no token yet: that half may be NaN.
template <class A, class C>
static void weigh_half_pair(const A* weights, int64_t rows, const C* pairs, const State& into) {
    C half[2 * MAX_HEAD_DIM] = {};
    for (int64_t d = 0; d < into.dim; d++) half[2 * d] = pairs[2 * d];
    product(weights, LD_SCORES, rows, (const C*)half, into.dim, into.dim, 2, into.sum, into.dim, true);
}

// Weights times values, added to the sums. Of what holds no token yet, nothing is multiplied.
template <class C, class A>
static void weigh(const Work<A>& work, const Chunk& chunk, State state) {
    constexpr int64_t P = PairsOf<C>::value;
    const Paging& at = work.layer.paging;
    const Room<A>& room = work.room;
    const int64_t rows = chunk.rows.end - chunk.rows.begin;
    const A* weights = room.weights + chunk.rows.begin * LD_SCORES;
    state.sum += chunk.rows.begin * at.dim;
#ifdef TRIMARAN_AMX
    if constexpr (sizeof(A) == sizeof(bf16))
        if (chunk.tiled) return weigh_by_tiles(work, chunk, state.sum);
#endif
    for_blocks<C>(work, chunk, [&](const Panels<C>& block, int64_t offset, int64_t count, int64_t column) {
        const C* panel = block.value + offset * at.dim;
        const int64_t whole = count / P * P;
        product(weights + column, LD_SCORES, rows, panel, at.dim, at.dim, whole, state.sum, at.dim, true,
                next_keys<C>(work, chunk.from + column));
        if constexpr (P == 2)
            if (whole < count)
                weigh_half_pair(weights + column + whole, rows, panel + whole * at.dim, state);
    });
}

// ---------------------------------------------------------------------------------------------
// Tiles and merges
// ---------------------------------------------------------------------------------------------

// The rows of a tile's queries, in their order: query by query, head by head.
template <class Body>
INLINE void for_rows(const Layer& layer, int64_t token, int64_t queries, int64_t stride, int64_t head,
                     Body body) {
    for (int64_t query = 0; query < queries; query++)
        for (int64_t h = 0; h < layer.group; h++)
            body(query * layer.group + h,
                 (token + query) * stride + (head * layer.group + h) * layer.paging.dim);
}

template <class X>
INLINE void write_rows(X* out, const State& state, const Layer& layer, int64_t token, int64_t queries,
                       int64_t stride, int64_t head) {
    for_rows(layer, token, queries, stride, head, [&](int64_t row, int64_t at) {
        for (int64_t d = 0; d < state.dim; d += W)
            store(out + at + d, load(state.sum + row * state.dim + d) / state.weight[row]);
    });
}

// Goes through all the tile's keys; the result is in `total`.
template <class C, class A>
static void attend(const Work<A>& work, const State& total, const State& part) {
    const Tile& tile = work.tile;
    const State* state = &total;
    for (int64_t from = tile.begin / 16 * 16; from < tile.end; state = &part) {
        const int64_t border = min(tile.end, (from / SPLIT + 1) * SPLIT);
        clear(*state);
        for (int64_t to; from < border; from = to) {
            to = min(border, (from / KEYS + 1) * KEYS);
            const Chunk chunk = chunk_of<A>(work.layer, tile, from, to);
            if (chunk.rows.begin >= chunk.rows.end) continue;
            score<C>(work, chunk);
            soften<C>(work, chunk, *state);
            weigh<C>(work, chunk, *state);
        }
        if (state == &part) merge(total, part);
    }
}

template <class X, class C>
static void run_tiles(const Call& call, const Team& team, const Layer& layer, const PlanHeader& plan) {
    using A = typename FactorOf<X, C>::type;
    const int64_t dim = layer.paging.dim, kv_heads = layer.paging.kv_heads;
#ifdef TRIMARAN_AMX
    tile_configure(team);
#endif
    const Tile* tiles = (const Tile*)(&plan + 1);
    const Room<A> room = room_in<A>(team.scratch, dim);
    for (int64_t i; team.take_one(plan.num_tiles * kv_heads, i);) {
        const Tile& tile = tiles[i / kv_heads];
        const int64_t head = i % kv_heads, rows = tile.queries * layer.group;
        for_rows(layer, tile.token, tile.queries, call.n[6], head, [&](int64_t row, int64_t at) {
            for (int64_t d = 0; d < dim; d += W)
                store(room.query + row * (dim + GAP) + d, load((const X*)call.in[0] + at + d));
        });
        float* memory = tile.partial ? tile.partial + head * state_floats(rows, dim) : room.total;
        const State total = state_at(memory, rows, dim);
        attend<C, A>({layer, tile, head, room}, total, state_at(room.part, rows, dim));
        if (!tile.partial)
            write_rows((X*)call.out[0], total, layer, tile.token, tile.queries, call.n[7], head);
    }
#ifdef TRIMARAN_AMX
    tile_release();
#endif
}

template <class X>
static void run_merges(const Call& call, const Team& team, const Layer& layer, const PlanHeader& plan) {
    const int64_t dim = layer.paging.dim, kv_heads = layer.paging.kv_heads;
    const Merge* merges = (const Merge*)((const Tile*)(&plan + 1) + plan.num_tiles);
    for (int64_t i; team.take_one(plan.num_merges * kv_heads, i);) {
        const Merge& one = merges[i / kv_heads];
        const int64_t head = i % kv_heads, rows = one.queries * layer.group;
        const int64_t size = state_floats(rows, dim);
        const State total = state_at(one.partial + head * size, rows, dim);
        for (int64_t split = 1; split < one.splits; split++)
            merge(total, state_at(one.partial + (split * kv_heads + head) * size, rows, dim));
        write_rows((X*)call.out[0], total, layer, one.token, one.queries, call.n[7], head);
    }
}

// in: queries [rows, heads, D] of `element`, the cache, a plan (null: that of cache group n[9], from
// the run), the slopes of ALiBi [heads] in f32 (null: none). out: [rows, heads, D]; rows that no
// query of the plan has are left alone. n: kv_heads, D, block size, heads, window (0: none), causal,
// row stride of the queries, of out, the cache's element, cache group. f: scale, softcap (0: none).
static void attention(const Call& call, const Team& team) {
    const int64_t* n = call.n;
    const Layer layer{{n[0], n[1], n[2]}, n[3] / n[0], n[4], n[5] != 0, call.f[0], call.f[1], call.in[1],
                      (const float*)call.in[3]};
    const PlanHeader& plan = *(const PlanHeader*)(call.in[2] ? call.in[2] : team.run->plans[n[9]]);
    with_element(call.element, [&](auto* of_type) {
        using X = typename Bare<decltype(of_type)>::type;
        with_cache_element(n[8], [&](auto* of_cache) {
            run_tiles<X, typename Bare<decltype(of_cache)>::type>(call, team, layer, plan);
        });
        if (!plan.num_merges) return;
        team.barrier();
        run_merges<X>(call, team, layer, plan);
    });
}

}  // namespace trimaran::ISA
