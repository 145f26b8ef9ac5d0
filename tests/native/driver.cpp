// Runs every native kernel without Python or torch: each instruction set of the build against AVX2,
// several threads against one, under the sanitizers if it was compiled with them. A kernel without
// cases fails. Usage: driver [--isa NAME] [KERNEL...]
#include <ctime>
#include <map>

#include "cases_attention.h"
#include "cases_moe.h"
#include "cases_quantized.h"
#include "cases_rows.h"

namespace driver {

using Cases = std::vector<Case> (*)(int kernel);

const std::map<std::string, Cases>& table() {
    static const std::map<std::string, Cases> cases = {
        {"pack_dense", pack_dense},
        {"linear_dense", linear_dense},
        {"pack_int8", pack_int8},
        {"linear_int8", linear_int8},
        {"pack_int4", pack_int4},
        {"linear_int4", linear_int4},
        {"linear_int4_wide", linear_int4},
        {"add", add},
        {"silu_mul", gated},
        {"gelu_mul", gated},
        {"gelu_tanh_mul", gated},
        {"take_rows", take_rows},
        {"take_packed_rows", take_packed_rows},
        {"rms_norm", rms_norm},
        {"add_rms_norm", add_rms_norm},
        {"rope", rope},
        {"qk_norm_rope", rope},
        {"sample", sample},
        {"draw", draw},
        {"kv_write", kv_write},
        {"attention", attention},
        {"moe", moe},
    };
    return cases;
}

int isa_named(const char* name) {
    for (int isa = AVX2; isa <= AMX; isa++)
        if (!std::strcmp(name, ISA_NAMES[isa])) return isa;
    std::printf("no instruction set %s\n", name);
    std::exit(2);
}

void try_kernel(int kernel, int best) {
    const char* name = trimaran_kernel_name(kernel);
    const auto found = table().find(name);
    if (found == table().end()) {
        failures++;
        std::printf("FAILED %s: tests/native has no cases for it\n", name);
        return;
    }
    const int before = failures;
    const std::clock_t start = std::clock();
    const std::vector<Case> cases = found->second(kernel);
    for (const Case& one : cases) try_case(one, best);
    std::printf("%-16s %4zu cases, %5.1f s%s\n", name, cases.size(),
                (double)(std::clock() - start) / CLOCKS_PER_SEC, failures == before ? "" : ", FAILED");
    for (int isa = AVX2; isa <= best; isa++)
        if (!trimaran_count(isa, kernel)) failures++, std::printf("FAILED %s never ran\n", ISA_NAMES[isa]);
    std::fflush(stdout);
}

}  // namespace driver

int main(int count, char** arguments) {
    using namespace driver;
    int best = trimaran_isa();
    std::vector<std::string> only;
    for (int i = 1; i < count; i++) {
        if (std::strcmp(arguments[i], "--isa") || i + 1 == count) only.push_back(arguments[i]);
        else best = std::min(best, isa_named(arguments[++i]));
    }
    std::printf("up to %s%s\n", ISA_NAMES[best], trimaran_emulated() ? " (emulated)" : "");
    if (!best) return 2;
    for (int kernel = 0; kernel < (int)Kernel::count; kernel++) {
        bool wanted = only.empty();
        for (const std::string& name : only) wanted |= name == trimaran_kernel_name(kernel);
        if (wanted) try_kernel(kernel, best);
    }
    std::printf(failures ? "%d FAILED\n" : "all kernels as they should be\n", failures);
    return failures ? 1 : 0;
}
