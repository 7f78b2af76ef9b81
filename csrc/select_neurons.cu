// Selection of neurons by score in one block; the method is in select_neurons.cuh.

#include "select_neurons.cuh"

namespace fastedit::cuda {

constexpr int kSelectThreads = 1024;

template <class T>
__global__ void __launch_bounds__(kSelectThreads) select_neurons_kernel(SelectNeurons arguments) {
  __shared__ SelectShared shared;
  Selector<T>(arguments, shared).run();
}

template <class T>
static const char* launch_select_neurons(const SelectNeurons& in, void* stream) {
  const std::int64_t wanted = ceil_div(in.d_ff, kWarpSize) * kWarpSize;
  const int threads = wanted < kSelectThreads ? static_cast<int>(wanted) : kSelectThreads;
  return launch(1, threads, stream, select_neurons_kernel<T>, in);
}

const char* select_neurons(const SelectNeurons& arguments, void* stream) {
  if (arguments.d_ff == 0) return nullptr;
  if (arguments.score.type == kFloat32) return launch_select_neurons<float>(arguments, stream);
  if (arguments.score.type == kFloat64) return launch_select_neurons<double>(arguments, stream);
  if (arguments.score.type == kBFloat16) return launch_select_neurons<__nv_bfloat16>(arguments, stream);
  if (arguments.score.type == kFloat16) return launch_select_neurons<__half>(arguments, stream);
  return kWrongType;
}

}  // namespace fastedit::cuda
