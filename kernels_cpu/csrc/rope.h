// Rotary embedding of query and key, alone or after the norm of each head.
//
// A work item is one head of one token, query heads before key heads; a thread takes a run of
// them and rounds the cosines and sines once for each token it meets.
#pragma once
#include "norm.h"

namespace trimaran::ISA {

// The row of a table at a token's position, rounded to T: `half` cosines, then `half` sines.
template <class T>
static void read_angles(float* angles, const float* row, int64_t rotary) {
    int64_t i = 0;
    for (; i + W <= rotary; i += W) store(angles + i, rounded<T>(load(row + i)));
    if (i < rotary)
        store_part(angles + i, rounded<T>(load_part(row + i, rotary - i)), rotary - i);
}

// The pair (first, second) turned; each product is rounded to T, and then the sum.
template <class T>
struct Turned {
    vf first, second;
    INLINE Turned of(vf first, vf second, vf cos, vf sin) {
        return {rounded<T>(first * cos) - rounded<T>(second * sin),
                rounded<T>(second * cos) + rounded<T>(first * sin)};
    }
};

// One head: its first `rotary` channels turned, the others as they are.
template <class T>
static void turn(T* out, const T* x, const float* angles, int64_t rotary, int64_t head_dim) {
    const int64_t half = rotary / 2;
    int64_t i = 0;
    for (; i + W <= half; i += W) {
        const auto y = Turned<T>::of(load(x + i), load(x + half + i), load(angles + i),
                                     load(angles + half + i));
        store(out + i, y.first);
        store(out + half + i, y.second);
    }
    if (const int64_t left = half - i) {
        const auto y = Turned<T>::of(load_part(x + i, left), load_part(x + half + i, left),
                                     load_part(angles + i, left), load_part(angles + half + i, left));
        store_part(out + i, y.first, left);
        store_part(out + half + i, y.second, left);
    }
    __builtin_memcpy((void*)(out + rotary), x + rotary, (head_dim - rotary) * sizeof(T));
}

// n of both kernels below: heads, kv_heads, head_dim, rotary dim (even), row strides of query and
// key, of the positions and of the table, row strides of both outputs. `prepare(head, is_key)`
// gives what is to be turned.
template <class T, class Prepare>
INLINE void rotate_heads(const Call& call, const Team& team, const int64_t* positions,
                         const float* table, float* angles, Prepare prepare) {
    const int64_t *n = call.n, heads = n[0], both = heads + n[1], head_dim = n[2], rotary = n[3];
    const int64_t units = rows_of(call, team) * both;
    int64_t known = -1;
    const auto rotate = [&](int64_t i) __attribute__((always_inline)) {
        const int64_t row = i / both, at = i % both, is_key = at >= heads;
        if (row != known) read_angles<T>(angles, table + positions[row * n[6]] * n[7], rotary);
        known = row;
        const int64_t within = (at - is_key * heads) * head_dim;
        const T* x = (const T*)call.in[is_key] + row * n[4 + is_key] + within;
        T* out = (T*)call.out[is_key] + row * n[8 + is_key] + within;
        turn(out, prepare(x, is_key), angles, rotary, head_dim);
    };
    for (Range mine; team.take(units, mine);)
        for (int64_t i = mine.begin; i < mine.end; i++) rotate(i);
}

// in: query [rows, heads, head_dim], key [rows, kv_heads, head_dim], positions int64 [rows], table
// of cosines and sines, f32. out: query and key turned.
static void rope(const Call& call, const Team& team) {
    with_element(call.element, [&](auto* of_type) {
        using T = typename Bare<decltype(of_type)>::type;
        rotate_heads<T>(call, team, (const int64_t*)call.in[2], (const float*)call.in[3],
                        (float*)team.scratch, [](const T* x, int64_t) { return x; });
    });
}

// As `rope`, of the normalised heads: equal to two calls of rms_norm and one of rope. in: query,
// key (slices of one projection, say), positions, table, weights [head_dim] of the norms of query
// and key. f: eps of both.
static void qk_norm_rope(const Call& call, const Team& team) {
    with_element(call.element, [&](auto* of_type) {
        using T = typename Bare<decltype(of_type)>::type;
        const int64_t head_dim = call.n[2];
        float* angles = (float*)team.scratch;
        T* normed = (T*)(angles + up(call.n[3], W));
        rotate_heads<T>(call, team, (const int64_t*)call.in[2], (const float*)call.in[3], angles,
                        [&](const T* x, int64_t is_key) {
                            rms_norm_row(normed, x, (const T*)call.in[4 + is_key], head_dim,
                                         call.f[is_key]);
                            return normed;
                        });
    });
}

}  // namespace trimaran::ISA
