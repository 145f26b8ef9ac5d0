// The paged cache of one layer, and writing keys and values into it.
//
// A block of `size` tokens holds for each KV head, one piece behind the other:
//   keys    a panel of B with a column a token:  [D][size], bf16 [D / 2][size][2]
//   values  a panel of B with a row a token:     [size][D], bf16 [size / 2][D][2]
//   int8:   fp32 scales of the keys [size] and of the values [size]; a number is code * scale
// so that queries times keys and probabilities times values are both `product` of tile.h. `size`
// and D are multiples of 16.
#pragma once
#include "tile.h"

namespace trimaran::ISA {

constexpr int64_t MAX_HEAD_DIM = 256;

template <class C>
constexpr bool QUANTIZED = sizeof(C) == 1;

struct Paging {
    int64_t kv_heads, dim, size;
};

// What one block holds for one head.
template <class C>
struct Panels {
    C *key, *value;
    float *key_scale, *value_scale;
};
template <class C>
INLINE Panels<C> panels_of(const void* cache, const Paging& at, int64_t block, int64_t head) {
    const int64_t elements = at.dim * at.size;
    const int64_t bytes = 2 * elements * sizeof(C) + (QUANTIZED<C> ? 2 * at.size * sizeof(float) : 0);
    C* key = (C*)((uint8_t*)cache + (block * at.kv_heads + head) * bytes);
    float* scale = (float*)(key + 2 * elements);
    return {key, key + elements, scale, scale + at.size};
}

// Runs `body` with a null pointer to the element type of a cache.
template <class Body>
INLINE void with_cache_element(int64_t element, Body body) {
    if ((Element)element == Element::s8) return body((const int8_t*)nullptr);
    with_element((int32_t)element, body);
}

// One vector [dim] as the cache keeps it. Rounded to nearest, ties to even.
template <class X, class C>
INLINE float convert(const X* x, int64_t dim, C* kept) {
    for (int64_t d = 0; d < dim; d += W) store(kept + d, load(x + d));
    return 1;
}
// Codes in [-127, 127]; returns their scale, max|x| / 127, or NaN for what is not finite.
template <class X>
INLINE float convert(const X* x, int64_t dim, int8_t* kept) {
    vf top = zero(), finite = zero();
    for (int64_t d = 0; d < dim; d += W) {
        const vf value = load(x + d);
        top = max(top, (vf)((vu)value & 0x7fffffffu));
        finite = fma(value, zero(), finite);  // NaN if one of them is no finite number
    }
    const float scale = largest(top) / 127 + sum(finite);
    const float divisor = scale > 0 ? scale : 1;
    constexpr float MAGIC = 0x1.8p23f;  // leaves the nearest whole number, ties to even
    for (int64_t d = 0; d < dim; d += W) {
        const vf code = min(max(load(x + d) / divisor, splat(-127)), splat(127)) + MAGIC - MAGIC;
        *(vb_any*)(kept + d) = __builtin_convertvector(__builtin_convertvector(code, vi), vb);
    }
    return scale;
}

template <class X, class C>
INLINE void write_token(const X* key, const X* value, const Paging& at, int64_t offset,
                        const Panels<C>& to) {
    constexpr int64_t P = PairsOf<C>::value;
    C kept[MAX_HEAD_DIM];
    const float key_scale = convert(key, at.dim, kept);
    for (int64_t d = 0; d < at.dim; d += P)
        __builtin_memcpy((void*)(to.key + d * at.size + offset * P), kept + d, P * sizeof(C));
    const float value_scale = convert(value, at.dim, kept);
    C* row = to.value + offset / P * P * at.dim + offset % P;
    for (int64_t d = 0; d < at.dim; d++) row[d * P] = kept[d];
    if constexpr (QUANTIZED<C>) {
        to.key_scale[offset] = key_scale;
        to.value_scale[offset] = value_scale;
    }
}

// Fetches the lines that a token's key and value go to: each of its key's pairs has one of its own.
template <class C>
INLINE void fetch_token(const Paging& at, int64_t offset, const Panels<C>& to) {
    constexpr int64_t P = PairsOf<C>::value, BYTES = P * sizeof(C);
    for (int64_t d = 0; d < at.dim; d += P)
        __builtin_prefetch((const char*)to.key + (d / P * at.size + offset) * BYTES, 1);
    const char* row = (const char*)(to.value + offset / P * P * at.dim);
    for (int64_t byte = 0; byte < at.dim * BYTES; byte += 64) __builtin_prefetch(row + byte, 1);
}

// in: keys and values [rows, kv_heads, D] of `element`, slots int64 [rows]. out: the cache.
// n: kv_heads, D, block size, row stride of the keys, of the values, the cache's element.
static void kv_write(const Call& call, const Team& team) {
    const Paging at{call.n[0], call.n[1], call.n[2]};
    const int64_t key_stride = call.n[3], value_stride = call.n[4];
    const int64_t* slots = (const int64_t*)call.in[2];
    const int64_t units = rows_of(call, team) * at.kv_heads;
    with_element(call.element, [&](auto* of_type) {
        using X = typename Bare<decltype(of_type)>::type;
        with_cache_element(call.n[5], [&](auto* of_cache) {
            using C = typename Bare<decltype(of_cache)>::type;
            const auto place = [&](int64_t unit) {
                const int64_t slot = slots[unit / at.kv_heads];
                return panels_of<C>(call.out[0], at, slot / at.size, unit % at.kv_heads);
            };
            const auto fetch = [&](int64_t unit) {
                fetch_token(at, slots[unit / at.kv_heads] % at.size, place(unit));
            };
            for (Range part; team.take(units, part);) {
                fetch(part.begin);
                for (int64_t i = part.begin; i < part.end; i++) {
                    if (i + 1 < part.end) fetch(i + 1);
                    const int64_t row = i / at.kv_heads, head = i % at.kv_heads;
                    write_token((const X*)call.in[0] + row * key_stride + head * at.dim,
                                (const X*)call.in[1] + row * value_stride + head * at.dim, at,
                                slots[row] % at.size, place(i));
                }
            }
        });
    });
}

}  // namespace trimaran::ISA
