// Collectives of the ranks of one host over shared memory; collective.h says how they meet.
//
// Sums are taken in the order of the ranks, 16-bit floats in fp32 and rounded once, so that they
// are the same on every rank and from run to run.
#define ISA collective
#include "collective.h"
#include "vec.h"

extern "C" int omp_get_thread_num();
extern "C" int omp_get_num_threads();

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace trimaran::ISA {
namespace {

constexpr int MAX_RANKS = 64;
// Bytes up to which every rank sums all of a piece, which takes one meeting; above, each rank sums
// its part and shows it in a second one.
constexpr int64_t SUMMED_BY_ALL = 32 << 10;
// Bytes that are not worth waking other threads for.
constexpr int64_t ALONE = 128 << 10;

enum Collective : int64_t { ALL_REDUCE, ALL_GATHER, BROADCAST, BARRIER };

int64_t what(Collective collective, int64_t bytes, int64_t kind = 0) {
    return collective << 60 | kind << 52 | bytes;
}

// Calls body(first, count) for parts of [0, size), on the team's threads where it is worth it.
template <class Body>
INLINE void divided(const Group& group, int64_t size, int64_t item_bytes, Body body) {
    if (group.num_threads == 1 || size * item_bytes < ALONE) return body((int64_t)0, size);
#pragma omp parallel num_threads(group.num_threads)
    {
        const Range part = part_of(size, omp_get_thread_num(), omp_get_num_threads(), 64);
        if (part.begin < part.end) body(part.begin, part.end - part.begin);
    }
}

INLINE void copy(const Group& group, void* to, const void* from, int64_t bytes) {
    divided(group, bytes, 1, [&](int64_t first, int64_t count) {
        __builtin_memcpy((char*)to + first, (const char*)from + first, count);
    });
}

INLINE void sum_at(int64_t* out, const int64_t* const* parts, int ranks, int64_t i) {
    int64_t sum = 0;
    for (int rank = 0; rank < ranks; rank++) sum += parts[rank][i];
    out[i] = sum;
}

INLINE void sum_of(int64_t* out, const int64_t* const* parts, int ranks, int64_t first, int64_t n) {
    for (int64_t i = first; i < first + n; i++) sum_at(out, parts, ranks, i);
}

template <class T>
INLINE void sum_of(T* out, const T* const* parts, int ranks, int64_t first, int64_t n) {
    int64_t i = first;
    for (; i + W <= first + n; i += W) {
        vf sum = load(parts[0] + i);
        for (int rank = 1; rank < ranks; rank++) sum += load(parts[rank] + i);
        store(out + i, sum);
    }
    if (const int64_t left = first + n - i) {
        vf sum = load_part(parts[0] + i, left);
        for (int rank = 1; rank < ranks; rank++) sum += load_part(parts[rank] + i, left);
        store_part(out + i, sum, left);
    }
}

// One piece of a sum over all ranks, in place.
template <class T>
Status reduce_piece(Group& group, T* data, int64_t n, int64_t what) {
    const bool by_all = n * (int64_t)sizeof(T) <= SUMMED_BY_ALL;
    const auto part = [&](int rank) {
        return by_all ? Range{0, n} : part_of(n, rank, group.size, 64 / sizeof(T));
    };
    T* slot = (T*)slot_of(group, group.rank);
    const Range mine = part(group.rank);
    // The others read all but this rank's own part; that they read after it was summed.
    if (by_all) {
        copy(group, slot, data, n * sizeof(T));
    } else {
        copy(group, slot, data, mine.begin * sizeof(T));
        copy(group, slot + mine.end, data + mine.end, (n - mine.end) * sizeof(T));
    }
    if (const Status status = meet(group, what)) return status;
    const T* parts[MAX_RANKS];
    for (int rank = 0; rank < group.size; rank++)
        parts[rank] = (rank == group.rank ? data : (const T*)slot_of(group, rank)) + mine.begin;
    divided(group, mine.end - mine.begin, sizeof(T) * group.size,
            [&](int64_t first, int64_t count) {
                sum_of(data + mine.begin, parts, group.size, first, count);
            });
    if (by_all) return DONE;
    copy(group, slot + mine.begin, data + mine.begin, (mine.end - mine.begin) * sizeof(T));
    if (const Status status = meet(group, what)) return status;
    for (int rank = 0; rank < group.size; rank++) {
        const Range theirs = part(rank);
        if (rank != group.rank)
            copy(group, data + theirs.begin, (const T*)slot_of(group, rank) + theirs.begin,
                 (theirs.end - theirs.begin) * sizeof(T));
    }
    return DONE;
}

// Calls body(first, count) for each piece of `size` items, at least once.
template <class Body>
INLINE Status by_pieces(Group& group, int64_t size, int64_t item_bytes, Body body) {
    const int64_t most = group.slot_bytes / item_bytes;
    int64_t first = 0;
    do {
        group.piece++;
        if (const Status status = body(first, min(most, size - first))) return status;
        first += most;
    } while (first < size);
    return DONE;
}

template <class T>
Status all_reduce(Group& group, T* data, int64_t n, int64_t element) {
    return by_pieces(group, n, sizeof(T), [&](int64_t first, int64_t count) {
        return reduce_piece(group, data + first, count, what(ALL_REDUCE, n * sizeof(T), element));
    });
}

// Bytes `first` and following of a rank's part [outer, inner] to their places in `whole`
// [outer, ranks, inner].
void spread(char* whole, const char* from, int64_t first, int64_t bytes, int64_t inner, int rank,
            int ranks) {
    while (bytes > 0) {
        const int64_t row = first / inner, at = first % inner, run = min(inner - at, bytes);
        __builtin_memcpy(whole + (row * ranks + rank) * inner + at, from, run);
        first += run, from += run, bytes -= run;
    }
}

Status all_gather(Group& group, const char* part, char* whole, int64_t bytes, int64_t inner) {
    return by_pieces(group, bytes, 1, [&](int64_t first, int64_t count) {
        copy(group, slot_of(group, group.rank), part + first, count);
        if (const Status status = meet(group, what(ALL_GATHER, bytes))) return status;
        for (int rank = 0; rank < group.size; rank++) {
            const char* from = rank == group.rank ? part + first : slot_of(group, rank);
            divided(group, count, 1, [&](int64_t begin, int64_t size) {
                spread(whole, from + begin, first + begin, size, inner, rank, group.size);
            });
        }
        return DONE;
    });
}

Status broadcast(Group& group, char* data, int64_t bytes, int source) {
    return by_pieces(group, bytes, 1, [&](int64_t first, int64_t count) {
        if (source == group.rank) copy(group, slot_of(group, source), data + first, count);
        if (const Status status = meet(group, what(BROADCAST, bytes, source))) return status;
        if (source != group.rank) copy(group, data + first, slot_of(group, source), count);
        return DONE;
    });
}

}  // namespace
}  // namespace trimaran::ISA

using namespace trimaran;

// Bytes of the memory that a group of `size` shares; 0: there are no groups of that size.
EXPORT int64_t trimaran_shared_bytes(int32_t size, int64_t slot_bytes) {
    return size > ISA::MAX_RANKS ? 0 : slots_at(size) + 2 * size * slot_bytes;
}

EXPORT int64_t trimaran_group_bytes() { return sizeof(Group); }

// Elements as in abi.h (f32, bf16, f16), and 3: int64. Returns a Status, as all collectives do.
EXPORT int trimaran_all_reduce(Group* group, void* data, int64_t n, int32_t element) {
    switch (element) {
        case 0: return ISA::all_reduce(*group, (float*)data, n, element);
        case 1: return ISA::all_reduce(*group, (ISA::bf16*)data, n, element);
        case 2: return ISA::all_reduce(*group, (ISA::f16*)data, n, element);
        default: return ISA::all_reduce(*group, (int64_t*)data, n, element);
    }
}

// part: `bytes` bytes, rows of `inner`. whole: the ranks' rows beside each other.
EXPORT int trimaran_all_gather(Group* group, const void* part, void* whole, int64_t bytes,
                               int64_t inner) {
    return ISA::all_gather(*group, (const char*)part, (char*)whole, bytes, inner);
}

EXPORT int trimaran_broadcast(Group* group, void* data, int64_t bytes, int32_t source) {
    return ISA::broadcast(*group, (char*)data, bytes, source);
}

EXPORT int trimaran_barrier(Group* group) { return meet(*group, ISA::what(ISA::BARRIER, 0)); }

// May be called by another thread than the one that is in a collective.
EXPORT void trimaran_abort(Group* group) { abort_group(*group); }

// This rank comes to no collective any more.
EXPORT void trimaran_leave(Group* group) {
    __atomic_store_n(&group->shared->seats[group->rank].left, 1, __ATOMIC_SEQ_CST);
    wake_all(*group);
}
