// Functions of vectors of floats.
#pragma once
#include "vec.h"

namespace trimaran::ISA {

// e^x with a relative error of 1e-7: 2^n e^r, |r| <= ln 2 / 2, and a polynomial for e^r (Cephes,
// expf). 0 below -87.3 (so for -inf), inf above 88.72, NaN for NaN.
INLINE vf vexp(vf x) {
    constexpr float LOW = -87.4f, HIGH = 89, MAGIC = 0x1.8p23f;  // MAGIC + n: n in the lowest bits
    const vf bounded = select(x < LOW, splat(LOW), select(x > HIGH, splat(HIGH), x));
    const vf shifted = fma(bounded, splat(0x1.715476p0f), splat(MAGIC));
    const vf n = shifted - MAGIC;
    const vf r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), bounded));
    vf p = fma(splat(1.9875691500e-4f), r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r) + 1;
    // 2^(n - 1), so that n = 128 still has one; n = -126 has none and gives 0.
    const vf power = (vf)(((vu)shifted << 23) + (126u << 23));
    return p * power * 2;
}
INLINE float vexp(float x) { return vexp(splat(x))[0]; }

// tanh x with a relative error of 2e-7: an odd polynomial near 0 (Cephes, tanhf), else by e^2|x|.
INLINE vf vtanh(vf x) {
    const vf size = (vf)((vu)x & 0x7fffffffu), square = x * x;
    vf p = fma(splat(-5.70498872745e-3f), square, splat(2.06390887954e-2f));
    p = fma(p, square, splat(-5.37397155531e-2f));
    p = fma(p, square, splat(1.33314422036e-1f));
    p = fma(p, square, splat(-3.33332819422e-1f));
    const vf near = fma(p * square, x, x);
    const vf far = 1 - 2 / (vexp(size + size) + 1);
    const vf with_sign = (vf)((vu)far | ((vu)x & 0x80000000u));
    return select(size < 0.625f, near, with_sign);
}

// erf x to about one unit in the last place, by two minimax polynomials (least squares, iteratively
// reweighted): erf x / x - 1 in x^2 up to 1, to 2e-9; log(1 - erf x) up to 4, beyond which a float's
// erf is 1.
INLINE vf verf(vf x) {
    const vf size = (vf)((vu)x & 0x7fffffffu), square = x * x;
    vf p = fma(splat(7.85385771e-5f), square, splat(-8.01019252e-4f));
    p = fma(p, square, splat(5.18832756e-3f));
    p = fma(p, square, splat(-2.68538119e-2f));
    p = fma(p, square, splat(1.12835851e-1f));
    p = fma(p, square, splat(-3.76126258e-1f));
    p = fma(p, square, splat(1.28379166e-1f));
    const vf near = fma(p, x, x), t = min(splat(4.0f), size);
    vf q = fma(splat(-2.16868499e-5f), t, splat(4.41336377e-4f));
    q = fma(q, t, splat(-4.20456187e-3f));
    q = fma(q, t, splat(2.52082567e-2f));
    q = fma(q, t, splat(-1.08418577e-1f));
    q = fma(q, t, splat(-6.33219893e-1f));
    q = fma(q, t, splat(-1.12957842f));
    const vf far = 1 - vexp(fma(q, t, splat(1.88040231e-4f)));
    const vf with_sign = (vf)((vu)far | ((vu)x & 0x80000000u));
    return select(size < 1.0f, near, with_sign);
}

// log x of positive normal numbers, with a relative error of 2e-7 near 1 too: x = 2^e (1 + f), 1 + f
// between the roots of 1/2 and 2, and f - f^2 / 2 + f^3 p(f), p a minimax polynomial.
INLINE vf vlog(vf x) {
    const vi e = ((vi)x - 0x3f3504f3) >> 23;  // 0x3f3504f3: the root of 1/2
    const vf f = (vf)((vi)x - (e << 23)) - 1, exponent = __builtin_convertvector(e, vf);
    vf p = fma(splat(-7.63442991e-2f), f, splat(1.27615504e-1f));
    p = fma(p, f, splat(-1.31601951e-1f));
    p = fma(p, f, splat(1.42017625e-1f));
    p = fma(p, f, splat(-1.66233565e-1f));
    p = fma(p, f, splat(2.00012267e-1f));
    p = fma(p, f, splat(-2.50008211e-1f));
    p = fma(p, f, splat(3.33333317e-1f));
    const vf rest = fma(f * f, fma(p, f, splat(-0.5f)), exponent * -2.12194440e-4f);
    return fma(exponent, splat(0.693359375f), rest + f);
}

// A product that stays one: the compiler does not take it together with the sum that follows.
INLINE vf apart(vf x) {
#if defined(TRIMARAN_EMULATED) && defined(TRIMARAN_WIDE)
    __m256 halves[2];
    __builtin_memcpy(halves, &x, sizeof x);
    asm("" : "+x"(halves[0]), "+x"(halves[1]));
    __builtin_memcpy(&x, halves, sizeof x);
#else
    asm("" : "+x"(x));
#endif
    return x;
}

// x as an element of a type would keep it.
INLINE vf rounded_to(const float*, vf x) { return apart(x); }
INLINE vf rounded_to(const bf16*, vf x) { return (vf)(round_to_bf16(x) & 0xffff0000u); }
INLINE vf rounded_to(const f16*, vf x) {
    f16 kept[W];
    store(kept, x);
    return load(kept);
}
template <class T>
INLINE vf rounded(vf x) {
    return rounded_to((const T*)nullptr, x);
}

}  // namespace trimaran::ISA
