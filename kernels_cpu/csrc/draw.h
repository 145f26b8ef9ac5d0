// Drawing a token from each row of logits: min_p, top_k and top_p as a floor, then Gumbel-max. What
// it computes is defined by platforms/draw.py.
//
// A row is taken in spans whose largest logits are found first. Most spans of a vocabulary cannot
// hold what is looked for, and are not read again.
#pragma once
#include "philox.h"

namespace trimaran::ISA {

constexpr int64_t SPAN = 64;  // tokens
constexpr int64_t DIGIT = 11;  // bits of a key that are looked at together
constexpr float BANNED = -__builtin_inff();
// Logits as far below the largest weigh nothing in a float64 sum over a vocabulary.
constexpr float WEIGHTLESS = -50.0f;

// A row of logits, and what was asked for it. `largest`: of each span.
struct Row {
    const float* logits;
    int64_t size, spans, top_k;
    float most, temperature, top_p, min_p;
    NoiseKey key;
    float* largest;
    float* list;   // as long as the row
    double* sums;  // 2^DIGIT
};

INLINE float scaled(const Row& row, float x) { return (x - row.most) / row.temperature; }
INLINE vf scaled(const Row& row, vf x) { return (x - row.most) / row.temperature; }

// W logits from `at` on; those past the end can never be drawn.
INLINE vf logits_at(const Row& row, int64_t at) {
    if (at + W <= row.size) return load(row.logits + at);
    float part[W];
    for (int i = 0; i < W; i++) part[i] = at + i < row.size ? row.logits[at + i] : BANNED;
    return load(part);
}

// Finds the largest of each span and of the row; false if that is no number, or none is allowed.
static bool find_largest(Row& row) {
    vf most = splat(BANNED);
    vi odd = {};
    for (int64_t span = 0; span < row.spans; span++) {
        vf here = splat(BANNED);
        UNROLL for (int64_t i = 0; i < SPAN; i += W) {
            const vf x = logits_at(row, span * SPAN + i);
            here = max(x, here);
            odd |= x != x;
        }
        row.largest[span] = largest(here);
        most = max(here, most);
    }
    row.most = largest(most);
    return !any(odd) && row.most - row.most == 0;
}

// Calls body(values, first token) for every vector of scaled logits in spans that reach `least`.
template <class Body>
INLINE void for_spans(const Row& row, float least, Body body) {
    for (int64_t span = 0; span < row.spans; span++)
        if (scaled(row, row.largest[span]) >= least)
            for (int64_t at = span * SPAN; at < min((span + 1) * SPAN, row.size); at += W)
                body(scaled(row, logits_at(row, at)), at);
}

// The sum of e^x over all x >= floor.
static double mass(const Row& row, float floor) {
    double total = 0;
    for_spans(row, max(floor, WEIGHTLESS), [&](vf x, int64_t) __attribute__((always_inline)) {
        total += sum(select(x >= floor, vexp(x), zero()));
    });
    return total;
}
static double mass(const float* list, int64_t count, float floor) {
    double total = 0;
    for (int64_t i = 0; i < count; i++)
        if (list[i] >= floor) total += vexp(list[i]);
    return total;
}

// Scaled logits of at least `least`, into the row's list; returns how many.
static int64_t gather(const Row& row, float least) {
    int64_t count = 0;
    for_spans(row, least, [&](vf x, int64_t at) __attribute__((always_inline)) {
        const int64_t here = min((int64_t)W, row.size - at);
        if (!any(x >= least)) return;
        for (int64_t i = 0; i < here; i++) {
            row.list[count] = x[i];
            count += x[i] >= least;
        }
    });
    return count;
}

struct Counted {
    INLINE vf of(vf) { return splat(1.0f); }
};
struct Weighed {
    INLINE vf of(vf x) { return vexp(x); }
};

// Numbers at most 0 fall as their bits, without the sign, rise.
INLINE uint32_t key_of(float x) {
    uint32_t bits;
    __builtin_memcpy(&bits, &x, 4);
    return bits & 0x7fffffffu;
}

// The number at which the weights of those in the list, summed from the largest down, reach
// `target`; BANNED if they do not. The list is put into another order. By the digits of the keys:
// once it is known which first digit the number has, the others no longer matter.
template <class Weight>
static float reach(float* list, int64_t count, double target, double* sums) {
    double above = 0;  // the sum over all that are larger than those still looked at
    for (int shift = 31 - DIGIT;; shift = max((int64_t)shift - DIGIT, (int64_t)0)) {
        const uint32_t mask = (1u << DIGIT) - 1;
        __builtin_memset(sums, 0, sizeof(double) << DIGIT);
        for (int64_t i = 0; i < count; i += W) {
            const int64_t here = min((int64_t)W, count - i);
            const vf weights = Weight::of(here == W ? load(list + i) : load_part(list + i, here));
            for (int64_t j = 0; j < here; j++)
                sums[key_of(list[i + j]) >> shift & mask] += weights[j];
        }
        uint32_t digit = 0;
        while (digit <= mask && above + sums[digit] < target) above += sums[digit++];
        if (digit > mask) return BANNED;
        int64_t kept = 0;
        for (int64_t i = 0; i < count; i++) {
            const float x = list[i];
            if ((key_of(x) >> shift & mask) != digit) continue;
            list[i] = list[kept];
            list[kept++] = x;
        }
        count = kept;
        if (shift == 0) return list[0];
    }
}

// What a scaled logit has to reach to survive min_p, top_k and top_p.
static float floor_of(const Row& row) {
    float floor = __builtin_logf(row.min_p);
    const bool nucleus = row.top_p < 1;
    if (row.top_k == 0 && !nucleus) return floor;
    float least = floor;  // what is below decides nothing
    double total = 0;
    if (row.top_k > 0 && row.top_k <= row.spans) {
        // So many spans have a token as large as the top_k-th of their largest.
        for (int64_t span = 0; span < row.spans; span++)
            row.list[span] = scaled(row, row.largest[span]);
        const float kth = reach<Counted>(row.list, row.spans, (double)row.top_k, row.sums);
        least = max(kth, least);
    } else if (row.top_k == 0) {
        // All tokens below this together have not the share that top_p leaves out.
        total = mass(row, floor);
        const double left_out = (1.0 - (double)row.top_p) * total / (double)row.size;
        least = max(__builtin_logf((float)left_out) - 1e-3f, least);
    }
    const int64_t count = gather(row, least);
    if (row.top_k > 0 && row.top_k <= count) {
        floor = max(reach<Counted>(row.list, count, (double)row.top_k, row.sums), floor);
        total = mass(row.list, count, floor);
    }
    if (!nucleus) return floor;
    if (row.top_k > count) total = mass(row.list, count, floor);
    return max(reach<Weighed>(row.list, count, row.top_p * total, row.sums), floor);
}

// The best score so far; of equal ones the first token.
struct Choice {
    float score;
    int64_t token;
};

// Compares a span's tokens with the best so far. Only noise from uniform numbers below e^(span's
// largest - best) is large enough: 1 - e^-E < E for the others.
static void choose(const Row& row, float floor, int64_t span, Choice& best) {
    const float most = scaled(row, row.largest[span]);
    if (most < floor || most == BANNED || most + MAX_GUMBEL < best.score) return;
    const vf enough = vexp(splat(most - best.score)) * 1.0001f;
    const int64_t end = min((span + 1) * SPAN, row.size);
    for (int64_t first = span * SPAN; first < end; first += LANES * W) {
        const Words words = philox((uint32_t)(first / LANES), row.key);
        for (int lane = 0; lane < LANES; lane++) {
            const vf u = uniform(words.lane[lane]);
            const vi mask = u < enough;
            if (!any(mask)) continue;
            const vf noise = gumbel(u);
            for (int i = 0; i < W; i++) {
                const int64_t token = first + LANES * i + lane;
                if (!mask[i] || token >= end) continue;
                const float x = scaled(row, row.logits[token]), score = x + noise[i];
                if (x < floor || score < best.score) continue;
                if (score > best.score || token < best.token) best = {score, token};
            }
        }
    }
}

static int64_t draw_one(const Row& row, float floor) {
    int64_t top = 0;  // its span sets a bar that most others do not reach
    while (row.largest[top] != row.most) top++;
    Choice best = {BANNED, row.size};
    choose(row, floor, top, best);
    for (int64_t span = 0; span < row.spans; span++)
        if (span != top) choose(row, floor, span, best);
    return min(best.token, row.size - 1);
}

// in: logits f32 [rows, size], floats f32 [3, rows] (temperature, top_p, min_p), ints int64
// [5, rows] (top_k, halves of the seed, child index, position). out: tokens int64 [rows], floors
// f32 [rows]. n: size, row stride of logits, both strides of floats and of ints.
static void draw(const Call& call, const Team& team) {
    const int64_t* n = call.n;
    const float* floats = (const float*)call.in[1];
    const int64_t* ints = (const int64_t*)call.in[2];
    Row row;
    row.size = n[0];
    row.spans = (row.size + SPAN - 1) / SPAN;
    row.sums = (double*)team.scratch;
    row.largest = (float*)(row.sums + (1 << DIGIT));
    row.list = row.largest + row.spans;
    for (int64_t i; team.take_one(rows_of(call, team), i);) {
        row.logits = (const float*)call.in[0] + i * n[1];
        const auto asked = [&](int which) { return floats[which * n[2] + i * n[3]]; };
        const auto word = [&](int which) { return ints[which * n[4] + i * n[5]]; };
        row.temperature = asked(0);
        row.top_p = asked(1);
        row.min_p = asked(2);
        row.top_k = word(0);
        row.key = {(uint32_t)word(1), (uint32_t)word(2), (uint32_t)word(3), (uint32_t)word(4)};
        const bool drawn = find_largest(row);
        const float floor = drawn ? floor_of(row) : BANNED;
        ((float*)call.out[1])[i] = floor;
        ((int64_t*)call.out[0])[i] = drawn ? draw_one(row, floor) : 0;
    }
}

}  // namespace trimaran::ISA
