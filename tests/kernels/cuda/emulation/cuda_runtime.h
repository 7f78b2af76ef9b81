// Runs CUDA kernels on the CPU, so that indices, ties and barriers can be tested where there is no GPU.
//
// Found before the toolkit's header of the same name when a .cu file is compiled with a C++ compiler. Every CUDA thread
// is a coroutine; a block's threads run one after the other until each waits at a barrier or has returned. The order in
// which they run is set by EMULATED_ORDER (forward, backward or shuffled): a result that depends on it lacks a barrier.
// By itself a shuffle lets the threads of all warps catch up, which hides a race between warps. With "warps" a warp runs
// on through its shuffles to the next barrier of the block before the next warp starts, with "warps_backward" the last
// warp does so first.
// Blocks run one after the other, in a cooperative launch each on an operating-system thread of its own.
// A barrier that can never be met is a launch failure.

#pragma once

#include <math.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

// Types and declarations are the toolkit's; what is called of them is defined below.
#include <cuda_runtime_api.h>
#include <vector_functions.h>

#undef __shared__
#undef __launch_bounds__
#define __shared__ static thread_local
#define __launch_bounds__(...)

using std::isfinite;

inline thread_local uint3 threadIdx{}, blockIdx{};
inline thread_local dim3 blockDim, gridDim;

namespace emulation {

constexpr int kWarp = 32;
constexpr std::size_t kStack = 64 * 1024;
enum class Wait { kNone, kWarp, kBlock, kGrid };

struct GridBarrier {
  std::mutex mutex;
  std::condition_variable changed;
  unsigned parties = 1, arrived = 0, generation = 0;
  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const unsigned mine = generation;
    if (++arrived == parties) {
      arrived = 0;
      ++generation;
      changed.notify_all();
    } else {
      changed.wait(lock, [&] { return generation != mine; });
    }
  }
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  Wait wait = Wait::kNone;
  bool done = false;
  uint3 thread{};
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<std::uint64_t> slots;
  ucontext_t scheduler;
  const std::function<void()>* body = nullptr;
  GridBarrier* grid = nullptr;
  int votes = 0;
  std::size_t current = 0;
};

inline thread_local Block* block = nullptr;

inline void wait_at(Wait kind) {
  Fiber& fiber = block->fibers[block->current];
  fiber.wait = kind;
  swapcontext(&fiber.context, &block->scheduler);
}

inline void enter() {
  (*block->body)();
  block->fibers[block->current].done = true;
  swapcontext(&block->fibers[block->current].context, &block->scheduler);
}

// Lets go the fibers in [first, last) if all that have not returned wait at `kind`.
inline bool release(std::size_t first, std::size_t last, Wait kind) {
  bool any = false;
  for (std::size_t at = first; at < last; ++at) {
    const Fiber& fiber = block->fibers[at];
    if (!fiber.done && fiber.wait != kind) return false;
    any = any || !fiber.done;
  }
  if (!any) return false;
  if (kind == Wait::kGrid) block->grid->wait();
  for (std::size_t at = first; at < last; ++at) block->fibers[at].wait = Wait::kNone;
  return true;
}

inline std::vector<std::size_t> running_order(std::size_t count) {
  std::vector<std::size_t> order(count);
  for (std::size_t at = 0; at < count; ++at) order[at] = at;
  const char* wanted = std::getenv("EMULATED_ORDER");
  if (wanted != nullptr && std::string(wanted).find("backward") != std::string::npos) {
    std::reverse(order.begin(), order.end());
  }
  if (wanted != nullptr && std::string(wanted) == "shuffled") {
    std::shuffle(order.begin(), order.end(), std::mt19937(1));
  }
  return order;
}

inline bool run_on(std::size_t at) {
  Fiber& fiber = block->fibers[at];
  if (fiber.done || fiber.wait != Wait::kNone) return false;
  block->current = at;
  threadIdx = fiber.thread;
  swapcontext(&block->scheduler, &fiber.context);
  return true;
}

// Runs the warp at `first` until no thread of it can go on without the other warps.
inline bool run_warp(std::size_t first, std::size_t last) {
  bool moved = false;
  for (bool more = true; more; moved = moved || more) {
    more = false;
    for (std::size_t at = first; at < last; ++at) more = run_on(at) || more;
    more = release(first, last, Wait::kWarp) || more;
  }
  return moved;
}

inline bool warp_by_warp() {
  const char* wanted = std::getenv("EMULATED_ORDER");
  return wanted != nullptr && std::string(wanted).rfind("warps", 0) == 0;
}

inline bool step_all(const std::vector<std::size_t>& order) {
  bool moved = false;
  const bool whole = warp_by_warp();
  for (std::size_t at : order) {
    const std::size_t first = at / kWarp * kWarp;
    moved = (whole ? run_warp(first, std::min(first + kWarp, order.size())) : run_on(at)) || moved;
  }
  for (std::size_t first = 0; first < order.size(); first += kWarp) {
    moved = release(first, std::min(first + kWarp, order.size()), Wait::kWarp) || moved;
  }
  for (Wait kind : {Wait::kBlock, Wait::kGrid}) moved = release(0, order.size(), kind) || moved;
  return moved;
}

inline bool run_block(Block& state, const cudaLaunchConfig_t& config, unsigned index) {
  block = &state;
  blockDim = config.blockDim;
  gridDim = config.gridDim;
  blockIdx = uint3{index, 0, 0};
  const std::size_t threads = config.blockDim.x;
  state.fibers.resize(threads);
  state.slots.assign(threads, 0);
  for (std::size_t at = 0; at < threads; ++at) {
    Fiber& fiber = state.fibers[at];
    fiber.wait = Wait::kNone;
    fiber.done = false;
    fiber.thread = uint3{static_cast<unsigned>(at), 0, 0};
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  const std::vector<std::size_t> order = running_order(threads);
  while (step_all(order)) {
  }
  return std::all_of(state.fibers.begin(), state.fibers.end(), [](const Fiber& fiber) { return fiber.done; });
}

inline cudaError_t run_grid(const cudaLaunchConfig_t& config, const std::function<void()>& body) {
  const unsigned blocks = config.gridDim.x, threads = config.blockDim.x;
  if (blocks == 0 || threads == 0 || threads > 1024 || config.blockDim.y * config.gridDim.y != 1) {
    return cudaErrorInvalidConfiguration;
  }
  bool finished = true;
  if (config.numAttrs == 0) {
    Block state;
    state.body = &body;
    for (unsigned index = 0; index < blocks; ++index) finished = run_block(state, config, index) && finished;
    return finished ? cudaSuccess : cudaErrorLaunchFailure;
  }
  GridBarrier grid;
  grid.parties = blocks;
  std::vector<std::thread> workers;
  for (unsigned index = 0; index < blocks; ++index) {
    workers.emplace_back([&, index] {
      Block state;
      state.body = &body;
      state.grid = &grid;
      if (!run_block(state, config, index)) std::abort();
    });
  }
  for (std::thread& worker : workers) worker.join();
  return cudaSuccess;
}

template <class T>
T from_lane(T value, unsigned lane) {
  static_assert(sizeof(T) <= sizeof(std::uint64_t), "a shuffle moves 4 or 8 bytes");
  const std::size_t mine = block->current, first = mine / kWarp * kWarp;
  std::memcpy(&block->slots[mine], &value, sizeof(T));
  wait_at(Wait::kWarp);
  if (lane < kWarp && first + lane < block->slots.size()) std::memcpy(&value, &block->slots[first + lane], sizeof(T));
  wait_at(Wait::kWarp);
  return value;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait_at(emulation::Wait::kBlock); }
inline void __syncwarp(unsigned = ~0u) { emulation::wait_at(emulation::Wait::kWarp); }

inline int __syncthreads_or(int vote) {
  emulation::block->votes = 0;
  __syncthreads();
  emulation::block->votes |= vote != 0;
  __syncthreads();
  const int result = emulation::block->votes;
  __syncthreads();
  return result;
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::from_lane(value, threadIdx.x % emulation::kWarp ^ static_cast<unsigned>(mask));
}

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::from_lane(value, static_cast<unsigned>(lane));
}

inline unsigned __ballot_sync(unsigned, int vote) {
  unsigned bits = 0;
  for (unsigned lane = 0; lane < emulation::kWarp; ++lane) bits |= (emulation::from_lane(vote, lane) != 0) << lane;
  return bits;
}

inline int atomicAdd(int* at, int value) { return *at += value, *at - value; }
inline int atomicMin(int* at, int value) {
  const int before = *at;
  *at = std::min(before, value);
  return before;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline void __trap() {
  std::fputs("emulated kernel: trap\n", stderr);
  std::abort();
}

template <class T, class To>
To emulated_cast(T value) {
  To result;
  std::memcpy(&result, &value, sizeof(result));
  return result;
}
inline unsigned __float_as_uint(float value) { return emulated_cast<float, unsigned>(value); }
inline float __uint_as_float(unsigned value) { return emulated_cast<unsigned, float>(value); }
inline long long __double_as_longlong(double value) { return emulated_cast<double, long long>(value); }
inline double __longlong_as_double(long long value) { return emulated_cast<long long, double>(value); }

extern "C" {
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "a barrier was never met" : "invalid launch";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 3, cudaSuccess; }
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t) {
  return *blocks = 1, cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const std::function<void()> body = [&] { kernel(static_cast<Parameters>(arguments)...); };
  return emulation::run_grid(*config, body);
}
