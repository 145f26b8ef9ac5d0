// Picking a token from each row of scores.
#pragma once
#include "math.h"

namespace trimaran::ISA {

// The largest score so far and the first place it stands at; a NaN is larger than all others.
struct Best {
    float score;
    int64_t at;
};

INLINE bool above(float x, float best) { return x > best || (x != x && best == best); }

constexpr int64_t SEARCHED = 2048;  // scores looked through again for the place of the largest

// The largest of `size` <= SEARCHED scores, any NaN first.
INLINE float largest_of(const float* scores, int64_t size) {
    constexpr float LEAST = -__builtin_inff();
    vf most[4] = {splat(LEAST), splat(LEAST), splat(LEAST), splat(LEAST)};
    vi odd[4] = {};
    int64_t i = 0;
    for (; i + 4 * W <= size; i += 4 * W)
        UNROLL for (int lane = 0; lane < 4; lane++) {
            const vf x = load(scores + i + lane * W);
            most[lane] = max(x, most[lane]);
            odd[lane] |= x != x;
        }
    const vi all = (odd[0] | odd[1]) | (odd[2] | odd[3]);
    float best = largest(max(max(most[0], most[1]), max(most[2], most[3])));
    for (int lane = 0; lane < W; lane++)
        if (all[lane]) best = __builtin_nanf("");
    for (; i < size; i++)
        if (above(scores[i], best)) best = scores[i];
    return best;
}

// The best of the scores [begin, end) of a row: a block's largest first, and its place only for
// the block that holds the best of all.
INLINE Best best_of(const float* scores, int64_t begin, int64_t end) {
    float best = -__builtin_inff();
    int64_t block = begin;
    for (int64_t at = begin; at < end && best == best; at += SEARCHED) {
        const float found = largest_of(scores + at, min(SEARCHED, end - at));
        if (!above(found, best)) continue;
        best = found;
        block = at;
    }
    for (int64_t i = block; i < min(block + SEARCHED, end); i++)
        if (scores[i] == best || (best != best && scores[i] != scores[i])) return {best, i};
    return {best, begin};
}

constexpr int64_t SECTIONS = 16;  // of a row, that threads share
constexpr int64_t SHARED_ROWS = 256;
static_assert(SHARED_ROWS * SECTIONS * sizeof(Best) <= SCRATCH_BYTES);

// in: scores f32 [rows, size]. out: int64 [rows], the first place of each row's largest. n: size,
// row stride. Threads share each of a few rows; of many, each row is one thread's.
static void sample(const Call& call, const Team& team) {
    const int64_t size = call.n[0], stride = call.n[1], rows = rows_of(call, team);
    const float* scores = (const float*)call.in[0];
    int64_t* out = (int64_t*)call.out[0];
    if (rows > SHARED_ROWS) {
        for (int64_t row; team.take_one(rows, row);)
            out[row] = best_of(scores + row * stride, 0, size).at;
        return;
    }
    Best* bests = (Best*)team.run->scratch;  // [rows, SECTIONS], of all threads
    const int64_t section = up((size + SECTIONS - 1) / SECTIONS, W);
    for (Range part; team.take(rows * SECTIONS, part);)
        for (int64_t i = part.begin; i < part.end; i++) {
            const int64_t first = min(i % SECTIONS * section, size);
            bests[i] = best_of(scores + i / SECTIONS * stride, first, min(first + section, size));
        }
    team.barrier();
    for (Range part; team.take(rows, part);)
        for (int64_t row = part.begin; row < part.end; row++) {
            Best best = bests[row * SECTIONS];
            for (int64_t i = 1; i < SECTIONS; i++) {
                const Best other = bests[row * SECTIONS + i];
                if (above(other.score, best.score)) best = other;
            }
            out[row] = best.at;
        }
}

}  // namespace trimaran::ISA
