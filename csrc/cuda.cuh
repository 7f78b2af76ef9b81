// Shared by the CUDA kernels: conversions, 16-byte pieces, and a launch that reports its error.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda.h"

namespace fastedit::cuda {

constexpr int kWarpSize = 32;

// 16 bytes, the widest access of a thread.
template <class T>
struct alignas(16) Piece {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

__host__ __device__ inline float widen(float value) { return value; }
__host__ __device__ inline double widen(double value) { return value; }
__host__ __device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
__host__ __device__ inline float widen(__half value) { return __half2float(value); }

// Each rounds once, to nearest, ties to even.
__device__ inline void narrow(float value, float& result) { result = value; }
__device__ inline void narrow(float value, __nv_bfloat16& result) { result = __float2bfloat16_rn(value); }
__device__ inline void narrow(float value, __half& result) { result = __float2half_rn(value); }
__device__ inline void narrow(double value, float& result) { result = static_cast<float>(value); }
__device__ inline void narrow(double value, double& result) { result = value; }
__device__ inline void narrow(double value, __nv_bfloat16& result) { result = __double2bfloat16(value); }
__device__ inline void narrow(double value, __half& result) { result = __double2half(value); }

__host__ __device__ constexpr std::int64_t ceil_div(std::int64_t value, std::int64_t by) {
  return (value + by - 1) / by;
}

// The neuron at a place of the index (null: the place itself). One outside the layer stops the kernel, as torch's own
// gathers do.
__device__ inline int neuron_at(const Vector& index, int place, int d_ff) {
  if (index.data == nullptr) return place;
  const std::int64_t neuron = static_cast<const std::int64_t*>(index.data)[place * index.stride];
  if (neuron < 0 || neuron >= d_ff) __trap();
  return static_cast<int>(neuron);
}

inline const char* text_of(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

constexpr const char* kWrongType = "no kernel for these dtypes";

template <class... Parameters, class... Arguments>
const char* launch(std::int64_t blocks, int threads, void* stream, void (*kernel)(Parameters...),
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  return text_of(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace fastedit::cuda
