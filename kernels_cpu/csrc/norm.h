// Root mean square normalisation. Rows are divided among threads, each row is one thread's.
#pragma once
#include "math.h"

namespace trimaran::ISA {

// Four sums, so that one addition need not wait for the one before it.
struct SquareSum {
    vf sums[4] = {};
    INLINE float total(const SquareSum& all) {
        return sum((all.sums[0] + all.sums[1]) + (all.sums[2] + all.sums[3]));
    }
};

// Calls body(first, lane) for whole vectors of a row, lane 0 … 3 in turn.
template <class Body>
INLINE int64_t for_vectors(int64_t size, Body body) {
    int64_t i = 0;
    for (; i + 4 * W <= size; i += 4 * W)
        UNROLL for (int lane = 0; lane < 4; lane++) body(i + lane * W, lane);
    for (int lane = 0; i + W <= size; i += W, lane++) body(i, lane);
    return i;
}

INLINE float norm_scale(float squares, int64_t size, float eps) {
    return 1.0f / __builtin_sqrtf(squares / (float)size + eps);
}

// out = weight * (x * scale), the inner product rounded to T first.
template <class T>
static void normalise(T* out, const T* x, const T* weight, int64_t size, float scale) {
    int64_t i = 0;
    for (; i + W <= size; i += W) store(out + i, load(weight + i) * rounded<T>(load(x + i) * scale));
    if (const int64_t left = size - i)
        store_part(out + i, load_part(weight + i, left) * rounded<T>(load_part(x + i, left) * scale),
                   left);
}

template <class T>
static void rms_norm_row(T* out, const T* x, const T* weight, int64_t size, float eps) {
    SquareSum all;
    const int64_t i = for_vectors(size, [&](int64_t at, int lane) __attribute__((always_inline)) {
        const vf value = load(x + at);
        all.sums[lane] = fma(value, value, all.sums[lane]);
    });
    if (const int64_t left = size - i) {
        const vf value = load_part(x + i, left);
        all.sums[3] = fma(value, value, all.sums[3]);
    }
    normalise(out, x, weight, size, norm_scale(SquareSum::total(all), size, eps));
}

// in: x [rows, groups, size], weight [size]. out: like x, contiguous within a row. n: size, groups,
// row strides of x and out. f: eps.
static void rms_norm(const Call& call, const Team& team) {
    const int64_t size = call.n[0], groups = call.n[1];
    const int64_t units = rows_of(call, team) * groups;
    with_element(call.element, [&](auto* of_type) {
        using T = typename Bare<decltype(of_type)>::type;
        for (Range mine; team.take(units, mine);)
            for (int64_t i = mine.begin; i < mine.end; i++) {
                const int64_t row = i / groups, within = i % groups * size;
                rms_norm_row((T*)call.out[0] + row * call.n[3] + within,
                             (const T*)call.in[0] + row * call.n[2] + within, (const T*)call.in[1],
                             size, call.f[0]);
            }
    });
}

template <class T>
static void add_rms_norm_row(T* out, T* total, const T* x, const T* residual, const T* weight,
                             int64_t size, float eps) {
    SquareSum all;
    const int64_t i = for_vectors(size, [&](int64_t at, int lane) __attribute__((always_inline)) {
        const vf value = rounded<T>(load(x + at) + load(residual + at));
        store(total + at, value);
        all.sums[lane] = fma(value, value, all.sums[lane]);
    });
    if (const int64_t left = size - i) {
        const vf value = rounded<T>(load_part(x + i, left) + load_part(residual + i, left));
        store_part(total + i, value, left);
        all.sums[3] = fma(value, value, all.sums[3]);
    }
    normalise(out, total, weight, size, norm_scale(SquareSum::total(all), size, eps));
}

// in: x, residual [rows, size], weight [size]. out: rms_norm(x + residual), x + residual. n: size,
// row strides of x, residual and both outputs. f: eps.
static void add_rms_norm(const Call& call, const Team& team) {
    const int64_t* n = call.n;
    const int64_t rows = rows_of(call, team);
    with_element(call.element, [&](auto* of_type) {
        using T = typename Bare<decltype(of_type)>::type;
        for (Range mine; team.take(rows, mine);)
            for (int64_t row = mine.begin; row < mine.end; row++)
                add_rms_norm_row((T*)call.out[0] + row * n[3], (T*)call.out[1] + row * n[4],
                             (const T*)call.in[0] + row * n[1], (const T*)call.in[1] + row * n[2],
                             (const T*)call.in[2], n[0], call.f[0]);
    });
}

}  // namespace trimaran::ISA
