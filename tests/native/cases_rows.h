// Cases of what is done row by row: sums, activations, norms, rope, copies, and picking tokens.
#pragma once
#include "cases_linear.h"

namespace driver {

constexpr int64_t SIZES[] = {1, 7, 33, 64, 1030};
constexpr int64_t ROWS[] = {0, 1, 17};
constexpr int64_t GAP = 3;  // elements between rows

inline int64_t span(int64_t rows, int64_t size) { return rows ? rows * (size + GAP) - GAP : 0; }

// Calls body(case, element, rows, size, random, values) for all sizes; it completes the case.
template <class Body>
std::vector<Case> over_sizes(int kernel, uint64_t seed, Body body) {
    std::vector<Case> cases;
    Random random(seed);
    for (Element element : FLOATS)
        for (int64_t size : SIZES)
            for (int64_t rows : ROWS)
                for (Values values : {Values::ordinary, Values::edges, Values::zeros}) {
                    Case one(kernel, element, rows, std::to_string(size) + " wide");
                    body(one, element, rows, size, random, values);
                    cases.push_back(std::move(one));
                }
    return cases;
}

inline double scale_of(Values values) { return values == Values::edges ? 1e5 : 1; }

inline std::vector<Case> add(int kernel) {
    return over_sizes(kernel, 3, [](Case& one, Element element, int64_t rows, int64_t size,
                                    Random& random, Values values) {
        one.in(0, numbers(element, span(rows, size), random, values));
        one.in(1, numbers(element, span(rows, size), random));
        one.sizes({size, size + GAP, size + GAP, size + GAP});
        one.out_exact(span(rows, size) * bytes_of(element));
    });
}

inline std::vector<Case> gated(int kernel) {
    return over_sizes(kernel, 4, [](Case& one, Element element, int64_t rows, int64_t size,
                                    Random& random, Values values) {
        one.in(0, numbers(element, span(rows, 2 * size), random, values));
        one.sizes({size, 2 * size + GAP, size + GAP});
        one.out(element, span(rows, size), 2 * last_place(element), 1e-3);
    });
}

// Some ids, one below 0 and one too large among them: int32 for `edges`.
inline Memory ids(int64_t rows, int64_t entries, Random& random, Values values) {
    std::vector<int64_t> wide;
    for (int64_t row = 0; row < rows; row++) wide.push_back(random.below(entries + 2) - 1);
    const std::vector<int32_t> narrow(wide.begin(), wide.end());
    return values == Values::edges ? listed(narrow) : listed(wide);
}

inline std::vector<Case> take_packed_rows(int kernel) {
    return over_sizes(kernel, 12, [](Case& one, Element element, int64_t rows, int64_t size,
                                     Random& random, Values values) {
        const int64_t entries = 43;
        one.in(0, ids(rows, entries, random, values));
        one.in(1, packed_dense(element, {0, entries, size}, random));
        one.sizes({size, entries, values == Values::edges ? 4 : 8, 1, size + GAP});
        one.out_exact(span(rows, size) * bytes_of(element));
    });
}

inline std::vector<Case> take_rows(int kernel) {
    return over_sizes(kernel, 5, [](Case& one, Element element, int64_t rows, int64_t size,
                                    Random& random, Values values) {
        const int64_t entries = 11;
        one.in(0, ids(rows, entries, random, values));
        one.in(1, numbers(element, span(entries, size), random, values));
        one.sizes({size, entries, values == Values::edges ? 4 : 8, 1, size + GAP, size + GAP});
        one.out_exact(span(rows, size) * bytes_of(element));
    });
}

inline std::vector<Case> rms_norm(int kernel) {
    return over_sizes(kernel, 6, [](Case& one, Element element, int64_t rows, int64_t size,
                                    Random& random, Values values) {
        const int64_t groups = rows % 2 ? 3 : 1;
        one.in(0, numbers(element, span(rows, groups * size), random, values));
        one.in(1, numbers(element, size, random));
        one.sizes({size, groups, groups * size + GAP, groups * size + GAP});
        one.call.f[0] = 1e-6f;
        one.out(element, span(rows, groups * size), 2 * last_place(element), 1e-2);
    });
}

inline std::vector<Case> add_rms_norm(int kernel) {
    return over_sizes(kernel, 7, [](Case& one, Element element, int64_t rows, int64_t size,
                                    Random& random, Values values) {
        one.in(0, numbers(element, span(rows, size), random, values));
        one.in(1, numbers(element, span(rows, size), random));
        one.in(2, numbers(element, size, random));
        one.sizes({size, size + GAP, size + GAP, size + GAP, size + GAP});
        one.call.f[0] = 1e-6f;
        one.out(element, span(rows, size), 2 * last_place(element), 1e-2);
        one.out_exact(span(rows, size) * bytes_of(element));
    });
}

struct Heads {
    int64_t heads, kv_heads, dim, rotary;
};
constexpr Heads HEADS[] = {{4, 2, 64, 64}, {3, 1, 80, 80}, {2, 2, 128, 32}, {1, 1, 6, 2}};

inline std::vector<Case> rope(int kernel) {
    std::vector<Case> cases;
    Random random(8);
    const int64_t entries = 50;
    for (Element element : FLOATS)
        for (const Heads& h : HEADS)
            for (int64_t rows : ROWS)
                for (Values values : {Values::ordinary, Values::edges}) {
                    Case one(kernel, element, rows, std::to_string(h.heads) + " heads of " + std::to_string(h.dim));
                    const int64_t query = h.heads * h.dim, key = h.kv_heads * h.dim;
                    std::vector<int64_t> positions;
                    for (int64_t i = 0; i < rows; i++) positions.push_back(random.below(entries));
                    one.in(0, numbers(element, span(rows, query), random, values));
                    one.in(1, numbers(element, span(rows, key), random, values));
                    one.in(2, listed(positions));
                    one.in(3, numbers(Element::f32, entries * h.rotary, random));
                    if (kernel == (int)Kernel::qk_norm_rope) {
                        one.in(4, numbers(element, h.dim, random));
                        one.in(5, numbers(element, h.dim, random));
                    }
                    one.sizes({h.heads, h.kv_heads, h.dim, h.rotary, query + GAP, key + GAP, 1,
                               h.rotary, query + GAP, key + GAP});
                    one.call.f[0] = one.call.f[1] = 1e-6f;
                    for (int64_t size : {query, key})
                        one.out(element, span(rows, size), 2 * last_place(element), 4 * scale_of(values));
                    cases.push_back(std::move(one));
                }
    return cases;
}

inline Memory logits(int64_t rows, int64_t size, Random& random, Values values) {
    Memory made = numbers(Element::f32, span(rows, size), random, values);
    float* at = (float*)made.at();
    for (int64_t row = 0; row < rows && values == Values::ordinary; row++)
        for (int64_t i = 0; i < size; i += 5) at[row * (size + GAP) + i] = -INFINITY;  // masked
    return made;
}

inline std::vector<Case> sample(int kernel) {
    std::vector<Case> cases;
    Random random(9);
    for (int64_t size : {1, 5, 64, 1000, 5001})
        for (int64_t rows : {0, 1, 3, 300})
            for (Values values : {Values::ordinary, Values::edges, Values::zeros}) {
                Case one(kernel, Element::f32, rows, std::to_string(size) + " scores");
                one.in(0, logits(rows, size, random, values));
                one.sizes({size, size + GAP});
                one.out_exact(rows * 8);
                cases.push_back(std::move(one));
            }
    return cases;
}

// top_k, top_p and min_p in turn, alone and together.
inline std::vector<Case> draw(int kernel) {
    std::vector<Case> cases;
    Random random(10);
    for (int64_t size : {1, 5, 64, 1000, 5001})
        for (int64_t rows : {0, 1, 9})
            for (Values values : {Values::ordinary, Values::edges, Values::zeros}) {
                Case one(kernel, Element::f32, rows, std::to_string(size) + " scores");
                std::vector<float> floats(3 * rows);
                std::vector<int64_t> ints(5 * rows);
                for (int64_t i = 0; i < rows; i++) {
                    floats[i] = 0.3f + random.uniform();
                    floats[rows + i] = i % 2 ? 0.3f + 0.6f * random.uniform() : 1;
                    floats[2 * rows + i] = i % 3 ? 0 : 0.1f * random.uniform();
                    ints[i] = i % 4 == 1 ? 1 + random.below(50) : 0;
                    for (int word = 1; word < 5; word++) ints[word * rows + i] = random.bits();
                }
                one.in(0, logits(rows, size, random, values));
                one.in(1, listed(floats));
                one.in(2, listed(ints));
                one.sizes({size, size + GAP, rows, 1, rows, 1});
                one.out_exact(rows * 8);
                one.out(Element::f32, rows, 1e-5);
                cases.push_back(std::move(one));
            }
    return cases;
}

}  // namespace driver
