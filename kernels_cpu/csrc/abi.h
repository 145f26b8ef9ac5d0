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
constexpr int32_t VERSION = 1;

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

// A thread's view of a run. `next` hands out work items of the current call to whichever thread
// asks first; kernels that use it give the same results whoever takes which item.
struct Team {
    const Run* run;
    int32_t thread;
    int32_t num_threads;
    uint8_t* scratch;
    void (*barrier)(void*);
    int64_t (*next)(void*);
    void* state;
};

using KernelFn = void (*)(const Call&, const Team&);

inline int64_t rows_of(const Call& call, const Team& team) {
    return call.rows + call.rows_per_token * team.run->tokens;
}

struct Range {
    int64_t begin, end;
};

// Part `index` of `count` nearly equal parts of [0, size), borders at multiples of `grain`.
inline Range part_of(int64_t size, int64_t index, int64_t count, int64_t grain = 1) {
    const int64_t grains = (size + grain - 1) / grain;
    const int64_t begin = grains * index / count * grain;
    const int64_t end = grains * (index + 1) / count * grain;
    return {begin < size ? begin : size, end < size ? end : size};
}

}  // namespace trimaran
