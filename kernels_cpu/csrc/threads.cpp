// Which threads of the system the pool consists of, so that they can be given CPUs of their own.
//
// Built like run.cpp: the pool is the one of the OpenMP runtime that torch has loaded.
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

extern "C" int omp_get_thread_num();

#define EXPORT extern "C" __attribute__((visibility("default")))

// Fills in the system's numbers of the `count` threads that serve the calling one, itself first;
// where the runtime gives fewer, the rest is left as it is.
EXPORT void trimaran_thread_ids(int32_t* ids, int32_t count) {
#pragma omp parallel num_threads(count)
    ids[omp_get_thread_num()] = (int32_t)syscall(SYS_gettid);
}
