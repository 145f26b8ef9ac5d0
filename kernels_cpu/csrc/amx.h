// The tile registers of AMX: eight tiles of 16 rows of 64 bytes each.
//
// Use: `tile_configure(team)` once in a kernel and thread; `tile_zero<T>()` or `tile_load<T>(address,
// bytes between rows)`; `tile_dot_bf16<C, A, B>()` adds A [16][32 bf16] times B [16 pairs][16
// columns][2] to C [16][16 floats], `tile_dot_s8` A [16][64 s8] times B [16 fours][16 columns][4]
// to C [16][16 int32]; `tile_store<C>`; `tile_release()` before the kernel returns. A tile is
// always whole: edges are filled with zeros, or overlap. bfloat16 products take denormal numbers
// as zero, and their sums flush to zero.
//
// The compiler knows nothing of tiles. Each instruction therefore says that it reads or writes
// memory, or the stores before a load (of staged rows, say) would be dropped as dead.
//
// TRIMARAN_EMULATED: plain loops over a struct of tiles. There, what a processor would not
// forgive ends the program: tiles used without configuration, or nested configurations; and a
// tile that was not set holds NaN.
#pragma once
#include "vec.h"

namespace trimaran::ISA {

constexpr int64_t TILE_ROWS = 16;
constexpr int64_t TILE_BYTES = 64;  // of a row

// How often kernels have configured tiles, counted by the first thread: for tests of which ran.
extern int64_t tile_uses;
int64_t tile_uses;
INLINE void count_use(const Team& team) {
    if (team.thread == 0) __atomic_fetch_add(&tile_uses, 1, __ATOMIC_RELAXED);
}

#ifdef TRIMARAN_EMULATED

struct Tiles {
    uint8_t byte[8][TILE_ROWS][TILE_BYTES];
    bool configured;
};
static thread_local Tiles tiles;

INLINE uint8_t (&tile_at(int index))[TILE_ROWS][TILE_BYTES] {
    if (!tiles.configured) __builtin_trap();
    return tiles.byte[index];
}
INLINE void tile_configure(const Team& team) {
    if (tiles.configured) __builtin_trap();
    count_use(team);
    __builtin_memset(tiles.byte, 0xff, sizeof tiles.byte);
    tiles.configured = true;
}
INLINE void tile_release() { tiles.configured = false; }
template <int T>
INLINE void tile_zero() {
    __builtin_memset(tile_at(T), 0, sizeof tile_at(T));
}
template <int T>
INLINE void tile_load(const void* from, int64_t stride) {
    auto& to = tile_at(T);
    for (int r = 0; r < TILE_ROWS; r++)
        __builtin_memcpy(to[r], (const uint8_t*)from + r * stride, TILE_BYTES);
}
template <int T>
INLINE void tile_store(void* to, int64_t stride) {
    const auto& from = tile_at(T);
    for (int r = 0; r < TILE_ROWS; r++)
        __builtin_memcpy((uint8_t*)to + r * stride, from[r], TILE_BYTES);
}
// The even and the odd products are summed apart, and their sums added to C (Intel's manual,
// TDPBF16PS).
template <int C, int A, int B>
static void tile_dot_bf16() {
    for (int r = 0; r < TILE_ROWS; r++) {
        vf evens = zero(), odds = zero(), c;
        for (int pair = 0; pair < TILE_ROWS; pair++) {
            uint32_t both;
            vu b;
            __builtin_memcpy(&both, tile_at(A)[r] + 4 * pair, 4);
            __builtin_memcpy(&b, tile_at(B)[pair], TILE_BYTES);
            const vu a = both - vu{};
            evens = fma(even(a), even(b), evens);
            odds = fma(odd(a), odd(b), odds);
        }
        __builtin_memcpy(&c, tile_at(C)[r], TILE_BYTES);
        c += evens + odds;
        __builtin_memcpy(tile_at(C)[r], &c, TILE_BYTES);
    }
}
template <int C, int A, int B>
static void tile_dot_s8() {
    for (int r = 0; r < TILE_ROWS; r++) {
        int32_t c[W];
        __builtin_memcpy(c, tile_at(C)[r], TILE_BYTES);
        for (int k = 0; k < TILE_BYTES; k++)
            for (int n = 0; n < W; n++)
                c[n] += (int8_t)tile_at(A)[r][k] * (int8_t)tile_at(B)[k / 4][4 * n + k % 4];
        __builtin_memcpy(tile_at(C)[r], c, TILE_BYTES);
    }
}

#else

// A constant: the stores of a configuration that is put together where it is loaded are easily lost.
struct TileConfiguration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
alignas(64) static constexpr TileConfiguration TILE_CONFIGURATION;
static_assert(sizeof(TileConfiguration) == 64);

INLINE void tile_configure(const Team& team) {
    count_use(team);
    __asm__ volatile("ldtilecfg %0" ::"m"(TILE_CONFIGURATION) : "memory");
}
INLINE void tile_release() { __asm__ volatile("tilerelease" ::: "memory"); }
template <int T>
INLINE void tile_zero() {
    __asm__ volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int T>
INLINE void tile_load(const void* from, int64_t stride) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(T) : "memory");
}
template <int T>
INLINE void tile_store(void* to, int64_t stride) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(T) : "memory");
}
template <int C, int A, int B>
INLINE void tile_dot_bf16() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
INLINE void tile_dot_s8() {
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

}  // namespace trimaran::ISA
