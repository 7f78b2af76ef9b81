// The module fastedit._cpu. Every function takes the instruction set and the number of threads first, then addresses,
// sizes and strides in elements as its struct in cpu.h has them, and runs without the GIL.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

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

// The kernels would read or write outside of the matrix for an index that is out of range.
void check_index(const char *op, const int64_t *index, int64_t size, int64_t end) {
    if (!index || size == 0) return;
    int64_t smallest = index[0], largest = index[0];
    for (int64_t i = 1; i < size; ++i) {
        smallest = index[i] < smallest ? index[i] : smallest;
        largest = index[i] > largest ? index[i] : largest;
    }
    if (0 <= smallest && largest < end) return;
    const auto range = std::to_string(smallest) + " to " + std::to_string(largest);
    throw py::index_error(std::string(op) + ": index must be in [0, " + std::to_string(end) + "), got " + range);
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

    m.def("masked_gram", [](int isa, int threads, uintptr_t moment, uintptr_t history, uintptr_t keys, uintptr_t index,
                            uintptr_t out, double weight, int64_t n_edits, int64_t width, int64_t moment_row,
                            int64_t history_row, int64_t keys_row, int64_t keys_column, int moment_type,
                            int history_type, int keys_type, int out_type, int64_t d_ff) {
        check(isa, threads);
        check_index("masked_gram", at<int64_t>(index), width, d_ff);
        const MaskedGram a{at<void>(moment), at<void>(history), at<void>(keys), at<int64_t>(index), at<void>(out),
                           weight, n_edits, width, moment_row, history_row, keys_row, keys_column,
                           static_cast<Type>(moment_type), static_cast<Type>(history_type),
                           static_cast<Type>(keys_type), static_cast<Type>(out_type), threads};
        py::gil_scoped_release release;
        FASTEDIT_RUN(isa, masked_gram, a);
    });

    m.def("gram_update", [](int isa, int threads, uintptr_t history, uintptr_t keys, int64_t n, int64_t width,
                            int64_t history_row, int64_t keys_row, int64_t keys_column, int type) {
        check(isa, threads);
        const GramUpdate a{at<void>(history), at<void>(keys), n, width, history_row, keys_row, keys_column,
                           static_cast<Type>(type), threads};
        py::gil_scoped_release release;
        FASTEDIT_RUN(isa, gram_update, a);
    });

    m.def("ascending", [](uintptr_t index, int64_t size) {
        const int64_t *all = at<int64_t>(index);
        bool so = true;
        for (int64_t i = 1; i < size; ++i) so &= all[i - 1] < all[i];
        return so;
    }, "Whether the numbers are strictly ascending.");

    m.def("apply_delta", [](int isa, int threads, uintptr_t weight, uintptr_t master, uintptr_t residual,
                            uintptr_t solution, uintptr_t index, int64_t n_edits, int64_t d_model, int64_t width,
                            int64_t weight_row, int64_t weight_column, int64_t residual_row, int64_t residual_column,
                            int64_t solution_row, int64_t solution_column, int type, int residual_type,
                            int solution_type, int64_t d_ff) {
        check(isa, threads);
        check_index("apply_delta", at<int64_t>(index), width, d_ff);
        const ApplyDelta a{at<void>(weight), at<void>(master), at<void>(residual), at<void>(solution),
                           at<int64_t>(index), n_edits, d_model, width, weight_row, weight_column, residual_row,
                           residual_column, solution_row, solution_column, static_cast<Type>(type),
                           static_cast<Type>(residual_type), static_cast<Type>(solution_type), threads};
        py::gil_scoped_release release;
        FASTEDIT_RUN(isa, apply_delta, a);
    });

    m.def("select_neurons", [](int isa, int threads, uintptr_t score, uintptr_t index, int64_t n, int64_t count,
                               double share, bool reaching, int type) {
        check(isa, threads);
        const SelectNeurons a{at<void>(score), at<int64_t>(index), n, count, share, reaching, static_cast<Type>(type)};
        py::gil_scoped_release release;
        return FASTEDIT_RUN(isa, select_neurons, a);
    });

    m.def("sparse_adam", [](int isa, int threads, uintptr_t delta, uintptr_t moment1, uintptr_t moment2,
                            uintptr_t grad, uintptr_t decay, uintptr_t radius, int64_t n, int64_t d, int64_t step,
                            double lr, double beta1, double beta2, double eps, int type) {
        check(isa, threads);
        const SparseAdam a{at<void>(delta), at<void>(moment1), at<void>(moment2), at<void>(grad), at<void>(decay),
                           at<void>(radius), n, d, step, lr, beta1, beta2, eps, static_cast<Type>(type), threads};
        py::gil_scoped_release release;
        FASTEDIT_RUN(isa, sparse_adam, a);
    });

    m.def("score_neurons", [](int isa, int threads, uintptr_t activations, uintptr_t weight, uintptr_t directions,
                              uintptr_t values, uintptr_t neurons, int64_t n_slots, int64_t d_model, int64_t d_ff,
                              int64_t weight_row, int64_t top_k, int type) {
        check(isa, threads);
        const ScoreNeurons a{at<void>(activations), at<void>(weight), at<void>(directions), at<void>(values),
                             at<int64_t>(neurons), n_slots, d_model, d_ff, weight_row, top_k, static_cast<Type>(type),
                             threads};
        py::gil_scoped_release release;
        FASTEDIT_RUN(isa, score_neurons, a);
    });

    // Forward where y is given, else both gradients.
    m.def("sparse_delta", [](int isa, int threads, uintptr_t activations, uintptr_t row_starts, uintptr_t index,
                             uintptr_t slot_starts, uintptr_t delta, uintptr_t grad, uintptr_t y,
                             uintptr_t grad_activations, uintptr_t grad_delta, int64_t n_samples, int64_t n_rows,
                             int64_t n_slots, int64_t d_ff, int64_t d_model, int64_t activation_row, double scale,
                             int activation_type, int delta_type, bool forward) {
        check(isa, threads);
        check_index("sparse_delta", at<int64_t>(index), n_slots, d_ff);
        const SparseDelta a{at<void>(activations), at<void>(delta), at<void>(grad), at<int64_t>(row_starts),
                            at<int64_t>(slot_starts), at<int64_t>(index), at<void>(y), at<void>(grad_activations),
                            at<void>(grad_delta), n_samples, n_rows, n_slots, d_ff, d_model, activation_row, scale,
                            static_cast<Type>(activation_type), static_cast<Type>(delta_type), threads};
        py::gil_scoped_release release;
        if (forward)
            FASTEDIT_RUN(isa, sparse_delta, a);
        else
            FASTEDIT_RUN(isa, sparse_delta_grads, a);
    });
}
