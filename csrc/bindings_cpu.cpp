// The module fastedit._cpu. Every function takes the instruction set and the number of threads first, then addresses,
// sizes and strides in elements as its struct in cpu.h has them, and runs without the GIL.
#include <pybind11/pybind11.h>

#include <stdexcept>

#include "cpu.h"

namespace py = pybind11;
using namespace fastedit;

namespace {

enum Isa : int { BASELINE = 0, AVX2 = 1, AVX512 = 2 };

int best_isa() {
#ifdef FASTEDIT_X86
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    // Every processor with AVX-512 converts half precision; those with AVX2 alone do too.
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return AVX512;
    if (avx2) return AVX2;
#endif
    return BASELINE;
}

#ifdef FASTEDIT_X86
#define FASTEDIT_RUN(isa, kernel, arguments) \
    (isa == AVX512 ? avx512::kernel(arguments) : isa == AVX2 ? avx2::kernel(arguments) : baseline::kernel(arguments))
#else
#define FASTEDIT_RUN(isa, kernel, arguments) baseline::kernel(arguments)
#endif

void check(int isa, int threads) {
    if (isa < BASELINE || isa > best_isa()) throw std::invalid_argument("this processor lacks the instruction set");
    if (threads < 1) throw std::invalid_argument("threads must be positive");
}

template <class T>
T *at(uintptr_t address) {
    return reinterpret_cast<T *>(address);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "C++ kernels; see fastedit/ops/cpp for what may be passed.";
    m.attr("ISAS") = py::make_tuple("baseline", "avx2", "avx512");
    m.def("best_isa", &best_isa, "Number of the widest instruction set of this processor, an index of ISAS.");

    m.def("capture_keys", [](int isa, int threads, uintptr_t gate, uintptr_t up, uintptr_t weights, uintptr_t active,
                             uintptr_t keys, uintptr_t mass, int64_t n_edits, int64_t n_templates, int64_t d_ff,
                             int64_t gate_edit, int64_t gate_template, int64_t up_edit, int64_t up_template, int type,
                             int activation) {
        check(isa, threads);
        const CaptureKeys a{at<void>(gate), at<void>(up), at<float>(weights), at<bool>(active), at<float>(keys),
                            at<float>(mass), n_edits, n_templates, d_ff, gate_edit, gate_template, up_edit,
                            up_template, static_cast<Type>(type), static_cast<Activation>(activation), threads};
        py::gil_scoped_release release;
        FASTEDIT_RUN(isa, capture_keys, a);
    });
}
