// Drawing a token from each row of logits: min_p, top_k and top_p as a floor, then Gumbel-max. What
// it computes is defined by platforms/draw.py.
//
// A row is taken in spans whose largest logits are found first. Most spans of a vocabulary cannot
// hold what is looked for, and are not read again.
#pragma once
#include "philox.h"
#include "sample.h"

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

INLINE int64_t spans_of(const Call& call) { return (call.n[0] + SPAN - 1) / SPAN; }

INLINE float scaled(const Row& row, float x) { return (x - row.most) / row.temperature; }
INLINE vf scaled(const Row& row, vf x) { return (x - row.most) / row.temperature; }

// W logits from `at` on; those past the end can never be drawn.
INLINE vf logits_at(const Row& row, int64_t at) {
    if (at + W <= row.size) return load(row.logits + at);
    float part[W];
    for (int i = 0; i < W; i++) part[i] = at + i < row.size ? row.logits[at + i] : BANNED;
    return load(part);
}

// Finds the largest of each of some spans, and of all of them; NaN if any is NaN.
static float find_largest(const Row& row, Range spans) {
    vf most = splat(BANNED);
    vi odd = {};
    for (int64_t span = spans.begin; span < spans.end; span++) {
        vf here = splat(BANNED);
        UNROLL for (int64_t i = 0; i < SPAN; i += W) {
            const vf x = logits_at(row, span * SPAN + i);
            here = max(x, here);
            odd |= x != x;
        }
        row.largest[span] = largest(here);
        most = max(here, most);
    }
    return any(odd) ? __builtin_nanf("") : largest(most);
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
INLINE void better(Choice& best, Choice other) {
    const bool first = other.score == best.score && other.token < best.token;
    if (other.score > best.score || first) best = other;
}

// Compares a span's tokens with the best so far. Only noise from uniform numbers below e^(span's
// largest - best) is large enough, because u < E for all of them; and those are known by their bits.
static void choose(const Row& row, float floor, int64_t span, Choice& best) {
    const float most = scaled(row, row.largest[span]);
    if (most < floor || most == BANNED || most + MAX_GUMBEL < best.score) return;
    const float enough = vexp(most - best.score) * 1.0001f;
    const uint32_t bits = enough < 0.999f ? (uint32_t)(enough * 0x1p32f) + 1 : 0xffffffffu;
    const vi limit = (int32_t)(bits ^ 0x80000000u) - vi{};
    const int64_t end = min((span + 1) * SPAN, row.size);
    for (int64_t first = span * SPAN; first < end; first += LANES * W) {
        const Words words = philox((uint32_t)(first / LANES), row.key);
        vi masks[LANES], together = {};
        UNROLL for (int lane = 0; lane < LANES; lane++)
            together |= masks[lane] = (vi)(words.lane[lane] ^ 0x80000000u) <= limit;
        if (!any(together)) continue;
        for (int lane = 0; lane < LANES; lane++) {
            if (!any(masks[lane])) continue;
            const vf noise = gumbel(uniform(words.lane[lane]));
            for (int i = 0; i < W; i++) {
                const int64_t token = first + LANES * i + lane;
                if (!masks[lane][i] || token >= end) continue;
                const float x = scaled(row, row.logits[token]);
                if (x >= floor) better(best, {x + noise[i], token});
            }
        }
    }
}

// The score of the row's largest logit: a bar that most spans do not reach.
static Choice bar_of(const Row& row, float floor) {
    int64_t span = 0;
    while (row.largest[span] != row.most) span++;
    Choice best = {BANNED, row.size - 1};
    choose(row, floor, span, best);
    return best;
}

// Row `i` of a call. Its spans' largest are kept at `largest`; the rest of the scratch memory is for
// one row at a time.
static Row row_of(const Call& call, int64_t i, float* largest, uint8_t* scratch) {
    const int64_t* n = call.n;
    const auto asked = [&](int64_t which) {
        return ((const float*)call.in[1])[which * n[2] + i * n[3]];
    };
    const auto word = [&](int64_t which) {
        return ((const int64_t*)call.in[2])[which * n[4] + i * n[5]];
    };
    Row row;
    row.logits = (const float*)call.in[0] + i * n[1];
    row.size = n[0];
    row.spans = spans_of(call);
    row.temperature = asked(0);
    row.top_p = asked(1);
    row.min_p = asked(2);
    row.top_k = word(0);
    row.key = {(uint32_t)word(1), (uint32_t)word(2), (uint32_t)word(3), (uint32_t)word(4)};
    row.largest = largest;
    row.sums = (double*)scratch;
    row.list = (float*)(row.sums + (1 << DIGIT));
    return row;
}

// Many rows: each is one thread's.
static void draw_rows(const Call& call, const Team& team) {
    float* largest = (float*)team.scratch;
    uint8_t* rest = team.scratch + up(spans_of(call) * sizeof(float), 64);
    for (int64_t i; team.take_one(rows_of(call, team), i);) {
        Row row = row_of(call, i, largest, rest);
        row.most = find_largest(row, {0, row.spans});
        Choice best = {0, 0};
        float floor = BANNED;
        if (row.most - row.most == 0) {
            floor = floor_of(row);
            best = bar_of(row, floor);
            for (int64_t span = 0; span < row.spans; span++) choose(row, floor, span, best);
        }
        ((float*)call.out[1])[i] = floor;
        ((int64_t*)call.out[0])[i] = best.token;
    }
}

// What the threads know of a row that they share; its spans' largest follow.
struct Together {
    float most[SECTIONS];
    Choice best[SECTIONS];
    float largest, floor;
    Choice bar;
};

// A few rows: threads share each of them, except for its floor.
static void draw_together(const Call& call, const Team& team) {
    const int64_t rows = rows_of(call, team), spans = spans_of(call);
    const int64_t bytes = up(sizeof(Together) + spans * sizeof(float), 64);
    uint8_t* rest = team.scratch + (team.thread ? 0 : rows * bytes);
    const auto together = [&](int64_t i) { return (Together*)(team.run->scratch + i * bytes); };
    const auto row_at = [&](int64_t i) { return row_of(call, i, (float*)(together(i) + 1), rest); };
    for (int64_t unit; team.take_one(rows * SECTIONS, unit);) {
        const int64_t i = unit / SECTIONS, section = unit % SECTIONS;
        together(i)->most[section] = find_largest(row_at(i), part_of(spans, section, SECTIONS));
    }
    team.barrier();
    for (int64_t i; team.take_one(rows, i);) {
        Together& known = *together(i);
        Row row = row_at(i);
        row.most = known.most[0];
        for (int64_t section = 1; section < SECTIONS; section++)
            if (above(known.most[section], row.most)) row.most = known.most[section];
        known.largest = row.most;
        const bool finite = row.most - row.most == 0;
        known.floor = finite ? floor_of(row) : BANNED;
        known.bar = finite ? bar_of(row, known.floor) : Choice{0, 0};
        ((float*)call.out[1])[i] = known.floor;
    }
    team.barrier();
    for (int64_t unit; team.take_one(rows * SECTIONS, unit);) {
        const int64_t i = unit / SECTIONS;
        Together& known = *together(i);
        Row row = row_at(i);
        row.most = known.largest;
        Choice best = known.bar;
        const Range part = part_of(spans, unit % SECTIONS, SECTIONS);
        if (row.most - row.most == 0)
            for (int64_t span = part.begin; span < part.end; span++)
                choose(row, known.floor, span, best);
        known.best[unit % SECTIONS] = best;
    }
    team.barrier();
    for (int64_t i; team.take_one(rows, i);) {
        Choice best = together(i)->bar;
        for (const Choice& other : together(i)->best) better(best, other);
        ((int64_t*)call.out[0])[i] = best.token;
    }
}

constexpr int64_t FEW_ROWS = 16;

// in: logits f32 [rows, size], floats f32 [3, rows] (temperature, top_p, min_p), ints int64
// [5, rows] (top_k, halves of the seed, child index, position). out: tokens int64 [rows], floors
// f32 [rows]. n: size, row stride of logits, both strides of floats and of ints. Scratch memory: 5
// bytes a token and 32 KiB.
static void draw(const Call& call, const Team& team) {
    if (rows_of(call, team) > FEW_ROWS || team.num_threads == 1) return draw_rows(call, team);
    draw_together(call, team);
}

}  // namespace trimaran::ISA
