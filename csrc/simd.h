// Vectors of the instruction set that this file is compiled for. Everything is in its namespace: a function shared
// between object files of different instruction sets could be linked from the wrong one.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fastedit {
namespace FASTEDIT_ISA {

#if defined(__AVX512F__)
#define FASTEDIT_BYTES 64
#elif defined(__AVX2__)
#define FASTEDIT_BYTES 32
#else
#define FASTEDIT_BYTES 16
#endif

typedef float VecF __attribute__((vector_size(FASTEDIT_BYTES)));
typedef double VecD __attribute__((vector_size(FASTEDIT_BYTES)));
typedef int32_t VecI __attribute__((vector_size(FASTEDIT_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(FASTEDIT_BYTES)));
typedef uint16_t VecH __attribute__((vector_size(FASTEDIT_BYTES / 2)));

constexpr int64_t LANES = FASTEDIT_BYTES / sizeof(float);

template <class To, class From>
static inline To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "sizes differ");
    To to;
    __builtin_memcpy(&to, &from, sizeof(to));
    return to;
}

template <class V, class T>
static inline V load_as(const T *from) {
    V value;
    __builtin_memcpy(&value, from, sizeof(value));
    return value;
}

template <class V, class T>
static inline void store_as(T *to, V value) {
    __builtin_memcpy(to, &value, sizeof(value));
}

static inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Element types as stored; `wide` is the exact float32 value.
struct Bf16 {
    uint16_t raw;
};
struct Fp16 {
    uint16_t raw;
};

static inline float wide(float value) { return value; }
static inline float wide(double value) { return static_cast<float>(value); }
static inline float wide(Bf16 value) { return bits<float>(static_cast<uint32_t>(value.raw) << 16); }
static inline float wide(Fp16 value) {
#if defined(__F16C__)
    return _cvtsh_ss(value.raw);
#else
    // The exponent is moved by a product, which takes subnormals along; Inf and NaN keep the largest exponent.
    const uint32_t magnitude = static_cast<uint32_t>(value.raw & 0x7fff) << 13;
    uint32_t moved = bits<uint32_t>(bits<float>(magnitude) * 0x1p112f);
    if (magnitude >= 0x0f800000u) moved = magnitude | 0x7f800000u;
    return bits<float>(moved | static_cast<uint32_t>(value.raw & 0x8000) << 16);
#endif
}

// To the nearest, ties to even.
static inline void narrow(float value, float *to) { *to = value; }
static inline void narrow(float value, Bf16 *to) {
    const uint32_t raw = bits<uint32_t>(value);
    // A NaN must not be rounded up to Inf.
    to->raw = value != value ? static_cast<uint16_t>(raw >> 16 | 0x40)
                             : static_cast<uint16_t>((raw + 0x7fff + (raw >> 16 & 1)) >> 16);
}
static inline void narrow(float value, Fp16 *to) {
#if defined(__F16C__)
    to->raw = _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT);
#else
    const uint32_t raw = bits<uint32_t>(value), magnitude = raw & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000) {
        half = 0x7e00;
    } else if (magnitude >= 0x477ff000) {
        half = 0x7c00;
    } else if (magnitude < 0x38800000) {
        // A sum with 1/2 leaves the subnormal's bits, rounded by the hardware, at the end of the mantissa.
        half = bits<uint32_t>(bits<float>(magnitude) + 0.5f) - 0x3f000000;
    } else {
        half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    }
    to->raw = static_cast<uint16_t>(half | (raw >> 16 & 0x8000));
#endif
}

static inline VecF load(const float *from) { return load_as<VecF>(from); }
static inline VecF load(const Bf16 *from) {
    return bits<VecF>(__builtin_convertvector(load_as<VecH>(from), VecU) << 16);
}
static inline VecF load(const Fp16 *from) {
#if defined(__AVX512F__)
    return bits<VecF>(_mm512_cvtph_ps(load_as<__m256i>(from)));
#elif defined(__F16C__)
    return bits<VecF>(_mm256_cvtph_ps(load_as<__m128i>(from)));
#else
    VecF value;
    for (int64_t lane = 0; lane < LANES; ++lane) value[lane] = wide(from[lane]);
    return value;
#endif
}

static inline VecF absolute(VecF x) { return bits<VecF>(bits<VecU>(x) & 0x7fffffffu); }

// The smaller and the larger; a NaN in x stays.
static inline VecF at_most(VecF x, float bound) {
#if defined(__AVX512F__)
    return bits<VecF>(_mm512_min_ps(_mm512_set1_ps(bound), bits<__m512>(x)));
#elif defined(__AVX2__)
    return bits<VecF>(_mm256_min_ps(_mm256_set1_ps(bound), bits<__m256>(x)));
#else
    return x > bound ? VecF{} + bound : x;
#endif
}
static inline VecF at_least(VecF x, float bound) {
#if defined(__AVX512F__)
    return bits<VecF>(_mm512_max_ps(_mm512_set1_ps(bound), bits<__m512>(x)));
#elif defined(__AVX2__)
    return bits<VecF>(_mm256_max_ps(_mm256_set1_ps(bound), bits<__m256>(x)));
#else
    return x < bound ? VecF{} + bound : x;
#endif
}

// 1 / x for normal x whose inverse is normal: the hardware's 14 bits and one Newton step, within two units in the last
// place, in less than half the time of a division of 16 lanes.
static inline VecF inverse(VecF x) {
#if defined(__AVX512F__)
    const VecF rough = bits<VecF>(_mm512_rcp14_ps(bits<__m512>(x)));
    return rough + rough * (1.0f - x * rough);
#else
    return 1.0f / x;
#endif
}

// e^x to about one unit in the last place, for |x| up to 87; beyond it the value at the bound; for NaN, anything.
static inline VecF exponential(VecF x) {
    x = at_least(at_most(x, 87.0f), -87.0f);
    // Adding 1.5 * 2^23 rounds to an integer, which stands in the last bits.
    const VecF shifted = x * 1.44269504f + 12582912.0f;
    const VecF whole = shifted - 12582912.0f;
    // ln 2 in two parts: the first has few bits, so that its product is exact.
    VecF rest = x - whole * 0.693359375f;
    rest = rest + whole * 2.12194440e-4f;
    // e^r = 1 + r + r^2 q(r), q by least squares of the relative error over |r| <= ln(2) / 2: 1.2e-7 at most.
    VecF sum = VecF{} + 0.00833383767f;
    sum = sum * rest + 0.041898624f;
    sum = sum * rest + 0.166668865f;
    sum = sum * rest + 0.499991422f;
    sum = sum * rest + 1.0f;
    sum = sum * rest + 1.0f;
    // Times 2^whole: the shift drops all but the whole number, which goes into the exponent.
    return bits<VecF>(bits<VecI>(sum) + (bits<VecI>(shifted) << 23));
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
