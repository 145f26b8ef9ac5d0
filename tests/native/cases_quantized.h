// Cases of the linear layers with weights in 8 and 4 bits: integers are summed exactly, so every
// instruction set gives the same numbers.
#pragma once
#include "cases_linear.h"

namespace driver {

constexpr int64_t DEPTH = 64;
constexpr Shape CODED[] = {{0, 32, 64},  {1, 1, 64},   {1, 70, 64},   {2, 33, 128},  {4, 96, 512},
                           {5, 64, 64},  {7, 31, 192}, {16, 64, 512}, {17, 40, 576}, {33, 96, 1088},
                           {50, 32, 64}, {147, 64, 576}, {300, 33, 2080}};

// Inputs that share a scale of int4: parts of a tile of AMX, whole ones, more than a chunk of K.
inline int64_t group_of(const Shape& shape) {
    return shape.rows % 3 == 0 ? shape.k : shape.k % 128 == 0 ? 128 : 32;
}

inline Memory codes(const Shape& shape, int64_t range, int64_t least, Random& random) {
    Memory made(shape.n * shape.k);
    for (int64_t i = 0; i < made.bytes(); i++) ((int8_t*)made.at())[i] = random.below(range) + least;
    return made;
}

// A case of `kernel`, which packs [N, K].
inline Case packing(int kernel, const Shape& shape, Memory codes) {
    Case one(kernel, Element::s8, 0, "[" + std::to_string(shape.n) + ", " + std::to_string(shape.k) + "]");
    const int64_t filled = up(shape.n, PANEL);
    const bool four = kernel == (int)Kernel::pack_int4;
    one.in(0, std::move(codes));
    one.sizes({shape.n, shape.k, shape.k});
    one.out_exact(four ? filled * shape.k / 2 : filled * up(shape.k, DEPTH));
    if (!four) one.out_exact(filled * 4);
    return one;
}

inline std::vector<Case> pack_int8(int kernel) {
    std::vector<Case> cases;
    Random random(11);
    for (const Shape& shape : CODED) cases.push_back(packing(kernel, shape, codes(shape, 255, -127, random)));
    for (const Shape& shape : SHAPES) cases.push_back(packing(kernel, shape, codes(shape, 255, -127, random)));
    return cases;
}

inline std::vector<Case> pack_int4(int kernel) {
    std::vector<Case> cases;
    Random random(12);
    for (const Shape& shape : CODED) cases.push_back(packing(kernel, shape, codes(shape, 16, 0, random)));
    return cases;
}

inline Memory positive(int64_t count, Random& random) {
    Memory made = numbers(Element::f32, count, random);
    for (int64_t i = 0; i < count; i++) {
        float& x = ((float*)made.at())[i];
        x = 0.001f + 0.01f * std::fabs(x);
    }
    return made;
}

// x, bias, sizes and output of a product.
inline void complete(Case& one, Element element, const Shape& shape, Random& random, Values values) {
    const int64_t x_stride = shape.k + 5, y_stride = shape.n + 1;
    one.in(0, numbers(element, shape.rows ? shape.rows * x_stride - 5 : 0, random, values));
    if (shape.rows % 2) one.in(4, numbers(element, shape.n, random));
    one.sizes({shape.n, shape.k, x_stride, y_stride, group_of(shape)});
    one.out(element, shape.rows ? shape.rows * y_stride - 1 : 0, 0);
}

template <class Weight>
std::vector<Case> products(int kernel, const std::vector<Shape>& shapes, Random& random, Weight weight) {
    std::vector<Case> cases;
    for (const Shape& shape : shapes)
        for (Element element : FLOATS)
            for (Values values : {Values::ordinary, Values::edges, Values::zeros}) {
                Case one(kernel, element, shape.rows,
                         "[" + std::to_string(shape.n) + ", " + std::to_string(shape.k) + "]");
                weight(one, shape);
                complete(one, element, shape, random, values);
                cases.push_back(std::move(one));
            }
    return cases;
}

inline std::vector<Case> linear_int8(int kernel) {
    Random random(13);
    std::vector<Shape> shapes(std::begin(CODED), std::end(CODED));
    shapes.insert(shapes.end(), std::begin(SHAPES), std::end(SHAPES));
    return products(kernel, shapes, random, [&](Case& one, const Shape& shape) {
        std::vector<Memory> packed = outputs_of(
            packing((int)Kernel::pack_int8, shape, codes(shape, 255, -127, random)), AVX2, 1);
        one.in(1, std::move(packed[0]));
        one.in(2, positive(up(shape.n, PANEL), random));
        one.in(3, std::move(packed[1]));
    });
}

inline std::vector<Case> linear_int4(int kernel) {
    Random random(14);
    return products(kernel, {std::begin(CODED), std::end(CODED)}, random, [&](Case& one, const Shape& shape) {
        const int64_t many = up(shape.n, PANEL) * shape.k / group_of(shape);
        one.in(1, std::move(outputs_of(packing((int)Kernel::pack_int4, shape, codes(shape, 16, 0, random)),
                                       AVX2, 1)[0]));
        one.in(2, positive(many, random));
        one.in(3, codes({0, many, 1}, 16, 0, random));
    });
}

}  // namespace driver
