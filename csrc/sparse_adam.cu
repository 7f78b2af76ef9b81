// One Adam step over the rows of (n, d) deltas, one block per row, with the norm penalty and the norm bound folded in.
//
// Norms are added per thread over its elements in order, then over a fixed tree of threads: equal inputs, equal bits.

#include "cuda.cuh"

namespace fastedit::cuda {

constexpr int kAdamThreads = 256;

// The sum of a value over the block, the same in every thread; `memory` has a place per warp.
template <class T>
__device__ T block_sum(T value, T* memory) {
#pragma unroll
  for (int apart = kWarpSize / 2; apart > 0; apart /= 2) value += __shfl_xor_sync(~0u, value, apart);
  __syncthreads();
  if (threadIdx.x % kWarpSize == 0) memory[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  T sum = 0;
#pragma unroll
  for (int warp = 0; warp < kAdamThreads / kWarpSize; ++warp) sum += memory[warp];
  return sum;
}

// The root of a sum of squares over the block; where they vanish or overflow in T, of the sum in float64.
template <class T>
__device__ T block_length(T squares, double wide, T* memory, double* wide_memory) {
  const T sum = block_sum(squares, memory);
  if (sum > T(1e-30) && sum < T(1e36)) return sqrt(sum);
  return static_cast<T>(sqrt(block_sum(wide, wide_memory)));
}

template <class T>
__device__ T& element(const Matrix& of, std::int64_t row, std::int64_t column) {
  return static_cast<T*>(of.data)[row * of.row + column * of.column];
}

template <class T>
__global__ void __launch_bounds__(kAdamThreads) sparse_adam_kernel(SparseAdam in) {
  __shared__ T memory[kAdamThreads / kWarpSize];
  __shared__ double wide_memory[kAdamThreads / kWarpSize];
  const std::int64_t row = blockIdx.x;
  const T beta1 = static_cast<T>(in.beta1), beta2 = static_cast<T>(in.beta2);
  const T rest1 = static_cast<T>(1 - in.beta1), rest2 = static_cast<T>(1 - in.beta2);
  const T bias1 = static_cast<T>(in.bias1), bias2 = static_cast<T>(in.bias2);
  const T lr = static_cast<T>(in.lr), eps = static_cast<T>(in.eps);
  T decay = 0, norm = 0;
  if (in.decay.data != nullptr) {
    decay = static_cast<const T*>(in.decay.data)[row * in.decay.stride];
    T squares = 0;
    double wide = 0;
    for (int column = threadIdx.x; column < in.d; column += kAdamThreads) {
      const T value = element<T>(in.delta, row, column);
      squares += value * value;
      wide += static_cast<double>(value) * value;
    }
    norm = block_length(squares, wide, memory, wide_memory);
  }
  T squares = 0;
  double wide = 0;
  for (int column = threadIdx.x; column < in.d; column += kAdamThreads) {
    T& delta = element<T>(in.delta, row, column);
    T& moment1 = element<T>(in.moment1, row, column);
    T& moment2 = element<T>(in.moment2, row, column);
    T grad = element<T>(in.grad, row, column);
    if (norm > 0) grad += decay * delta / norm;
    const T mean = beta1 * moment1 + rest1 * grad;
    const T spread = beta2 * moment2 + rest2 * grad * grad;
    // A quotient of a large moment by a small bias overflows though its root does not.
    const T down = spread > T(1) ? T(0x1p-64) : T(1), up = spread > T(1) ? T(0x1p32) : T(1);
    const T value = delta - lr * (mean / bias1) / (sqrt(spread * down / bias2) * up + eps);
    moment1 = mean;
    moment2 = spread;
    delta = value;
    squares += value * value;
    wide += static_cast<double>(value) * value;
  }
  if (in.radius.data == nullptr) return;
  const T radius = static_cast<const T*>(in.radius.data)[row * in.radius.stride];
  const T after = block_length(squares, wide, memory, wide_memory);
  if (!(after > radius)) return;
  for (int column = threadIdx.x; column < in.d; column += kAdamThreads) {
    element<T>(in.delta, row, column) *= radius / after;
  }
}

const char* sparse_adam(const SparseAdam& in, void* stream) {
  if (in.n == 0 || in.d == 0) return nullptr;
  if (in.delta.type == kFloat32) return launch(in.n, kAdamThreads, stream, sparse_adam_kernel<float>, in);
  if (in.delta.type == kFloat64) return launch(in.n, kAdamThreads, stream, sparse_adam_kernel<double>, in);
  return kWrongType;
}

}  // namespace fastedit::cuda
