// What bindings_cpu.cpp and the CPU kernels share: the arguments of each kernel, and its declaration per instruction
// set. Strides are in elements. Shapes and dtypes were checked by Python; what is left to check here is said beside it.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) || defined(_M_X64)
#define FASTEDIT_X86 1
#endif

namespace fastedit {

enum Type : int { F32 = 0, F64 = 1, BF16 = 2, F16 = 3 };
enum Activation : int { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };

// gate, up: (n_edits, n_templates, d_ff) of `type`, last stride 1; up, active may be null
// weights: (n_templates,) float32; keys: (n_edits, d_ff) and mass: (d_ff,) float32, contiguous
struct CaptureKeys {
    const void *gate, *up;
    const float *weights;
    const bool *active;
    float *keys, *mass;
    int64_t n_edits, n_templates, d_ff;
    int64_t gate_edit, gate_template, up_edit, up_template;
    Type type;
    Activation activation;
    int threads;
};

#define FASTEDIT_DECLARE(isa)                 \
    namespace isa {                           \
    void capture_keys(const CaptureKeys &);   \
    }
FASTEDIT_DECLARE(baseline)
#ifdef FASTEDIT_X86
FASTEDIT_DECLARE(avx2)
FASTEDIT_DECLARE(avx512)
#endif
#undef FASTEDIT_DECLARE

}  // namespace fastedit
