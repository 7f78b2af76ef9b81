// One Adam step with the penalty's gradient and the norm bound folded in; see fastedit/ops/sparse_adam.py. A row is
// read once, its norms are sums in float64 in the order of its elements, and no row depends on another.
#include "gemm.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

// Elements below which a second thread costs more than it saves.
constexpr int64_t PER_THREAD = 16384;

template <class T>
double norm(const T *row, int64_t d) {
    double sums[8] = {};
    int64_t j = 0;
    for (; j + 8 <= d; j += 8)
        for (int64_t lane = 0; lane < 8; ++lane) sums[lane] += static_cast<double>(row[j + lane]) * row[j + lane];
    for (; j < d; ++j) sums[j % 8] += static_cast<double>(row[j]) * row[j];
    return __builtin_sqrt(((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7])));
}

// A power of two that takes lengths beyond 2^64 or below 2^-64 back to the middle of float32's range, else 1.
inline double lift_of(double length) { return length > 0x1p64 ? 0x1p-64 : length < 0x1p-64 ? 0x1p64 : 1.0; }

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

template <class T>
void run(const SparseAdam &a) {
    const T beta1 = static_cast<T>(a.beta1), rest1 = static_cast<T>(1 - a.beta1);
    const T beta2 = static_cast<T>(a.beta2), rest2 = static_cast<T>(1 - a.beta2);
    const double steps = static_cast<double>(a.step);
    const T unbias1 = static_cast<T>(1 - __builtin_pow(a.beta1, steps));
    const T unbias2 = static_cast<T>(1 - __builtin_pow(a.beta2, steps));
    const T lr = static_cast<T>(a.lr), eps = static_cast<T>(a.eps);
    const int threads = static_cast<int>(max64(1, min64(a.threads, a.n * a.d / PER_THREAD)));
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < a.n; ++i) {
        T *__restrict delta = static_cast<T *>(a.delta) + i * a.d;
        T *__restrict moment1 = static_cast<T *>(a.moment1) + i * a.d;
        T *__restrict moment2 = static_cast<T *>(a.moment2) + i * a.d;
        const T *__restrict grad = static_cast<const T *>(a.grad) + i * a.d;
        T pull = 0, lift = 1;
        if (a.decay) {
            const double length = norm(delta, a.d);
            lift = static_cast<T>(lift_of(length));
            if (length > 0) pull = static_cast<T>(static_cast<const T *>(a.decay)[i] / (length * lift));
        }
        for (int64_t j = 0; j < a.d; ++j) {
            // Without a penalty the gradient keeps its bits: 0 times an infinite delta would be NaN.
            const T g = pull != 0 ? grad[j] + pull * (delta[j] * lift) : grad[j];
            moment1[j] = beta1 * moment1[j] + rest1 * g;
            moment2[j] = beta2 * moment2[j] + rest2 * g * g;
            // A quotient of a large moment by a small bias overflows though its root does not.
            const bool large = moment2[j] > 1;
            const T down = large ? T(0x1p-64) : T(1), up = large ? T(0x1p32) : T(1);
            delta[j] -= lr * (moment1[j] / unbias1) / (root(moment2[j] * down / unbias2) * up + eps);
        }
        if (!a.radius) continue;
        const double length = norm(delta, a.d), radius = static_cast<const T *>(a.radius)[i];
        if (!(length > radius)) continue;
        const T shrink = static_cast<T>(radius / length);
        for (int64_t j = 0; j < a.d; ++j) delta[j] *= shrink;
    }
}

}  // namespace

void sparse_adam(const SparseAdam &a) {
    if (a.type == F64) return run<double>(a);
    run<float>(a);
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
