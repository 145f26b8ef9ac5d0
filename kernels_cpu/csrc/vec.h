// Vectors of floats as wide as the instruction set has them, written with gcc's vector extension:
// one source for all sets. Included by each isa_*.cpp, inside its own namespace (`ISA`); no STL
// here or anywhere below, because an inline function that two objects share would be linked in
// whichever object's instruction set comes first.
//
// TRIMARAN_WIDE: 512-bit vectors. TRIMARAN_BF16, TRIMARAN_VNNI, TRIMARAN_AMX: those instructions.
// TRIMARAN_EMULATED: compile the wide variants for a processor without them (for tests): gcc
// splits the vectors, and `emulated.h` says what the special instructions mean.
#pragma once
#include <immintrin.h>

#include "abi.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

namespace trimaran::ISA {

#ifdef TRIMARAN_WIDE
constexpr int W = 16;
#else
constexpr int W = 8;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef int8_t vb __attribute__((vector_size(W)));
typedef float vf_any __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(W * 4), aligned(1), may_alias));
typedef int8_t vb_any __attribute__((vector_size(W), aligned(1), may_alias));
typedef int32_t vi_any __attribute__((vector_size(W * 4), aligned(4), may_alias));

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

INLINE vf splat(float x) { return x - vf{}; }
INLINE vf zero() { return vf{}; }

// -ffp-contract=fast makes these one instruction, rounded once.
#ifdef TRIMARAN_EMULATED
INLINE vf fma(vf a, vf b, vf c) {  // emulated kernels are compiled quickly, which does not do so
    for (int i = 0; i < W / 8; i++) {
        __m256 x, y, z;
        __builtin_memcpy(&x, (const float*)&a + 8 * i, sizeof x);
        __builtin_memcpy(&y, (const float*)&b + 8 * i, sizeof y);
        __builtin_memcpy(&z, (const float*)&c + 8 * i, sizeof z);
        z = _mm256_fmadd_ps(x, y, z);
        __builtin_memcpy((float*)&c + 8 * i, &z, sizeof z);
    }
    return c;
}
#else
INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
#endif
INLINE float fma(float a, float b, float c) { return a * b + c; }

INLINE vf select(vi mask, vf yes, vf no) { return (vf)(((vi)yes & mask) | ((vi)no & ~mask)); }
INLINE vf max(vf a, vf b) { return select(a > b, a, b); }
INLINE vf min(vf a, vf b) { return select(a < b, a, b); }
INLINE float max(float a, float b) { return a > b ? a : b; }
INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
INLINE int64_t up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// Sums in a fixed order, whatever the width: pairs at distance W/2, W/4, …, 1.
INLINE float sum(vf x) {
    float lane[W];
    __builtin_memcpy(lane, &x, sizeof x);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lane[i] += lane[i + half];
    return lane[0];
}
INLINE float largest(vf x) {
    float lane[W];
    __builtin_memcpy(lane, &x, sizeof x);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) lane[i] = max(lane[i], lane[i + half]);
    return lane[0];
}

// ---------------------------------------------------------------------------------------------
// Elements: each type is read as floats and written rounded to nearest, ties to even.
// ---------------------------------------------------------------------------------------------

INLINE vf load(const float* p) { return *(const vf_any*)p; }
// Widening and narrowing go by name: gcc's own conversions of such short vectors are element by
// element with AVX2.
INLINE vf load(const bf16* p) {
    vu x;
    for (int i = 0; i < W / 8; i++) {
        const __m256i part = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)(p + 8 * i)));
        __builtin_memcpy((uint32_t*)&x + 8 * i, &part, sizeof part);
    }
    return (vf)(x << 16);
}
INLINE vf load(const f16* p) {
    vf x;
    for (int i = 0; i < W / 8; i++) {
        const __m256 part = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8 * i)));
        __builtin_memcpy((float*)&x + 8 * i, &part, sizeof part);
    }
    return x;
}
INLINE vf load(const int8_t* p) {
    vi x;  // by name: gcc converts such short vectors byte by byte
    for (int i = 0; i < W / 8; i++) {
        const __m256i part = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8 * i)));
        __builtin_memcpy((int32_t*)&x + 8 * i, &part, sizeof part);
    }
    return __builtin_convertvector(x, vf);
}

INLINE void store(float* p, vf x) { *(vf_any*)p = x; }
// The nearest bfloat16 in the upper halves; what stands in the lower ones is to be dropped.
INLINE vu round_to_bf16(vf x) {
    const vu bits = (vu)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return (vu)select(x == x, (vf)rounded, (vf)(bits | 0x400000));
}
INLINE void store(bf16* p, vf x) {
    const vu upper = round_to_bf16(x) >> 16;
    for (int i = 0; i < W / 8; i++) {
        __m256i part;
        __builtin_memcpy(&part, (const uint32_t*)&upper + 8 * i, sizeof part);
        part = _mm256_permute4x64_epi64(_mm256_packus_epi32(part, part), 0b1000);
        _mm_storeu_si128((__m128i*)(p + 8 * i), _mm256_castsi256_si128(part));
    }
}
INLINE void store(f16* p, vf x) {
    for (int i = 0; i < W / 8; i++) {
        __m256 part;
        __builtin_memcpy(&part, (const float*)&x + 8 * i, sizeof part);
        _mm_storeu_si128((__m128i*)(p + 8 * i), _mm256_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT));
    }
}

INLINE float load_one(const float* p) { return *p; }
INLINE float load_one(const bf16* p) {
    const uint32_t bits = (uint32_t)p->bits << 16;
    float x;
    __builtin_memcpy(&x, &bits, 4);
    return x;
}
INLINE float load_one(const f16* p) { return _cvtsh_ss(p->bits); }

// The first `count` < W elements; the others are 0 (loads) or left alone (stores).
template <class T>
INLINE vf load_part(const T* p, int64_t count) {
    T whole[W] = {};
    __builtin_memcpy(whole, p, count * sizeof(T));
    return load(whole);
}
template <class T>
INLINE void store_part(T* p, vf x, int64_t count) {
    T whole[W];
    store(whole, x);
    __builtin_memcpy(p, whole, count * sizeof(T));
}

// The two halves of a vector of bfloat16 pairs: elements 0, 2, 4… and 1, 3, 5…
INLINE vf even(vu pairs) { return (vf)(pairs << 16); }
INLINE vf odd(vu pairs) { return (vf)(pairs & 0xffff0000u); }
INLINE vu load_pairs(const bf16* p) { return *(const vu_any*)p; }

#ifdef TRIMARAN_BF16
// c + a1 * b1 + a0 * b0 for one pair a and W pairs b, the odd product first (Intel's manual,
// VDPBF16PS).
INLINE vf dot_pairs(vf c, uint32_t a, vu b) {
#ifdef TRIMARAN_EMULATED
    const vu pair = a - vu{};
    return fma(even(pair), even(b), fma(odd(pair), odd(b), c));
#else
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
#endif
}
#endif

// ---------------------------------------------------------------------------------------------
// Integers of 8 and 16 bits, 4 * W and 2 * W in a vector, and their products
// ---------------------------------------------------------------------------------------------

typedef int8_t vs8 __attribute__((vector_size(W * 4)));
typedef uint8_t vu8 __attribute__((vector_size(W * 4)));
typedef int16_t vs16 __attribute__((vector_size(W * 4)));
typedef uint16_t vu16 __attribute__((vector_size(W * 4)));
typedef int64_t vs64 __attribute__((vector_size(W * 4)));
typedef uint8_t vu8_any __attribute__((vector_size(W * 4), aligned(1), may_alias));

INLINE vu8 load_bytes(const void* p) { return *(const vu8_any*)p; }
INLINE vs16 load_words(const int8_t* p) {  // gcc's own conversion goes by four instructions
    vs16 words;
    for (int i = 0; i < W / 8; i++) {
        const __m256i part = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(p + 16 * i)));
        __builtin_memcpy((int16_t*)&words + 16 * i, &part, sizeof part);
    }
    return words;
}

INLINE vi load_integers(const uint8_t* p) {
    vi integers;
    for (int i = 0; i < W / 8; i++) {
        const __m256i part = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8 * i)));
        __builtin_memcpy((int32_t*)&integers + 8 * i, &part, sizeof part);
    }
    return integers;
}

// W integers that fit fewer bits. gcc's own conversion goes element by element.
INLINE void store_narrow(void* p, vi x, int16_t) {
    for (int i = 0; i < W / 8; i++) {
        __m128i part[2];
        __builtin_memcpy(part, (const int32_t*)&x + 8 * i, sizeof part);
        _mm_storeu_si128((__m128i*)p + i, _mm_packs_epi32(part[0], part[1]));
    }
}
INLINE void store_narrow(void* p, vi x, int8_t) {
    __m128i words[W / 8];
    store_narrow(words, x, int16_t{});
    for (int i = 0; i < W / 8; i++)
        _mm_storel_epi64((__m128i*)((int64_t*)p + i), _mm_packs_epi16(words[i], words[i]));
}
INLINE void store_narrow(void* p, vi x, uint8_t) {
    __m128i words[W / 8];
    store_narrow(words, x, int16_t{});
    for (int i = 0; i < W / 8; i++)
        _mm_storel_epi64((__m128i*)((int64_t*)p + i), _mm_packus_epi16(words[i], words[i]));
}

// The 4 or 8 bytes at p, in all lanes.
INLINE vi splat4(const void* p) {
    int32_t bytes;
    __builtin_memcpy(&bytes, p, 4);
    return bytes - vi{};
}
INLINE vs64 splat8(const void* p) {
    int64_t bytes;
    __builtin_memcpy(&bytes, p, 8);
    return bytes - vs64{};
}

// Has x computed here and kept in a register: gcc would form many products before it adds the first,
// and run out of registers.
template <class V>
INLINE void in_place([[maybe_unused]] V& x) {
#ifndef TRIMARAN_EMULATED
    __asm__("" : "+v"(x));
#endif
}

// To the nearest integer, ties to even; |x| < 2^22.
INLINE vi nearest(vf x) {
    const vf ones = splat(12582912.0f);  // 1.5 * 2^23: the last place is 1
    return (vi)(x + ones) - (vi)ones;
}

// One element of a vector of sums from two neighbours: a's pairs, then b's.
INLINE vi add_pairs(vi a, vi b) {
#ifdef TRIMARAN_WIDE
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#endif
}

#if defined(TRIMARAN_WIDE) && !defined(TRIMARAN_EMULATED)
// a0 * b0 + a1 * b1 of each pair of 16-bit integers.
INLINE vi multiply_words(vs16 a, vs16 b) { return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b); }
// The same of bytes; the sum must fit 16 bits.
INLINE vs16 multiply_bytes(vu8 a, vs8 b) {
    return (vs16)_mm512_maddubs_epi16((__m512i)a, (__m512i)b);
}
#else
template <class T, class A, class B, class Product>
INLINE T by_parts(A a, B b, Product product) {
    T result;
    for (int i = 0; i < W / 8; i++) {
        __m256i x, y;
        __builtin_memcpy(&x, (const char*)&a + 32 * i, 32);
        __builtin_memcpy(&y, (const char*)&b + 32 * i, 32);
        x = product(x, y);
        __builtin_memcpy((char*)&result + 32 * i, &x, 32);
    }
    return result;
}
INLINE vi multiply_words(vs16 a, vs16 b) {
    return by_parts<vi>(a, b, [](__m256i x, __m256i y) { return _mm256_madd_epi16(x, y); });
}
INLINE vs16 multiply_bytes(vu8 a, vs8 b) {
    return by_parts<vs16>(a, b, [](__m256i x, __m256i y) { return _mm256_maddubs_epi16(x, y); });
}
#endif

#ifdef TRIMARAN_VNNI
// c + the sum of the products of four bytes each.
INLINE vi dot_bytes(vi c, vu8 a, vs8 b) {
#ifdef TRIMARAN_EMULATED
    const vs16 a_odd = (vs16)a >> 8 & 0xff, b_odd = (vs16)b >> 8, b_even = (vs16)b << 8 >> 8;
    return c + multiply_words((vs16)a & 0xff, b_even) + multiply_words(a_odd, b_odd);
#else
    return (vi)_mm512_dpbusd_epi32((__m512i)c, (__m512i)a, (__m512i)b);
#endif
}
#endif

// The 64-bit products of elements 0, 2, 4… of two vectors, whatever stands in the others.
typedef uint64_t vu64 __attribute__((vector_size(W * 4)));
INLINE vu64 wide_product(vu64 a, vu64 b) {
#if defined(TRIMARAN_WIDE) && !defined(TRIMARAN_EMULATED)
    return (vu64)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);  // masked: gcc 12 warns
#else
    __m256i x[W / 8], y[W / 8];
    __builtin_memcpy(x, &a, sizeof a);
    __builtin_memcpy(y, &b, sizeof b);
    for (int i = 0; i < W / 8; i++) x[i] = _mm256_mul_epu32(x[i], y[i]);
    __builtin_memcpy(&a, x, sizeof a);
    return a;
#endif
}

// Is any element of a comparison's result true?
INLINE bool any(vi mask) {
    __m256i part[W / 8];
    __builtin_memcpy(part, &mask, sizeof mask);
    for (int i = 1; i < W / 8; i++) part[0] = _mm256_or_si256(part[0], part[i]);
    return !_mm256_testz_si256(part[0], part[0]);
}

// Runs `body` with a null pointer to the element type of a call; `Bare<decltype(it)>` is the type.
template <class P>
struct Bare;
template <class T>
struct Bare<const T*> {
    using type = T;
};
template <class Body>
INLINE void with_element(int32_t element, Body body) {
    switch ((Element)element) {
        case Element::f32: return body((const float*)nullptr);
        case Element::bf16: return body((const bf16*)nullptr);
        case Element::f16: return body((const f16*)nullptr);
        default: return;
    }
}

}  // namespace trimaran::ISA
