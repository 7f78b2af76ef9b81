// Keys and mass in one pass over gate and up; see fastedit/ops/capture_keys.py. Every column is summed over templates
// and over edits in their order, so the result does not depend on the number of threads.
#include "simd.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

// Columns of one tile: 8 KB of float32 per row, so that the sum over templates stays in the first-level cache.
constexpr int64_t WIDTH = 2048;

template <Activation A>
inline VecF activate(VecF x) {
    if constexpr (A == RELU) {
        // Written so that NaN passes.
        return x < 0.0f ? VecF{} : x;
    } else if constexpr (A == SILU) {
        return x * inverse(exponential(-x) + 1.0f);
    } else if constexpr (A == GELU_TANH) {
        // x (1 + tanh u) / 2 = x / (1 + e^(-2u)),  2u = 2 sqrt(2 / pi) (x + 0.044715 x^3)
        return x * inverse(exponential(-1.59576912f * (x + 0.044715f * x * x * x)) + 1.0f);
    } else {
        // x Phi(x); Phi(-|x|) = erfc(z) / 2 with z = |x| / sqrt(2), erfc(z) = e^(-z^2) P(t), t = 1 / (1 + z / 2).
        // P: least squares of the relative error over z in [0, 10], 3.5e-8 at most.
        const VecF z = absolute(x) * 0.707106781f;
        const VecF t = inverse(z * 0.5f + 1.0f);
        VecF p = VecF{} - 0.0559511338f;
        p = p * t + 0.268459413f;
        p = p * t - 0.451375678f;
        p = p * t + 0.233258053f;
        p = p * t + 0.00801104456f;
        p = p * t + 0.185588562f;
        p = p * t + 0.248475403f;
        p = p * t + 0.281342946f;
        p = p * t + 0.282196283f;
        p = p * t - 4.92599399e-06f;
        const VecF tail = 0.5f * p * exponential(-z * z);
        return x * (x < 0.0f ? tail : 1.0f - tail);
    }
}

template <class T, Activation A>
inline VecF product(const T *gate, const T *up) {
    const VecF value = activate<A>(load(gate));
    return up ? value * load(up) : value;
}

// sums += weight * activation(gate) * up over `width` columns.
template <class T, Activation A>
void add_template(float *sums, const T *gate, const T *up, float weight, int64_t width) {
    int64_t j = 0;
    for (; j + LANES <= width; j += LANES)
        store_as(sums + j, load(sums + j) + weight * product<T, A>(gate + j, up ? up + j : nullptr));
    if (j == width) return;
    T last_gate[LANES] = {}, last_up[LANES] = {};
    float last[LANES] = {};
    const size_t left = static_cast<size_t>(width - j);
    std::memcpy(last_gate, gate + j, left * sizeof(T));
    std::memcpy(last, sums + j, left * sizeof(float));
    if (up) std::memcpy(last_up, up + j, left * sizeof(T));
    store_as(last, load(last) + weight * product<T, A>(last_gate, up ? last_up : nullptr));
    std::memcpy(sums + j, last, left * sizeof(float));
}

template <class T, Activation A>
void run(const CaptureKeys &a) {
    if (a.d_ff == 0) return;
    const T *gate = static_cast<const T *>(a.gate), *up = static_cast<const T *>(a.up);
    // As many tiles as threads, or a multiple of it.
    const int64_t rounds = ceil_div(a.d_ff, a.threads * WIDTH);
    const int64_t tile = ceil_div(ceil_div(a.d_ff, rounds * a.threads), LANES) * LANES;
#pragma omp parallel for num_threads(a.threads) schedule(static)
    for (int64_t start = 0; start < a.d_ff; start += tile) {
        const int64_t width = min64(tile, a.d_ff - start);
        float *mass = a.mass + start;
        std::memset(mass, 0, static_cast<size_t>(width) * sizeof(float));
        for (int64_t i = 0; i < a.n_edits; ++i) {
            float *sums = a.keys + i * a.d_ff + start;
            std::memset(sums, 0, static_cast<size_t>(width) * sizeof(float));
            for (int64_t t = 0; t < a.n_templates; ++t) {
                const T *one = gate + i * a.gate_edit + t * a.gate_template + start;
                const T *other = up ? up + i * a.up_edit + t * a.up_template + start : nullptr;
                add_template<T, A>(sums, one, other, a.weights[t], width);
            }
            if (a.active && !a.active[i]) continue;
            for (int64_t j = 0; j < width; ++j) mass[j] += __builtin_fabsf(sums[j]);
        }
    }
}

template <class T>
void run(const CaptureKeys &a) {
    switch (a.activation) {
        case SILU: return run<T, SILU>(a);
        case GELU: return run<T, GELU>(a);
        case GELU_TANH: return run<T, GELU_TANH>(a);
        case RELU: return run<T, RELU>(a);
    }
}

}  // namespace

void capture_keys(const CaptureKeys &a) {
    if (a.type == BF16) return run<Bf16>(a);
    if (a.type == F16) return run<Fp16>(a);
    run<float>(a);
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
