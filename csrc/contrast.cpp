// The C interface: picks the widest instruction set that the CPU has.
#include "contrast.h"

#include <cstdlib>
#include <cstring>
#include <new>

namespace avx512 {
int contrast(const HdcCall&, const HdcProblem*);
}
namespace avx2 {
int contrast(const HdcCall&, const HdcProblem*);
}
namespace portable {
int contrast(const HdcCall&, const HdcProblem*);
}

namespace {

struct InstructionSet {
    const char* name;
    int (*contrast)(const HdcCall&, const HdcProblem*);
    bool available;
};

// HDC_INSTRUCTION_SET names a narrower one, to test it.
const InstructionSet& chosen() {
    static const InstructionSet sets[] = {
#ifdef HDC_X86
        {"avx512", avx512::contrast, __builtin_cpu_supports("x86-64-v4") != 0},
        {"avx2", avx2::contrast, __builtin_cpu_supports("x86-64-v3") != 0},
#endif
        {"portable", portable::contrast, true},
    };
    static const InstructionSet& choice = []() -> const InstructionSet& {
        const char* wanted = std::getenv("HDC_INSTRUCTION_SET");
        for (const InstructionSet& set : sets)
            if (set.available && (!wanted || std::strcmp(wanted, set.name) == 0)) return set;
        return sets[sizeof sets / sizeof *sets - 1];
    }();
    return choice;
}

}  // namespace

int hdc_contrast(const HdcCall* call, const HdcProblem* problems) {
    try {
        return chosen().contrast(*call, problems);
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

int64_t hdc_interface_size() { return sizeof(HdcCall) + sizeof(HdcProblem); }

const char* hdc_instruction_set() { return chosen().name; }

int hdc_has_bfloat16() {
#ifdef HDC_X86
    return std::strcmp(chosen().name, "avx512") == 0 && __builtin_cpu_supports("avx512bf16");
#else
    return 0;
#endif
}
