// The memory that the ranks of a group on one host share, and how they meet in it.
//
// Each rank has a seat, which it alone writes, and two slots for what it gives. A collective is cut
// into pieces that fit a slot. For each piece a rank fills its slot, raises the step of its seat,
// and waits until all others have raised theirs; then it reads their slots. Two slots are enough:
// whoever has come to the next piece has read all of this one, and nobody writes to a slot again
// before all have come to the next piece.
//
// The seats begin as zeros. The memory belongs to the processes that map it, so that it ends with
// the last of them, however they end.
#pragma once
#include <linux/futex.h>
#include <poll.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "abi.h"

namespace trimaran {

// What became of a collective. In the order of `_FAILURES` in kernels_cpu/collective.py.
enum Status { DONE, ABORTED, TIMED_OUT, ENDED, LEFT, DIFFERS };

struct alignas(128) Seat {
    uint32_t step;     // what this rank gives for the step with this number lies in its slot
    uint32_t left;     // it has closed the group
    int64_t what[2];   // the collectives of this step and of the one before or after it
    alignas(64) uint32_t sleepers;  // who waits for `step` in the kernel
};

struct Shared {
    char token[16];  // by which members know that they have found the right memory
    uint32_t aborted;
    alignas(128) Seat seats[];  // of each rank; behind them, on pages of their own, the slots
};

// A rank's own view of its group.
struct Group {
    Shared* shared;
    const int32_t* processes;  // of each member a descriptor that is readable when it has ended
    int64_t slot_bytes;
    int64_t timeout;  // nanoseconds
    int32_t rank, size;
    int32_t num_threads;
    uint32_t step;
    uint32_t piece;
    int32_t missing;  // the rank that a collective failed for
};

constexpr int64_t PAGE = 4096;

static inline int64_t slots_at(int64_t size) {
    return (int64_t)(sizeof(Shared) + size * sizeof(Seat) + PAGE - 1) / PAGE * PAGE;
}

// The slot of a rank for the current piece.
static inline char* slot_of(const Group& group, int rank) {
    return (char*)group.shared + slots_at(group.size) +
           (rank * 2 + (group.piece & 1)) * group.slot_bytes;
}

static inline long futex(uint32_t* at, int what, uint32_t value, const timespec* timeout = nullptr) {
    return syscall(SYS_futex, at, what, value, timeout, nullptr, 0);
}

static inline int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000 + time.tv_nsec;
}

static inline void wake_all(const Group& group) {
    for (int rank = 0; rank < group.size; rank++)
        futex(&group.shared->seats[rank].step, FUTEX_WAKE, INT32_MAX);
}

static inline void abort_group(const Group& group) {
    __atomic_store_n(&group.shared->aborted, 1, __ATOMIC_SEQ_CST);
    wake_all(group);
}

static inline bool aborted(const Group& group) {
    return __atomic_load_n(&group.shared->aborted, __ATOMIC_ACQUIRE);
}

// Tens of microseconds, about what the ranks of one host come apart by; then the core is given
// away, because the one that is waited for may need it.
constexpr int MEETING_SPINS = 2000;
// Nanoseconds after which a sleeper looks whether the one it waits for still lives.
constexpr int64_t LOOK_AROUND = 50000000;

static inline bool has_come(const Group& group, const Seat& seat) {
    return (int32_t)(__atomic_load_n(&seat.step, __ATOMIC_SEQ_CST) - group.step) >= 0;
}

static inline Status trouble(const Group& group, int rank, int64_t deadline) {
    if (aborted(group)) return ABORTED;
    if (__atomic_load_n(&group.shared->seats[rank].left, __ATOMIC_ACQUIRE)) return LEFT;
    pollfd process{group.processes[rank], POLLIN, 0};
    if (poll(&process, 1, 0) > 0) return ENDED;
    return now() >= deadline ? TIMED_OUT : DONE;
}

static inline Status sleep_for(Group& group, int rank, int64_t deadline) {
    Seat& seat = group.shared->seats[rank];
    Status status = DONE;
    __atomic_add_fetch(&seat.sleepers, 1, __ATOMIC_SEQ_CST);
    for (;;) {
        const uint32_t seen = __atomic_load_n(&seat.step, __ATOMIC_SEQ_CST);
        status = trouble(group, rank, deadline);
        if (has_come(group, seat)) {  // whatever became of it afterwards
            status = DONE;
            break;
        }
        if (status) break;
        const int64_t left = deadline - now(), nap = left < LOOK_AROUND ? left : LOOK_AROUND;
        const timespec time{0, nap > 0 ? nap : 1};
        futex(&seat.step, FUTEX_WAIT, seen, &time);
    }
    __atomic_sub_fetch(&seat.sleepers, 1, __ATOMIC_SEQ_CST);
    return status;
}

static inline Status fail(Group& group, int rank, Status status) {
    group.missing = rank;
    abort_group(group);  // the ranks are out of step: nothing that follows could be right
    return status;
}

// Shows what is in this rank's slot and waits until all others have come as far. `what` says which
// collective this is: all must be in the same one.
static inline Status meet(Group& group, int64_t what) {
    if (aborted(group)) return ABORTED;
    Seat& mine = group.shared->seats[group.rank];
    group.step++;
    mine.what[group.step & 1] = what;
    __atomic_store_n(&mine.step, group.step, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&mine.sleepers, __ATOMIC_SEQ_CST))
        futex(&mine.step, FUTEX_WAKE, INT32_MAX);
    int64_t deadline = 0;
    for (int rank = 0; rank < group.size; rank++) {
        const Seat& seat = group.shared->seats[rank];
        for (int i = 0; i < MEETING_SPINS && !has_come(group, seat); i++) __builtin_ia32_pause();
        if (!has_come(group, seat)) {
            if (!deadline) deadline = now() + group.timeout;
            if (const Status status = sleep_for(group, rank, deadline))
                return fail(group, rank, status);
        }
        if (seat.what[group.step & 1] != what) return fail(group, rank, DIFFERS);
    }
    return DONE;
}

}  // namespace trimaran
