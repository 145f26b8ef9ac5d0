// Sums, gated activations and copied rows: each output by itself.
#pragma once
#include "math.h"

namespace trimaran::ISA {

constexpr int64_t PIECE = 512;  // columns; a row is divided among threads in pieces of so many

// Calls body(row, first column, columns) for pieces of rows of `size` columns, as this thread takes
// them.
template <class Body>
INLINE void for_pieces(int64_t rows, int64_t size, const Team& team, Body body) {
    const int64_t across = (size + PIECE - 1) / PIECE;
    for (Range pieces; team.take(rows * across, pieces);)
        for (int64_t i = pieces.begin; i < pieces.end; i++) {
            const int64_t first = i % across * PIECE;
            body(i / across, first, min(PIECE, size - first));
        }
}

// out = f(a, b), element by element, for `size` of them.
template <class T, class B, class F>
INLINE void combine(T* out, const T* a, const B* b, int64_t size, F f) {
    int64_t i = 0;
    for (; i + W <= size; i += W) store(out + i, f(load(a + i), load(b + i)));
    if (const int64_t left = size - i)
        store_part(out + i, f(load_part(a + i, left), load_part(b + i, left)), left);
}

// in: a, b [rows, size]. out: a + b. n: size, row strides of a, b and out.
static void add(const Call& call, const Team& team) {
    const int64_t* n = call.n;
    with_element(call.element, [&](auto* of_type) {
        using T = typename Bare<decltype(of_type)>::type;
        const T *a = (const T*)call.in[0], *b = (const T*)call.in[1];
        T* out = (T*)call.out[0];
        for_pieces(rows_of(call, team), n[0], team, [&](int64_t row, int64_t first, int64_t size) {
            combine(out + row * n[3] + first, a + row * n[1] + first, b + row * n[2] + first, size,
                    [](vf x, vf y) { return x + y; });
        });
    });
}

struct Silu {
    INLINE vf of(vf x) { return x / (1.0f + vexp(-x)); }
};
struct Gelu {
    INLINE vf of(vf x) { return x * 0.5f * (1.0f + verf(x * 0.707106781f)); }
};
struct GeluTanh {
    INLINE vf of(vf x) {
        const vf inner = 0.797884561f * fma(x * x * x, splat(0.044715f), x);  // sqrt(2 / pi)
        const vf tanh = 2.0f / (1.0f + vexp(-2.0f * inner)) - 1.0f;  // good to an ulp of 1
        return x * 0.5f * (1.0f + tanh);
    }
};

// in: [rows, 2 * size], gate first. out: the activated gate, rounded to its type, times the rest.
// n: size, row strides of in and out.
template <class Activation>
static void gated(const Call& call, const Team& team) {
    const int64_t* n = call.n;
    with_element(call.element, [&](auto* of_type) {
        using T = typename Bare<decltype(of_type)>::type;
        const T* in = (const T*)call.in[0];
        T* out = (T*)call.out[0];
        for_pieces(rows_of(call, team), n[0], team, [&](int64_t row, int64_t first, int64_t size) {
            const T* gate = in + row * n[1] + first;
            combine(out + row * n[2] + first, gate, gate + n[0], size,
                    [](vf x, vf up) { return rounded<T>(Activation::of(x)) * up; });
        });
    });
}
static void silu_mul(const Call& call, const Team& team) { gated<Silu>(call, team); }
static void gelu_mul(const Call& call, const Team& team) { gated<Gelu>(call, team); }
static void gelu_tanh_mul(const Call& call, const Team& team) { gated<GeluTanh>(call, team); }

// Rows by their ids, int32 or int64 [rows]: calls take(to, id, first column, columns) for pieces of
// each row of out, and writes NaN where an id is none of the entries. in: ids. n: size, entries,
// bytes of an id, strides of ids and, as `out_stride`, of out.
template <class T, class Take>
INLINE void for_ids(const Call& call, const Team& team, int64_t out_stride, Take take) {
    const int64_t* n = call.n;
    const bool wide = n[2] == 8;
    T* out = (T*)call.out[0];
    for_pieces(rows_of(call, team), n[0], team, [&](int64_t row, int64_t first, int64_t size) {
        const int64_t at = row * n[3];
        const int64_t id = wide ? ((const int64_t*)call.in[0])[at] : ((const int32_t*)call.in[0])[at];
        T* to = out + row * out_stride + first;
        if (id >= 0 && id < n[1])
            take(to, id, first, size);
        else
            __builtin_memset((void*)to, 0xff, size * sizeof(T));  // NaN in every element type
    });
}

// in: ids [rows], int32 or int64, and a table [entries, size]. out: [rows, size], the table's rows
// by their ids; a row of NaN for an id that is not in the table. n: size, entries, bytes of an id,
// strides of ids, table and out.
static void take_rows(const Call& call, const Team& team) {
    const int64_t stride = call.n[4];
    with_element(call.element, [&](auto* of_type) {
        using T = typename Bare<decltype(of_type)>::type;
        const T* table = (const T*)call.in[1];
        for_ids<T>(call, team, call.n[5], [&](T* to, int64_t id, int64_t first, int64_t size) {
            __builtin_memcpy((void*)to, table + id * stride + first, size * sizeof(T));
        });
    });
}

}  // namespace trimaran::ISA
