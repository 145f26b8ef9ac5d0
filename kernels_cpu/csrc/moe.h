// A mixture of experts: each token goes through the few gated MLPs that its router's scores choose,
// and the results are summed by those scores.
//
// Rows are sorted by expert, so that an expert's weights are read once for all of its tokens. The
// experts' weights are two packed ones (linear.h, codes.h), expert by expert: gate_up
// [experts * 2 * width, hidden], of each expert the gate's outputs before the others, and down
// [experts * hidden, width]. Experts may begin anywhere in a panel; what belongs to a neighbour is
// computed and dropped.
#pragma once
#include "elementwise.h"
#include "quantized_wide.h"

namespace trimaran::ISA {

// How the experts' weights are packed; `FORMATS` in platforms/cpu_moe.py.
enum class Packed : int64_t { dense, int8, int4, w4a16 };

template <class T>
struct Moe {
    const T *x, *scores;
    T* out;
    int64_t hidden, width, experts, top_k, x_stride, scores_stride, out_stride;
    bool renormalize;
    int64_t num_rows, chosen;
    // Of all choices, in the order of the tokens: which expert, its share, and where it was sorted to.
    int32_t *choices, *places;
    float* shares;
    int32_t* begins;  // [experts + 1]: an expert's first row of those that are sorted
    T* rows;          // [chosen, hidden], sorted: of x, later results
    T* inner;         // [chosen, width], sorted

    Moe(const Call& call, const Team& team)
        : x((const T*)call.in[0]), scores((const T*)call.in[1]), out((T*)call.out[0]),
          hidden(call.n[0]), width(call.n[1]), experts(call.n[2]), top_k(call.n[3]),
          x_stride(call.n[5]), scores_stride(call.n[6]), out_stride(call.n[7]),
          renormalize(call.n[4]), num_rows(rows_of(call, team)), chosen(num_rows * top_k) {
        char* at = (char*)call.out[1];
        const auto next = [&](int64_t bytes) {
            char* const here = at;
            at += up(bytes, 64);
            return (void*)here;
        };
        choices = (int32_t*)next(chosen * 4);
        places = (int32_t*)next(chosen * 4);
        shares = (float*)next(chosen * 4);
        begins = (int32_t*)next((experts + 1) * 4);
        rows = (T*)next(chosen * hidden * sizeof(T));
        inner = (T*)next(chosen * width * sizeof(T));
    }
    int64_t count(int64_t expert) const { return begins[expert + 1] - begins[expert]; }
};

// ---------------------------------------------------------------------------------------------
// Routing
// ---------------------------------------------------------------------------------------------

// The best scores in falling order, of equal ones the first.
INLINE void choose(const float* scores, int64_t size, int64_t top_k, int32_t* choices) {
    for (int64_t e = 0; e < size; e++) {
        int64_t at = min(e, top_k);
        if (at == top_k && !(scores[e] > scores[choices[top_k - 1]])) continue;
        at = min(at, top_k - 1);
        for (; at && scores[e] > scores[choices[at - 1]]; at--) choices[at] = choices[at - 1];
        choices[at] = e;
    }
}

// The experts of one token and their shares: the softmax of all scores, of the chosen ones.
template <class T>
static void route(const Moe<T>& moe, int64_t row, float* scores) {
    const int64_t size = moe.experts, padded = up(size, W);
    const T* from = moe.scores + row * moe.scores_stride;
    for (int64_t e = 0; e < padded; e++) scores[e] = e < size ? load_one(from + e) : -__builtin_inff();
    vf highest = load(scores), total = zero();
    for (int64_t e = W; e < padded; e += W) highest = max(load(scores + e), highest);
    const vf most = splat(largest(highest));
    for (int64_t e = 0; e < padded; e += W) total += vexp(load(scores + e) - most);

    int32_t* choices = moe.choices + row * moe.top_k;
    float* shares = moe.shares + row * moe.top_k;
    choose(scores, size, moe.top_k, choices);
    float whole = sum(total), of_chosen = 0;
    for (int64_t j = 0; j < moe.top_k; j++) {
        shares[j] = vexp(scores[choices[j]] - most[0]) / whole;
        of_chosen += shares[j];
    }
    for (int64_t j = 0; j < moe.top_k; j++)
        shares[j] = rounded<T>(splat(moe.renormalize ? shares[j] / of_chosen : shares[j]))[0];
}

// Where an expert's rows begin, and its rows of x, in the order of the tokens.
template <class T>
static void gather(const Moe<T>& moe, int32_t expert) {
    const vi own = expert - vi{};
    vi lower{};
    int64_t i = 0, begin = 0;
    for (; i + W <= moe.chosen; i += W) lower -= *(const vi_any*)(moe.choices + i) < own;
    for (int lane = 0; lane < W; lane++) begin += lower[lane];
    for (; i < moe.chosen; i++) begin += moe.choices[i] < expert;
    moe.begins[expert] = begin;
    if (expert == moe.experts - 1) moe.begins[moe.experts] = moe.chosen;
    for (i = 0; i < moe.chosen; i++) {
        if (i + W <= moe.chosen && !any(*(const vi_any*)(moe.choices + i) == own)) {
            i += W - 1;
            continue;
        }
        if (moe.choices[i] != expert) continue;
        __builtin_memcpy((void*)(moe.rows + begin * moe.hidden), moe.x + i / moe.top_k * moe.x_stride,
                         moe.hidden * sizeof(T));
        moe.places[i] = begin++;
    }
}

// ---------------------------------------------------------------------------------------------
// Multiplying
// ---------------------------------------------------------------------------------------------

// Blocks of an expert's rows by panels, as `VectorRows` has them; `count`: all rows of the expert.
template <class B>
struct DenseRows {
    VectorRows<B> vectors;

    DenseRows(const void* const* weight, int64_t k_size, const Team& team)
        : vectors((const B*)weight[0], k_size, team.scratch) {}
    int64_t most(int64_t) const { return vectors.most; }
    int64_t grain(int64_t) const { return vectors.grain(); }
    void read(const B* x, int64_t rows, int64_t) { vectors.read(x, vectors.k_size, rows); }
    template <class Emit>
    void multiply(int64_t panel, Emit emit) {
        vectors.multiply(panel, emit);
    }
};

#ifdef TRIMARAN_AMX
// Experts with few rows go by vectors, the others by tiles.
template <>
struct DenseRows<bf16> {
    VectorRows<bf16> vectors;
    TiledRows tiles;
    bool tiled = false;

    DenseRows(const void* const* weight, int64_t k_size, const Team& team)
        : vectors((const bf16*)weight[0], k_size, team.scratch), tiles(vectors.packed, k_size, team) {}
    bool are_tiled(int64_t count) const { return by_tiles(count, tiles.k_size); }
    int64_t most(int64_t count) const {
        if (!are_tiled(count)) return vectors.most;
        return rows_of_block(tiles.k_size, needs_staging(count, tiles.k_size));
    }
    int64_t grain(int64_t count) const { return are_tiled(count) ? tiles.grain() : vectors.grain(); }
    void read(const bf16* x, int64_t rows, int64_t count) {
        tiled = are_tiled(count);
        if (!tiled) return vectors.read(x, vectors.k_size, rows);
        tiles.expect(count);
        tiles.read(x, tiles.k_size, rows);
    }
    template <class Emit>
    void multiply(int64_t panel, Emit emit) {
        if (tiled) tiles.multiply(panel, emit);
        else vectors.multiply(panel, emit);
    }
};
#endif

// The same by codes: vectors and tiles give the same sums.
#ifdef TRIMARAN_AMX
template <class Weight>
using ManyBlock = TiledBlock<Weight>;
#else
template <class Weight>
using ManyBlock = Block<Weight>;
template <class Weight>
INLINE bool by_tiles(const Weight&, int64_t) {
    return false;
}
#endif
template <class Weight>
struct BlocksOf {
    using Few = Block<Weight>;
    using Many = ManyBlock<Weight>;
};
template <>
struct BlocksOf<WideInt4> {
    using Few = WideBlock;
    using Many = WideBlock;
};
INLINE bool by_tiles(const WideInt4&, int64_t) { return false; }

template <class Weight>
struct CodeRows {
    Weight weight;
    typename BlocksOf<Weight>::Few few;
    typename BlocksOf<Weight>::Many many;
    int64_t k_size, rows = 0;
    bool tiled = false;

    CodeRows(const Weight& codes, int64_t k_size, const Team& team)
        : weight(codes), few(weight, team), many(weight, team), k_size(k_size) {}
    CodeRows(const CodeRows&) = delete;
    int64_t most(int64_t count) const { return by_tiles(weight, count) ? many.most : few.most; }
    int64_t grain(int64_t count) const {
        return by_tiles(weight, count) ? many.grain() : few.grain();
    }
    template <class X>
    void read(const X* x, int64_t num_rows, int64_t count) {
        rows = num_rows;
        tiled = by_tiles(weight, count);
        if (tiled) many.read(x, k_size, k_size, rows);
        else few.read(x, k_size, k_size, rows);
    }
    template <class Emit>
    void multiply(int64_t panel, Emit emit) {
        if (tiled) many.multiply(rows, panel * PANEL);
        else few.multiply(rows, panel * PANEL);
        const float* c = tiled ? many.c : few.c;
        for (int64_t row = 0; row < rows; row++) emit(row, c + row * PANEL);
    }
};

// Runs `body` with what multiplies by a weight of the call. `group`: of int4.
template <class T, class Body>
static void with_weight(const Call& call, int index, int64_t k_size, int64_t group, const Team& team,
                        Body body) {
    const void* const* weight = call.in + index;
    const float* scales = (const float*)weight[1];
    switch ((Packed)call.n[8]) {
        case Packed::dense: {
            DenseRows<T> rows(weight, k_size, team);
            return body(rows);
        }
        case Packed::int8: {
            const Int8Weight codes{(const int8_t*)weight[0], scales, (const int32_t*)weight[2],
                                   up(k_size, DEPTH)};
            CodeRows<Int8Weight> rows(codes, k_size, team);
            return body(rows);
        }
        case Packed::int4: {
            const Int4Weight codes{(const uint8_t*)weight[0], scales, (const uint8_t*)weight[2], k_size,
                                   group};
            CodeRows<Int4Weight> rows(codes, k_size, team);
            return body(rows);
        }
        case Packed::w4a16: {
            const WideInt4 codes{(const uint8_t*)weight[0], scales, (const uint8_t*)weight[2], k_size, group};
            CodeRows<WideInt4> rows(codes, k_size, team);
            return body(rows);
        }
    }
}

// Rows of experts by panels, as threads take them. `outputs`: of an expert in the weight, of which
// the first `width` are met; its rows are those of `x`, [chosen, k_size]. meet(first, low, high): the
// block that was read, whose first row in `x` is `first`, and outputs of the weight in one panel.
template <class T, class Rows, class Meet>
static void for_experts(const Moe<T>& moe, const Team& team, Rows& rows, const T* x, int64_t k_size,
                        int64_t outputs, int64_t width, Meet meet) {
    const auto panels_of = [&](int64_t expert) {
        return (expert * outputs + width - 1) / PANEL - expert * outputs / PANEL + 1;
    };
    const auto blocks_of = [&](int64_t expert) {
        const int64_t count = moe.count(expert);
        return count ? (count + rows.most(count) - 1) / rows.most(count) : 0;
    };
    int64_t units = 0;
    for (int64_t e = 0; e < moe.experts; e++) units += blocks_of(e) * panels_of(e);
    int64_t expert = 0, passed = 0, ready = -1;  // `passed`: units of the experts before
    for (Range part; team.take(units, part);)
        for (int64_t unit = part.begin; unit < part.end; unit++) {
            int64_t panels = panels_of(expert), blocks = blocks_of(expert);
            for (; unit - passed >= panels * blocks; panels = panels_of(expert), blocks = blocks_of(expert)) {
                passed += panels * blocks;
                expert++;
            }
            const int64_t block = (unit - passed) / panels, count = moe.count(expert);
            const Range own = part_of(count, block, blocks, rows.grain(count));
            const int64_t first = moe.begins[expert] + own.begin;
            if (first != ready) rows.read(x + first * k_size, own.end - own.begin, count);
            ready = first;
            const int64_t begin = expert * outputs, panel = begin / PANEL + (unit - passed) % panels;
            meet(first, max(begin, panel * PANEL), min(begin + width, (panel + 1) * PANEL));
        }
}

// gate = silu(gate) * up, each rounded to its type.
template <class T>
INLINE void gate_by(T* gate, const float* up, int64_t size) {
    combine(gate, gate, up, size, [](vf x, vf y) { return rounded<T>(Silu::of(x)) * rounded<T>(y); });
}

// inner = silu(gate) * up of all chosen rows. A gate's outputs are kept where the result goes, until
// the products that belong to them, in one panel or two, are there.
template <class T, class Rows>
static void multiply_gate_up(const Moe<T>& moe, const Team& team, Rows& rows) {
    const int64_t width = moe.width;
    for_experts(moe, team, rows, moe.rows, moe.hidden, 2 * width, width,
                [&](int64_t first, int64_t low, int64_t high) {
        T* inner = moe.inner + first * width + low % (2 * width);
        rows.multiply(low / PANEL, [&](int64_t row, const float* sums) {
            write_row<T>(inner + row * width, sums + low % PANEL, high - low, nullptr);
        });
        for (int64_t at = low + width, end = high + width, next; at < end; at = next) {
            next = min(end, at / PANEL * PANEL + PANEL);
            rows.multiply(at / PANEL, [&](int64_t row, const float* sums) {
                gate_by(inner + row * width + at - width - low, sums + at % PANEL, next - at);
            });
        }
    });
}

// rows = inner times the experts' last weights.
template <class T, class Rows>
static void multiply_down(const Moe<T>& moe, const Team& team, Rows& rows) {
    for_experts(moe, team, rows, moe.inner, moe.width, moe.hidden, moe.hidden,
                [&](int64_t first, int64_t low, int64_t high) {
        T* y = moe.rows + first * moe.hidden + low % moe.hidden;
        rows.multiply(low / PANEL, [&](int64_t row, const float* sums) {
            write_row<T>(y + row * moe.hidden, sums + low % PANEL, high - low, nullptr);
        });
    });
}

// The rows of a token by their shares, the highest first.
template <class T>
static void combine_rows(const Moe<T>& moe, int64_t token, int64_t first, int64_t size) {
    const float* shares = moe.shares + token * moe.top_k;
    const int32_t* places = moe.places + token * moe.top_k;
    T* out = moe.out + token * moe.out_stride + first;
    for (int64_t i = 0; i < size; i += W) {
        const int64_t left = min(W, size - i);
        vf total = zero();
        for (int64_t j = 0; j < moe.top_k; j++) {
            const T* y = moe.rows + places[j] * moe.hidden + first + i;
            total = fma(splat(shares[j]), left < W ? load_part(y, left) : load(y), total);
        }
        if (left < W) store_part(out + i, total, left);
        else store(out + i, total);
    }
}

// in: x [rows, hidden], scores of the experts [rows, experts], both of `element`; what gate_up is
// packed in, three tensors at most; the same of down. out: [rows, hidden]; scratch memory, for each
// row top_k * (12 + (hidden + width) * bytes of an element) + 4 * (experts + 1) + 6 * 64 bytes.
// n: hidden, width, experts, top_k, whether the shares of the chosen add up to 1, strides of x,
// scores and out, how the weights are packed, inputs in a group of gate_up's and of down's codes.
static void moe(const Call& call, const Team& team) {
    with_element(call.element, [&](auto* of_type) {
        using T = typename Bare<decltype(of_type)>::type;
        const Moe<T> moe(call, team);
        if (!moe.num_rows) return;  // there is no scratch memory either
        for (Range rows; team.take(moe.num_rows, rows);)
            for (int64_t row = rows.begin; row < rows.end; row++)
                route(moe, row, (float*)team.scratch);
        team.barrier();
        for (int64_t expert; team.take_one(moe.experts, expert);) gather(moe, expert);
        team.barrier();
        with_weight<T>(call, 2, moe.hidden, call.n[9], team,
                       [&](auto& rows) { multiply_gate_up(moe, team, rows); });
        team.barrier();
        with_weight<T>(call, 5, moe.width, call.n[10], team,
                       [&](auto& rows) { multiply_down(moe, team, rows); });
        team.barrier();
        // How much work there is for experts stands in scratch memory, which others may use as soon as
        // one thread is through: so all must have read it.
        team.barrier();
        for_pieces(moe.num_rows, moe.hidden, team, [&](int64_t row, int64_t first, int64_t size) {
            combine_rows(moe, row, first, size);
        });
    });
}

}  // namespace trimaran::ISA
