// The library's entry points: which instruction sets this processor has, and running programs.
//
// Compiled for plain x86-64. Built with -fopenmp but linked without it: the symbols are those of
// the OpenMP runtime that torch has loaded, so that kernels and torch share one pool of threads.
#include <cpuid.h>
#include <immintrin.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "abi.h"

extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace trimaran {

namespace avx2 { extern const KernelFn TABLE[]; }
namespace avx512 { extern const KernelFn TABLE[]; }
namespace avx512_bf16 { extern const KernelFn TABLE[]; }
namespace amx {
extern const KernelFn TABLE[];
extern int64_t tile_uses;
}

namespace {

// In the order of `ISAS` in kernels_cpu/library.py.
enum Isa { AVX2 = 1, AVX512, AVX512_BF16, AMX };

const KernelFn* const TABLES[] = {nullptr, avx2::TABLE, avx512::TABLE, avx512_bf16::TABLE,
                                  amx::TABLE};

constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18;
constexpr uint64_t AVX_STATE = 0x6, AVX512_STATE = 0xe6, TILE_STATE = 0x60000;

uint64_t enabled_state() {
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (uint64_t)high << 32 | low;
}

#ifdef TRIMARAN_EMULATED
constexpr int EMULATED = 1;
#else
constexpr int EMULATED = 0;
#endif

int detect() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const unsigned osxsave = 1u << 27, fma = 1u << 12, f16c = 1u << 29;
    if (~c & (osxsave | fma | f16c)) return 0;
    const uint64_t state = enabled_state();
    if (~state & AVX_STATE || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    if (~b & 1u << 5) return 0;  // AVX2
    if (EMULATED) return AMX;    // all of them are compiled for AVX2
    const unsigned wide = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
    if (~b & wide || ~state & AVX512_STATE) return AVX2;
    const bool vnni = c & 1u << 11, amx = d & 1u << 24 && d & 1u << 25 && d & 1u << 22;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d)) return AVX512;
    if (~a & 1u << 5 || !vnni) return AVX512;  // AVX512_BF16
    if (!amx || ~state & TILE_STATE) return AVX512_BF16;
    const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
    return granted ? AMX : AVX512_BF16;
}

// Spins for some microseconds, which is what a barrier between two kernels takes, and then sleeps:
// the cores may be shared with others.
constexpr int SPINS = 4000;

struct Barrier {
    int32_t arrived;
    int32_t round;
    int32_t sleeping;
};

void wait_at(Barrier& barrier, int size) {
    const int32_t round = __atomic_load_n(&barrier.round, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&barrier.arrived, 1, __ATOMIC_ACQ_REL) == size) {
        __atomic_store_n(&barrier.arrived, 0, __ATOMIC_RELAXED);
        __atomic_store_n(&barrier.round, round + 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&barrier.sleeping, __ATOMIC_SEQ_CST))
            syscall(SYS_futex, &barrier.round, FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (__atomic_load_n(&barrier.round, __ATOMIC_ACQUIRE) != round) return;
        _mm_pause();
    }
    __atomic_add_fetch(&barrier.sleeping, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&barrier.round, __ATOMIC_SEQ_CST) == round)
        syscall(SYS_futex, &barrier.round, FUTEX_WAIT_PRIVATE, round, nullptr, nullptr, 0);
    __atomic_sub_fetch(&barrier.sleeping, 1, __ATOMIC_SEQ_CST);
}

// A stage of the run: pieces that were taken, and units of work that are done.
struct Stage {
    int64_t taken;
    int64_t done;
};

// Shared by the threads of one run.
struct Shared {
    alignas(64) Barrier barrier;
    alignas(64) int32_t sleeping;  // threads that wait for the end of a stage
    Stage* stages;
};

struct Worker {
    Shared* shared;
    int num_threads;
    int stage;
    int64_t size;  // of the work of this stage; -1: nothing was asked for
    int64_t held;  // units of the piece in work
};

// Piece `index` of [0, size): in each round every thread's piece is its share of half of what is
// left, a grain at least. Grain 0: single units.
Range piece_of(int64_t size, int64_t grain, int64_t num_threads, int64_t index) {
    if (grain == 0) return {index < size ? index : size, index < size ? index + 1 : size};
    int64_t left = (size + grain - 1) / grain, begin = 0, length = 1;
    for (;; index -= num_threads, begin += num_threads * length, left -= num_threads * length) {
        length = left / (2 * num_threads);
        if (length == 0) length = 1;
        if (index < num_threads || left <= 0) break;
    }
    begin = (begin + index * length) * grain;
    const int64_t end = begin + length * grain;
    return {begin < size ? begin : size, end < size ? end : size};
}

int32_t* word_of(int64_t* value) { return (int32_t*)value; }

void finish_piece(Worker& worker) {
    if (!worker.held) return;
    Stage& stage = worker.shared->stages[worker.stage];
    const int64_t done = __atomic_add_fetch(&stage.done, worker.held, __ATOMIC_SEQ_CST);
    worker.held = 0;
    if (done == worker.size && __atomic_load_n(&worker.shared->sleeping, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, word_of(&stage.done), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

bool take_piece(void* state, int64_t size, int64_t grain, Range* piece) {
    Worker& worker = *(Worker*)state;
    worker.size = size;
    finish_piece(worker);
    Stage& stage = worker.shared->stages[worker.stage];
    const int64_t index = __atomic_fetch_add(&stage.taken, 1, __ATOMIC_RELAXED);
    *piece = piece_of(size, grain, worker.num_threads, index);
    worker.held = piece->end - piece->begin;
    return worker.held > 0;
}

void wait_for(Stage& stage, int64_t size, int32_t& sleeping) {
    for (int i = 0; i < SPINS; i++) {
        if (__atomic_load_n(&stage.done, __ATOMIC_ACQUIRE) == size) return;
        _mm_pause();
    }
    __atomic_add_fetch(&sleeping, 1, __ATOMIC_SEQ_CST);
    for (int64_t done; (done = __atomic_load_n(&stage.done, __ATOMIC_SEQ_CST)) != size;)
        syscall(SYS_futex, word_of(&stage.done), FUTEX_WAIT_PRIVATE, (int32_t)done, nullptr, nullptr, 0);
    __atomic_sub_fetch(&sleeping, 1, __ATOMIC_SEQ_CST);
}

void end_stage(void* state) {
    Worker& worker = *(Worker*)state;
    if (worker.size < 0) {
        wait_at(worker.shared->barrier, worker.num_threads);
    } else {
        finish_piece(worker);
        wait_for(worker.shared->stages[worker.stage], worker.size, worker.shared->sleeping);
    }
    worker.stage++;
    worker.size = -1;
}

// Calls of each kernel by each instruction set, for tests of which one ran.
int64_t counts[AMX + 1][(int)Kernel::count];

void work(const Call* calls, int count, const Run& run, int isa, int thread, int num_threads,
          Shared& shared) {
    Worker worker{&shared, num_threads, 0, -1, 0};
    const Team team{&run,      thread,     num_threads, run.scratch + thread * run.scratch_bytes,
                    end_stage, take_piece, &worker};
    for (int i = 0; i < count; i++) {
        TABLES[isa][calls[i].kernel](calls[i], team);
        if (thread == 0)
            __atomic_fetch_add(&counts[isa][calls[i].kernel], 1, __ATOMIC_RELAXED);
        end_stage(&worker);
        worker.stage = (i + 1) * STAGES;
    }
}

}  // namespace
}  // namespace trimaran

using namespace trimaran;

// The best instruction set of this processor that the kernels know (0: none).
EXPORT int trimaran_isa() { return detect(); }

EXPORT const char* trimaran_kernel_name(int kernel) {
    static const char* const names[] = {
#define TRIMARAN_KERNEL(name) #name,
#include "kernels.def"
#undef TRIMARAN_KERNEL
    };
    return kernel >= 0 && kernel < (int)Kernel::count ? names[kernel] : nullptr;
}

EXPORT int64_t trimaran_call_bytes() { return sizeof(Call); }
EXPORT int trimaran_version() { return VERSION; }

// Whether the wide instruction sets are emulated: as right, but much slower. For tests.
EXPORT int trimaran_emulated() { return EMULATED; }

// How often the library has run a kernel by an instruction set.
EXPORT int64_t trimaran_count(int isa, int kernel) {
    return __atomic_load_n(&counts[isa][kernel], __ATOMIC_RELAXED);
}

// How often kernels have configured AMX tiles.
EXPORT int64_t trimaran_tile_uses() { return __atomic_load_n(&amx::tile_uses, __ATOMIC_RELAXED); }

// Runs `count` calls with `run->num_threads` threads and the kernels of `isa`, which must not be
// above `trimaran_isa()`.
EXPORT void trimaran_run(const Call* calls, int count, const Run* run, int isa) {
    Stage stages[count * STAGES];
    __builtin_memset(stages, 0, sizeof stages);
    Shared shared{};
    shared.stages = stages;
    if (run->num_threads == 1) return work(calls, count, *run, isa, 0, 1, shared);
#pragma omp parallel num_threads(run->num_threads)
    work(calls, count, *run, isa, omp_get_thread_num(), omp_get_num_threads(), shared);
}
