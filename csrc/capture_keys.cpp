// Keys and mass in one pass over gate and up; see fastedit/ops/capture_keys.py. Every column is summed over templates
// and over edits in their order, so the result does not depend on the number of threads.
#include "simd.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

// Columns of one tile: 8 KB of float32 per row, so that the sum over templates stays in the first-level cache.
constexpr int64_t WIDTH = 2048;

// Below this the factor of x, as small as e^x, is 0 in float32; `exponential` stops at e^-87, which times -3e38 is not 0.
constexpr float LOWEST = -104.0f;

template <Activation A>
inline VecF activate(VecF x) {
    if constexpr (A == RELU) {
        // Written so that NaN passes.
        return x < 0.0f ? VecF{} : x;
    } else if constexpr (A == SILU) {
        return x * (x < LOWEST ? VecF{} : inverse(exponential(-x) + 1.0f));
    } else if constexpr (A == GELU_TANH) {
        // x (1 + tanh u) / 2 = x / (1 + e^(-2u)),  2u = 2 sqrt(2 / pi) (x + 0.044715 x^3)
        const VecF doubled = 1.59576912f * (x + 0.044715f * x * x * x);
        return x * (x < LOWEST ? VecF{} : inverse(exponential(-doubled) + 1.0f));
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
        return x * (x < LOWEST ? VecF{} : x < 0.0f ? tail : 1.0f - tail);
    }
}

template <class T, Activation A>
inline VecF product(const T *gate, const T *up) {
    const VecF value = activate<A>(load(gate));
    return up ? value * load(up) : value;
}

// sums += weight * activation(gate) * up over `width` columns. The hardware stops reading ahead at the end of a page,
// and a tile's row is about as long as one: the next row, `ahead` elements further on, is prefetched here.
template <class T, Activation A>
void add_template(float *sums, const T *gate, const T *up, float weight, int64_t width, int64_t gate_ahead,
                  int64_t up_ahead) {
    int64_t j = 0;
    for (; j + LANES <= width; j += LANES) {
        __builtin_prefetch(gate + j + gate_ahead);
        if (up) __builtin_prefetch(up + j + up_ahead);
        store_as(sums + j, load(sums + j) + weight * product<T, A>(gate + j, up ? up + j : nullptr));
    }
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

// The key of one edit in columns [start, start + width): the weighted sum over its templates.
template <class T, Activation A>
void capture(const CaptureKeys &a, int64_t edit, int64_t start, int64_t width) {
    const T *gate = static_cast<const T *>(a.gate) + edit * a.gate_edit + start;
    const T *up = a.up ? static_cast<const T *>(a.up) + edit * a.up_edit + start : nullptr;
    float *sums = a.keys + edit * a.d_ff + start;
    std::memset(sums, 0, static_cast<size_t>(width) * sizeof(float));
    for (int64_t t = 0; t < a.n_templates; ++t) {
        // After an edit's last template comes the next edit's first.
        const bool last = t + 1 == a.n_templates;
        const int64_t gate_ahead = last ? a.gate_edit - t * a.gate_template : a.gate_template;
        const int64_t up_ahead = last ? a.up_edit - t * a.up_template : a.up_template;
        add_template<T, A>(sums, gate + t * a.gate_template, up ? up + t * a.up_template : nullptr, a.weights[t], width,
                           gate_ahead, up_ahead);
    }
}

// The mass of columns [start, start + width), edit by edit; their keys were just written.
inline void add_up(const CaptureKeys &a, int64_t start, int64_t width) {
    float *mass = a.mass + start;
    std::memset(mass, 0, static_cast<size_t>(width) * sizeof(float));
    for (int64_t i = 0; i < a.n_edits; ++i) {
        if (a.active && !a.active[i]) continue;
        const float *keys = a.keys + i * a.d_ff + start;
        for (int64_t j = 0; j < width; ++j) mass[j] += __builtin_fabsf(keys[j]);
    }
}

template <class T, Activation A>
void run(const CaptureKeys &a) {
    // OpenMP divides by the step of a loop, which would be 0.
    if (a.d_ff == 0) return;
    const int64_t tiles = ceil_div(a.d_ff, WIDTH);
    const int64_t part = ceil_div(ceil_div(a.d_ff, a.threads), LANES) * LANES;
#pragma omp parallel num_threads(a.threads)
    {
        // A thread reads whole edits, one after the other, as they lie in memory.
#pragma omp for schedule(static)
        for (int64_t task = 0; task < a.n_edits * tiles; ++task) {
            const int64_t start = task % tiles * WIDTH;
            capture<T, A>(a, task / tiles, start, min64(WIDTH, a.d_ff - start));
        }
#pragma omp for schedule(static)
        for (int64_t start = 0; start < a.d_ff; start += part) add_up(a, start, min64(part, a.d_ff - start));
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
