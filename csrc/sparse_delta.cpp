// Changed columns of a down-projection, sample by sample, and the gradients; see fastedit/ops/sparse_delta.py. Only
// pairs of a row and a slot of one sample are computed. Every element of a result is one sum in the order of the slots
// or rows, so nothing depends on the number of threads.
#include "gemm.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

// The sums of this many vectors stay in registers during the loop over the slots, or rows.
constexpr int64_t VECTORS = 4;

inline float exact(float value) { return value; }
inline double exact(double value) { return value; }
inline float exact(Bf16 value) { return wide(value); }
inline float exact(Fp16 value) { return wide(value); }

// The sample that row or slot `number` belongs to: the last that starts at or before it and is not empty.
int64_t sample_of(const int64_t *starts, int64_t n_samples, int64_t number) {
    int64_t low = 0, high = n_samples;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        (starts[middle] <= number ? low : high) = middle;
    }
    return low;
}

// to[d] = scale * sum over i of factor(i) * from[i * stride + d]
template <class T, class Factor>
void combine(T *to, const T *from, int64_t stride, int64_t count, int64_t d_model, T scale, const Factor &factor) {
    typedef typename Vector<T>::type V;
    constexpr int64_t lanes = FASTEDIT_BYTES / sizeof(T), together = VECTORS * lanes;
    int64_t d = 0;
    for (; d + together <= d_model; d += together) {
        V sums[VECTORS] = {};
        for (int64_t i = 0; i < count; ++i) {
            const T weight = factor(i);
            for (int64_t v = 0; v < VECTORS; ++v) sums[v] += weight * load_as<V>(from + i * stride + d + v * lanes);
        }
        for (int64_t v = 0; v < VECTORS; ++v) store_as(to + d + v * lanes, scale * sums[v]);
    }
    for (; d < d_model; ++d) {
        T sum = 0;
        for (int64_t i = 0; i < count; ++i) sum += factor(i) * from[i * stride + d];
        to[d] = scale * sum;
    }
}

template <class T>
T dot(const T *left, const T *right, int64_t size) {
    typedef typename Vector<T>::type V;
    constexpr int64_t lanes = FASTEDIT_BYTES / sizeof(T);
    V sums[VECTORS] = {};
    int64_t d = 0;
    for (; d + VECTORS * lanes <= size; d += VECTORS * lanes)
        for (int64_t v = 0; v < VECTORS; ++v)
            sums[v] += load_as<V>(left + d + v * lanes) * load_as<V>(right + d + v * lanes);
    const V all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    T total = 0;
    for (int64_t lane = 0; lane < lanes; ++lane) total += all[lane];
    for (; d < size; ++d) total += left[d] * right[d];
    return total;
}

template <class T, class A>
void run(const SparseDelta &a) {
    const A *activations = static_cast<const A *>(a.activations);
    const T *delta = static_cast<const T *>(a.delta);
    const T scale = static_cast<T>(a.scale);
#pragma omp parallel for num_threads(a.threads) schedule(static)
    for (int64_t p = 0; p < a.n_rows; ++p) {
        const int64_t sample = sample_of(a.row_starts, a.n_samples, p);
        const int64_t first = a.slot_starts[sample], count = a.slot_starts[sample + 1] - first;
        const A *row = activations + p * a.activation_row;
        const int64_t *index = a.index + first;
        combine(static_cast<T *>(a.y) + p * a.d_model, delta + first * a.d_model, a.d_model, count, a.d_model, scale,
                [row, index](int64_t r) { return static_cast<T>(exact(row[index[r]])); });
    }
}

template <class T, class A>
void run_grads(const SparseDelta &a) {
    const A *activations = static_cast<const A *>(a.activations);
    const T *delta = static_cast<const T *>(a.delta), *grad = static_cast<const T *>(a.grad);
    const T scale = static_cast<T>(a.scale);
#pragma omp parallel num_threads(a.threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t p = 0; p < a.n_rows; ++p) {
            const int64_t sample = sample_of(a.row_starts, a.n_samples, p);
            T *into = static_cast<T *>(a.grad_activations) + p * a.d_ff;
            // A column named by several slots adds up.
            for (int64_t r = a.slot_starts[sample]; r < a.slot_starts[sample + 1]; ++r)
                into[a.index[r]] += scale * dot(delta + r * a.d_model, grad + p * a.d_model, a.d_model);
        }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < a.n_slots; ++r) {
            const int64_t sample = sample_of(a.slot_starts, a.n_samples, r);
            const int64_t first = a.row_starts[sample], count = a.row_starts[sample + 1] - first;
            const A *column = activations + first * a.activation_row + a.index[r];
            const int64_t stride = a.activation_row;
            combine(static_cast<T *>(a.grad_delta) + r * a.d_model, grad + first * a.d_model, a.d_model, count,
                    a.d_model, scale, [column, stride](int64_t p) { return static_cast<T>(exact(column[p * stride])); });
        }
    }
}

}  // namespace

void sparse_delta(const SparseDelta &a) {
    if (a.delta_type == F64) return run<double, double>(a);
    if (a.activation_type == BF16) return run<float, Bf16>(a);
    if (a.activation_type == F16) return run<float, Fp16>(a);
    run<float, float>(a);
}

void sparse_delta_grads(const SparseDelta &a) {
    if (a.delta_type == F64) return run_grads<double, double>(a);
    if (a.activation_type == BF16) return run_grads<float, Bf16>(a);
    if (a.activation_type == F16) return run_grads<float, Fp16>(a);
    run_grads<float, float>(a);
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
