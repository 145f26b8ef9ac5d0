// Cases of mixtures of experts.
#pragma once
#include "cases_quantized.h"

namespace driver {

struct Mixture {
    int64_t rows, experts, top_k, hidden, width;
};
// Around the edges of panels, vectors of experts, tiles of rows and blocks.
constexpr Mixture MIXTURES[] = {{0, 4, 2, 32, 32},  {1, 8, 2, 64, 96},   {3, 3, 3, 32, 64},
                                {9, 17, 4, 64, 32}, {40, 2, 1, 96, 64},  {160, 5, 2, 64, 64},
                                {2, 1, 1, 7, 1},    {33, 6, 2, 40, 50},  {70, 3, 2, 33, 65}};
enum Format : int64_t { DENSE, INT8, INT4, W4A16 };  // `Packed` of moe.h

// Scratch memory of exactly the bytes that the kernel says.
inline int64_t scratch_bytes(const Mixture& mixture, Element element) {
    const int64_t sorted = (mixture.hidden + mixture.width) * bytes_of(element);
    return mixture.top_k * (12 + sorted) + 4 * (mixture.experts + 1) + 6 * 64;
}

// The case but for its weights.
inline Case mixing(int kernel, const Mixture& mixture, Element element, int64_t format, Random& random) {
    Case one(kernel, element, mixture.rows,
             std::to_string(mixture.top_k) + " of " + std::to_string(mixture.experts) + " [" +
                 std::to_string(mixture.hidden) + ", " + std::to_string(mixture.width) + "]");
    const int64_t x_stride = mixture.hidden + 3, scores_stride = mixture.experts + 2;
    one.in(0, numbers(element, mixture.rows ? mixture.rows * x_stride - 3 : 0, random));
    one.in(1, numbers(element, mixture.rows ? mixture.rows * scores_stride - 2 : 0, random));
    one.sizes({mixture.hidden, mixture.width, mixture.experts, mixture.top_k, mixture.rows % 2, x_stride,
               scores_stride, mixture.hidden, format, 32, 32});
    one.call.out[1] = (void*)one.keep(Memory(mixture.rows * scratch_bytes(mixture, element)));
    // Each of two products in a row is summed in another order, and rounded in between.
    const double scale = std::sqrt((double)mixture.hidden * mixture.hidden * mixture.width);
    one.out(element, mixture.rows * mixture.hidden, last_place(element), 4 * scale);
    return one;
}

// A weight [N, K] in a format, in a call's inputs from `first` on.
inline void weigh(Case& one, int first, Element element, int64_t format, const Shape& shape,
                  Random& random) {
    if (format == DENSE) return one.in(first, packed_dense(element, shape, random));
    const bool four = format != INT8;
    Memory made = four ? codes(shape, 16, 0, random) : codes(shape, 9, -4, random);
    std::vector<Memory> packed =
        outputs_of(packing((int)(four ? Kernel::pack_int4 : Kernel::pack_int8), shape, std::move(made)), AVX2, 1);
    const int64_t many = up(shape.n, PANEL) * (four ? shape.k / 32 : 1);
    one.in(first, std::move(packed[0]));
    one.in(first + 1, positive(many, random));
    one.in(first + 2, four ? codes({0, many, 1}, 16, 0, random) : std::move(packed[1]));
}

inline std::vector<Case> moe(int kernel) {
    std::vector<Case> cases;
    Random random(21);
    for (const Mixture& m : MIXTURES)
        for (Element element : FLOATS)
            for (int64_t format : {DENSE, INT8, INT4, W4A16}) {
                if (format >= INT4 && (m.hidden % 32 || m.width % 32)) continue;
                Case one = mixing(kernel, m, element, format, random);
                weigh(one, 2, element, format, {0, m.experts * 2 * m.width, m.hidden}, random);
                weigh(one, 5, element, format, {0, m.experts * m.hidden, m.width}, random);
                cases.push_back(std::move(one));
            }
    return cases;
}

}  // namespace driver
