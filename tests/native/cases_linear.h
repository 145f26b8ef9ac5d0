// Cases of the linear layers.
#pragma once
#include "harness.h"

namespace driver {

constexpr int64_t PANEL = 32;

struct Shape {
    int64_t rows, n, k;
};
// Around the edges of vectors, panels, tiles of rows and of AMX, chunks of K, and blocks.
constexpr Shape SHAPES[] = {{0, 32, 32},  {1, 1, 1},     {1, 70, 64},  {2, 33, 63},   {4, 96, 520},
                            {5, 64, 7},   {7, 31, 100},  {12, 32, 32}, {16, 64, 512}, {17, 40, 544},
                            {24, 65, 33}, {33, 96, 1056}, {50, 32, 1},  {147, 64, 515}, {1290, 33, 64}};
constexpr Element FLOATS[] = {Element::f32, Element::bf16, Element::f16};

inline Memory packed_dense(Element element, const Shape& shape, Random& random) {
    const Memory weight = numbers(element, shape.n * shape.k, random);
    const int64_t depth = element == Element::bf16 ? up(shape.k, 2) : shape.k;
    Memory packed(up(shape.n, PANEL) * depth * bytes_of(element));
    Call call{};
    call.kernel = (int32_t)Kernel::pack_dense;
    call.element = (int32_t)element;
    call.in[0] = weight.at();
    call.out[0] = packed.at();
    call.n[0] = shape.n, call.n[1] = shape.k, call.n[2] = shape.k;
    run(call, AVX2, 1);
    return packed;
}

inline std::vector<Case> pack_dense(int kernel) {
    std::vector<Case> cases;
    Random random(1);
    for (const Shape& shape : SHAPES)
        for (Element element : FLOATS) {
            Case one(kernel, element, 0, "[" + std::to_string(shape.n) + ", " + std::to_string(shape.k) + "]");
            const int64_t stride = shape.k + 3;
            const int64_t depth = element == Element::bf16 ? up(shape.k, 2) : shape.k;
            one.in(0, numbers(element, shape.n * stride - 3, random, Values::edges));
            one.sizes({shape.n, shape.k, stride});
            one.out_exact(up(shape.n, PANEL) * depth * bytes_of(element));
            cases.push_back(std::move(one));
        }
    return cases;
}

inline std::vector<Case> linear_dense(int kernel) {
    std::vector<Case> cases;
    Random random(2);
    for (const Shape& shape : SHAPES)
        for (Element element : FLOATS)
            for (Values values : {Values::ordinary, Values::edges}) {
                Case one(kernel, element, shape.rows,
                         "[" + std::to_string(shape.n) + ", " + std::to_string(shape.k) + "]");
                const int64_t x_stride = shape.k + 5, y_stride = shape.n + 1;
                one.in(0, numbers(element, shape.rows ? shape.rows * x_stride - 5 : 0, random, values));
                one.in(1, packed_dense(element, shape, random));
                if (shape.rows % 2) one.in(2, numbers(element, shape.n, random));
                one.sizes({shape.n, shape.k, x_stride, y_stride});
                const double scale = values == Values::edges ? 4e4 : std::sqrt((double)shape.k);
                one.out(element, shape.rows ? shape.rows * y_stride - 1 : 0, last_place(element), scale);
                cases.push_back(std::move(one));
            }
    return cases;
}

}  // namespace driver
