// What bindings_cpu.cpp and the CPU kernels share: the arguments of each kernel, and its declaration per instruction
// set. Strides are in elements. Python has checked shapes and dtypes; what remains to be checked is stated beside it.
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

// out: (width, width) float32 or float64, contiguous; width = n selected neurons, or d_ff where index is null
// moment, history (may be null): rows of float32 or float64, last stride 1; keys: any strides; index: within d_ff
struct MaskedGram {
    const void *moment, *history, *keys;
    const int64_t *index;
    void *out;
    double weight;
    int64_t n_edits, width, moment_row, history_row, keys_row, keys_column;
    Type moment_type, history_type, keys_type, out_type;
    int threads;
};

// history: (width, width), last stride 1, of the dtype of keys: (n, width), float32 or float64
struct GramUpdate {
    void *history;
    const void *keys;
    int64_t n, width, history_row, keys_row, keys_column;
    Type type;
    int threads;
};

// weight: (d_model, d_ff) of `type`, any strides; master (may be null): the same strides, float32, or float64 where
// the weight is
// residual: (n_edits, d_model), solution: (width, n_edits), float32 or float64, any strides
// index: strictly ascending and within d_ff, null for every column
struct ApplyDelta {
    void *weight, *master;
    const void *residual, *solution;
    const int64_t *index;
    int64_t n_edits, d_model, width, weight_row, weight_column;
    int64_t residual_row, residual_column, solution_row, solution_column;
    Type type, residual_type, solution_type;
    int threads;
};

// score: (n,) float32 or float64, finite, contiguous; by mass: not negative. index: (n,), of which the first
// `return value` are written, ascending. share < 0: the `count` largest; else the prefix that reaches the share or stays within it.
struct SelectNeurons {
    const void *score;
    int64_t *index;
    int64_t n, count;
    double share;
    bool reaching;
    Type type;
};

// delta, grad, moment1, moment2: (n, d), contiguous, float32 or float64; decay, radius: (n,) of it, or null
struct SparseAdam {
    void *delta, *moment1, *moment2;
    const void *grad, *decay, *radius;
    int64_t n, d, step;
    double lr, beta1, beta2, eps;
    Type type;
    int threads;
};

// weight: (d_model, d_ff) of `type`, last stride 1; activations: (n_slots, d_ff), directions: (n_slots, d_model),
// contiguous, float32, or float64 where the weight is, as values are: (n_slots, d_ff), or with top_k > 0
// (n_slots, top_k) beside neurons: (n_slots, top_k)
struct ScoreNeurons {
    const void *activations, *weight, *directions;
    void *values;
    int64_t *neurons;
    int64_t n_slots, d_model, d_ff, weight_row, top_k;
    Type type;
    int threads;
};

// Row p of activations: (n_rows, d_ff), last stride 1, and slot r of index: (n_slots,), delta: (n_slots, d_model),
// belong to the sample whose range of starts holds them. Forward: y (n_rows, d_model). Gradients: grad (n_rows, d_model) of y,
// grad_activations (n_rows, d_ff) zero before, grad_delta (n_slots, d_model). All but activations contiguous and of
// delta_type, float32 or float64.
struct SparseDelta {
    const void *activations, *delta, *grad;
    const int64_t *row_starts, *slot_starts, *index;
    void *y, *grad_activations, *grad_delta;
    int64_t n_samples, n_rows, n_slots, d_ff, d_model, activation_row;
    double scale;
    Type activation_type, delta_type;
    int threads;
};

#define FASTEDIT_DECLARE(isa)                      \
    namespace isa {                                \
    void capture_keys(const CaptureKeys &);        \
    void masked_gram(const MaskedGram &);          \
    void gram_update(const GramUpdate &);          \
    void apply_delta(const ApplyDelta &);          \
    int64_t select_neurons(const SelectNeurons &); \
    void sparse_adam(const SparseAdam &);          \
    void score_neurons(const ScoreNeurons &);      \
    void sparse_delta(const SparseDelta &);        \
    void sparse_delta_grads(const SparseDelta &);  \
    }
FASTEDIT_DECLARE(baseline)
#ifdef FASTEDIT_X86
FASTEDIT_DECLARE(avx2)
FASTEDIT_DECLARE(avx512)
#endif
#undef FASTEDIT_DECLARE

}  // namespace fastedit
