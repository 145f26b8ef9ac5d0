/* The best that this processor does in two loops: reading memory, multiplying in registers.
 *
 * canary.py builds it for the processor, or for a cap of its instructions, and runs it on several
 * threads. Vectors are gcc's own, so that one source serves every width. */
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifdef __AVX512F__
enum { WIDTH = 64, ACCUMULATORS = 24 };
#else
enum { WIDTH = 32, ACCUMULATORS = 12 }; /* sixteen registers, one operand and one factor */
#endif
typedef uint64_t words __attribute__((vector_size(WIDTH)));
typedef float floats __attribute__((vector_size(WIDTH)));

/* Sum `bytes` (a multiple of 512) at `data`, asking for what lies 1 KiB ahead. */
uint64_t peak_read(const char *data, size_t bytes) {
    enum { STEP = 512, LOADS = STEP / WIDTH };
    words sums[LOADS] = {0};
    for (size_t at = 0; at < bytes; at += STEP) {
        for (size_t line = 0; line < STEP; line += 64)
            __builtin_prefetch(data + at + line + 1024);
#pragma GCC unroll 16
        for (int i = 0; i < LOADS; i++) sums[i] += *(const words *)(data + at + i * WIDTH);
    }
    uint64_t total = 0;
    for (int i = 0; i < LOADS; i++)
        for (size_t lane = 0; lane < WIDTH / sizeof total; lane++) total += sums[i][lane];
    return total;
}

/* Operations of `rounds` rounds of fused multiply-adds in fp32. */
double peak_fma(long rounds, volatile float *sink) {
    floats sums[ACCUMULATORS], factor, term;
    for (size_t lane = 0; lane < WIDTH / sizeof(float); lane++) factor[lane] = term[lane] = *sink;
    for (int i = 0; i < ACCUMULATORS; i++) sums[i] = term * (float)i;
    for (long round = 0; round < rounds; round++)
#pragma GCC unroll 24
        for (int i = 0; i < ACCUMULATORS; i++) sums[i] = sums[i] * factor + term;
    for (int i = 0; i < ACCUMULATORS; i++) *sink += sums[i][0];
    return 2.0 * (WIDTH / sizeof(float)) * ACCUMULATORS * (double)rounds;
}

#ifdef __AMX_BF16__
/* The same in bf16 tiles that stay where they are: two by two, as a GEMM holds its result. */
double peak_tiles(long rounds, volatile float *sink) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    if (syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)) return 0;
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } configuration = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) {
        configuration.row_bytes[tile] = 64;
        configuration.rows[tile] = 16;
    }
    uint16_t ones[16 * 32];
    for (int i = 0; i < 16 * 32; i++) ones[i] = 0x3f80;
    __asm__ volatile("" ::: "memory"); /* gcc 12 drops the stores of the configuration otherwise */
    _tile_loadconfig(&configuration);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_loadd(4, ones, 64);
    _tile_loadd(5, ones, 64);
    _tile_loadd(6, ones, 64);
    _tile_loadd(7, ones, 64);
    for (long round = 0; round < rounds; round++) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    float found[16 * 16];
    _tile_stored(0, found, 64);
    *sink += found[0];
    _tile_release();
    return 4.0 * 2 * 16 * 16 * 32 * (double)rounds;
}
#else
double peak_tiles(long rounds, volatile float *sink) {
    (void)rounds, (void)sink;
    return 0;
}
#endif
