// The C ABI of the kernels: what Python fills in, and what every kernel is given.
//
// A program is an array of `Call`s, run in order by one team of threads; a barrier stands between
// two calls. One op alone is a program of one call. All addresses of a program stay the same from
// step to step: what changes is the number of tokens and the attention plans, which come with
// `run`.
#pragma once
#include <cstdint>

namespace trimaran {

// Raised with every change of `Call`, of what a kernel's arguments mean, or of a packed layout:
// Python refuses a library of another version. `VERSION` in kernels_cpu/library.py.
constexpr int32_t VERSION = 2;

// Python learns names and numbers from the library itself.
enum class Kernel : int32_t {
#define TRIMARAN_KERNEL(name) name,
#include "kernels.def"
#undef TRIMARAN_KERNEL
    count
};

enum class Element : int32_t { f32, bf16, f16, s8 };

// One call of one kernel. What `in`, `out`, `n` and `f` mean is said at each kernel. The rows it
// works on number `rows + tokens * rows_per_token`.
struct Call {
    int32_t kernel;
    int32_t element;  // of the activations
    int64_t rows;
    int64_t rows_per_token;
    const void* in[8];
    void* out[4];
    int64_t n[12];
    float f[4];
};

// What is the same for all calls of one run.
struct Run {
    int64_t tokens;
    const void* const* plans;  // of the attention of each cache group
    uint8_t* scratch;          // `scratch_bytes` for each thread, 64-byte aligned
    int64_t scratch_bytes;
    int32_t num_threads;
};

// What a thread's scratch memory has at least; `SCRATCH_BYTES` in kernels_cpu/library.py.
constexpr int64_t SCRATCH_BYTES = 2 << 20;

struct Range {
    int64_t begin, end;
};

constexpr int STAGES = 6;  // of a call, at most

// A thread's view of a run.
//
// Work is shared out by `take`, stage by stage: whoever asks gets the next piece of [0, size), large
// pieces first, so that a thread which the system has set aside holds up nobody for long. A stage
// ends when all of it is done, whoever did it: a thread that comes late finds nothing left and goes
// on. All threads name the same size and grain, and results may not depend on who takes what.
// Threads ahead may be in a later call already: a size is computed from what no other call writes, or
// all threads arrive once more (an empty stage) after they have computed it.
// `barrier` ends a stage within a call; a stage without `take` ends when all threads have arrived.
struct Team {
    const Run* run;
    int32_t thread;
    int32_t num_threads;
    uint8_t* scratch;
    void (*end_stage)(void*);
    bool (*take_piece)(void*, int64_t, int64_t, Range*);
    void* state;

    void barrier() const { end_stage(state); }
    bool take(int64_t size, Range& piece, int64_t grain = 1) const {
        return take_piece(state, size, grain, &piece);
    }
    // One unit at a time, for units of unequal cost.
    bool take_one(int64_t size, int64_t& unit) const {
        Range piece;
        const bool taken = take_piece(state, size, 0, &piece);
        unit = piece.begin;
        return taken;
    }
};

using KernelFn = void (*)(const Call&, const Team&);

inline int64_t rows_of(const Call& call, const Team& team) {
    return call.rows + call.rows_per_token * team.run->tokens;
}

// Part `index` of `count` nearly equal parts of [0, size), borders at multiples of `grain`.
inline Range part_of(int64_t size, int64_t index, int64_t count, int64_t grain = 1) {
    const int64_t grains = (size + grain - 1) / grain;
    const int64_t begin = grains * index / count * grain;
    const int64_t end = grains * (index + 1) / count * grain;
    return {begin < size ? begin : size, end < size ? end : size};
}

}  // namespace trimaran
