// What the driver of the native kernels is made of: memory filled with chosen values, cases, and
// trying a case with every instruction set and number of threads.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "abi.h"

extern "C" {
int trimaran_isa();
int trimaran_emulated();
int64_t trimaran_count(int isa, int kernel);
const char* trimaran_kernel_name(int kernel);
void trimaran_run(const trimaran::Call* calls, int count, const trimaran::Run* run, int isa);
}

namespace driver {

using namespace trimaran;

enum Isa { AVX2 = 1, AVX512, AVX512_BF16, AMX };
constexpr const char* ISA_NAMES[] = {"none", "avx2", "avx512", "avx512_bf16", "amx"};
constexpr int MOST_THREADS = 3;

inline int64_t up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// ---------------------------------------------------------------------------------------------
// Values
// ---------------------------------------------------------------------------------------------

inline int64_t bytes_of(Element element) {
    return element == Element::f32 ? 4 : element == Element::s8 ? 1 : 2;
}

inline float from_f16(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float sign = bits >> 15 ? -1 : 1;
    if (exponent == 31) return fraction ? NAN : sign * INFINITY;
    return sign * (exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24));
}
inline uint16_t to_f16(float x) {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const float size = std::fabs(x);
    if (std::isnan(x)) return 0x7e00;
    if (size >= 65520) return sign | 0x7c00;
    if (size < 0x1p-14f) return sign | (uint16_t)std::nearbyint(std::ldexp(size, 24));
    int exponent;
    const float fraction = std::frexp(size, &exponent);  // in [0.5, 1)
    return sign | ((exponent + 13) * 1024 + (int)std::nearbyint(fraction * 2048));
}

inline float read(const void* at, Element element, int64_t index) {
    if (element == Element::f32) return ((const float*)at)[index];
    if (element == Element::s8) return ((const int8_t*)at)[index];
    const uint16_t bits = ((const uint16_t*)at)[index];
    if (element == Element::f16) return from_f16(bits);
    const uint32_t wide = (uint32_t)bits << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
}
inline void write(void* at, Element element, int64_t index, float x) {
    if (element == Element::f32) ((float*)at)[index] = x;
    else if (element == Element::s8) ((int8_t*)at)[index] = (int8_t)x;
    else if (element == Element::f16) ((uint16_t*)at)[index] = to_f16(x);
    else {
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        ((uint16_t*)at)[index] = std::isnan(x) ? 0x7fc0 : rounded;
    }
}

class Random {
   public:
    explicit Random(uint64_t seed) : state_(seed * 2 + 1) {}
    uint32_t bits() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return state_ >> 32;
    }
    int64_t below(int64_t end) { return bits() % end; }
    float uniform() { return bits() * 0x1p-32f; }
    // Nearly normal, of variance 1.
    float normal() { return (uniform() + uniform() + uniform() + uniform() - 2) * 1.732f; }

   private:
    uint64_t state_;
};

enum class Values { ordinary, edges, zeros };  // edges: now and then a number that is none, …

inline float edge(Random& random) {
    static const float edges[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-40f, 6e-8f, 3e4f};
    return edges[random.below(8)];
}

// Memory of exactly so many bytes, so that the sanitizer sees what is read or written beside it.
class Memory {
   public:
    explicit Memory(int64_t bytes, int fill = 0x5b) : bytes_(bytes) {
        if (posix_memalign(&at_, 64, bytes ? bytes : 1)) std::abort();
        std::memset(at_, fill, bytes);
    }
    Memory(Memory&& other) noexcept : at_(other.at_), bytes_(other.bytes_) { other.at_ = nullptr; }
    Memory(const Memory& other) : Memory(other.bytes_) { std::memcpy(at_, other.at_, bytes_); }
    Memory& operator=(const Memory&) = delete;
    ~Memory() { std::free(at_); }

    void* at() const { return at_; }
    int64_t bytes() const { return bytes_; }

   private:
    void* at_ = nullptr;
    int64_t bytes_;
};

inline Memory numbers(Element element, int64_t count, Random& random, Values values = Values::ordinary) {
    Memory memory(count * bytes_of(element), 0);
    for (int64_t i = 0; i < count && values != Values::zeros; i++) {
        const bool odd = values == Values::edges && random.below(29) == 0;
        const float x = odd ? edge(random) : random.normal();
        write(memory.at(), element, i, element == Element::s8 ? std::round(x * 40) : x);
    }
    return memory;
}
template <class T>
Memory listed(const std::vector<T>& list) {
    Memory memory(list.size() * sizeof(T));
    if (!list.empty()) std::memcpy(memory.at(), list.data(), memory.bytes());
    return memory;
}

// ---------------------------------------------------------------------------------------------
// Cases
// ---------------------------------------------------------------------------------------------

// What a kernel writes. `exact`: the same bytes from every instruction set; else numbers of
// `element` a with |a - b| <= bound * (scale + |b|), and what is no number in the same places.
struct Output {
    Memory memory;
    bool exact;
    Element element = Element::f32;
    double bound = 0, scale = 1;
};

// What rounding a nearly equal result may change: a unit in the last place.
inline double last_place(Element element) {
    return element == Element::bf16 ? 0x1p-7 : element == Element::f16 ? 0x1p-10 : 1e-5;
}

struct Case {
    std::string about;
    Call call{};
    std::vector<Memory> kept;  // what the call's inputs point to
    std::vector<Output> outputs;

    Case(int kernel, Element element, int64_t rows, std::string about) : about(std::move(about)) {
        call.kernel = kernel;
        call.element = (int32_t)element;
        call.rows = rows;
        this->about += ", " + std::to_string(rows) + " rows of ";
        this->about += element == Element::f32 ? "f32" : element == Element::bf16 ? "bf16" : "f16";
    }
    Case(Case&&) = default;  // a copy would point to what the original keeps

    const void* keep(Memory memory) {
        kept.push_back(std::move(memory));
        return kept.back().at();
    }
    void in(int index, Memory memory) { call.in[index] = keep(std::move(memory)); }
    void sizes(std::initializer_list<int64_t> n) { std::copy(n.begin(), n.end(), call.n); }
    void out(Element element, int64_t count, double bound, double scale = 1) {
        outputs.push_back({Memory(count * bytes_of(element)), false, element, bound, scale});
    }
    void out_exact(int64_t bytes) { outputs.push_back({Memory(bytes), true}); }
};

inline void run(const Call& call, int isa, int num_threads, bool by_tokens = false) {
    static Memory scratch(MOST_THREADS * SCRATCH_BYTES);
    Run run{0, nullptr, (uint8_t*)scratch.at(), SCRATCH_BYTES, num_threads};
    Call one = call;
    if (by_tokens) {
        run.tokens = call.rows;
        one.rows = 0;
        one.rows_per_token = 1;
    }
    trimaran_run(&one, 1, &run, isa);
}

// The outputs of a case; each try begins with outputs as the case has them.
inline std::vector<Memory> outputs_of(const Case& one, int isa, int num_threads) {
    std::vector<Memory> made;
    for (const Output& output : one.outputs) made.push_back(output.memory);
    Call call = one.call;
    for (size_t i = 0; i < made.size(); i++) call.out[i] = made[i].at();
    run(call, isa, num_threads, num_threads == 2);
    return made;
}

// The first place at which `got` is not what it should be; -1: none.
inline int64_t difference(const Output& output, const Memory& got, const Memory& wanted, bool exact) {
    if (exact) {
        const char *a = (const char*)got.at(), *b = (const char*)wanted.at();
        for (int64_t i = 0; i < got.bytes(); i++)
            if (a[i] != b[i]) return i / (output.exact ? 1 : bytes_of(output.element));
        return -1;
    }
    for (int64_t i = 0; i < got.bytes() / bytes_of(output.element); i++) {
        const double a = read(got.at(), output.element, i), b = read(wanted.at(), output.element, i);
        if (std::isnan(a) != std::isnan(b)) return i;
        if (std::isnan(a) || a == b) continue;
        if (!(std::fabs(a - b) <= output.bound * (output.scale + std::fabs(b)))) return i;
    }
    return -1;
}

inline int failures = 0;

inline void compare(const Case& one, const std::vector<Memory>& got, const std::vector<Memory>& wanted,
                    bool exact, int isa, int num_threads, const char* with) {
    for (size_t o = 0; o < got.size(); o++) {
        const Output& output = one.outputs[o];
        const int64_t at = difference(output, got[o], wanted[o], exact || output.exact);
        if (at < 0) continue;
        failures++;
        const Element element = output.exact ? Element::s8 : output.element;
        std::printf("FAILED %s (%s), %s, %d threads: output %zu at %lld is %.9g; %s: %.9g\n",
                    trimaran_kernel_name(one.call.kernel), one.about.c_str(), ISA_NAMES[isa],
                    num_threads, o, (long long)at, read(got[o].at(), element, at), with,
                    read(wanted[o].at(), element, at));
    }
}

// Every instruction set up to `best` against AVX2, and every number of threads against one.
inline void try_case(const Case& one, int best) {
    const std::vector<Memory> reference = outputs_of(one, AVX2, 1);
    for (int isa = AVX2; isa <= best; isa++) {
        const std::vector<Memory> alone = outputs_of(one, isa, 1);
        compare(one, alone, reference, isa == AVX2, isa, 1, ISA_NAMES[AVX2]);
        for (int threads = 2; threads <= MOST_THREADS; threads++)
            compare(one, outputs_of(one, isa, threads), alone, true, isa, threads, "by one");
    }
}

}  // namespace driver
