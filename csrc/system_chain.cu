// From gate and up rows to the system matrix in one cooperative launch: capture_keys on every block, select_neurons on
// the first, masked_gram on every block, with a barrier of the whole grid between them.

#include <cooperative_groups.h>

#include "capture_keys.cuh"
#include "masked_gram.cuh"
#include "select_neurons.cuh"

namespace fastedit::cuda {

template <class T, class Out>
union ChainShared {
  CaptureShared<T, true> capture;
  SelectShared select;
  GramShared<Out> gram;
};

template <class T, class Out>
__global__ void __launch_bounds__(kGramThreads<Out>, sizeof(Out) == 4 ? 2 : 1)
    system_chain_kernel(CaptureKeys capture, SelectNeurons select, MaskedGram gram) {
  __shared__ ChainShared<T, Out> shared;
  const cooperative_groups::grid_group grid = cooperative_groups::this_grid();
  const int strips = static_cast<int>(ceil_div(capture.d_ff, Strip<T, true>::kWidth));
  for (int strip = blockIdx.x; strip < strips; strip += gridDim.x) {
    capture_strip<T, true>(capture, strip, shared.capture);
  }
  grid.sync();
  if (blockIdx.x == 0) Selector<float>(select, shared.select).run();
  grid.sync();
  gram_tiles<float, Out>(gram, shared.gram);
}

template <class T, class Out>
static const char* launch_chain(const CaptureKeys& capture, const SelectNeurons& select, const MaskedGram& gram,
                                void* stream) {
  int device = 0, multiprocessors = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, system_chain_kernel<T, Out>, kGramThreads<Out>, 0);
  }
  if (error != cudaSuccess) return text_of(error);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  // A barrier of the grid needs every block on the device at once.
  config.gridDim = dim3(static_cast<unsigned>(multiprocessors * resident));
  config.blockDim = dim3(kGramThreads<Out>);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return text_of(cudaLaunchKernelEx(&config, system_chain_kernel<T, Out>, capture, select, gram));
}

template <class T>
static const char* launch_chain(const CaptureKeys& capture, const SelectNeurons& select, const MaskedGram& gram,
                                void* stream) {
  if (!wide_rows<T>(capture.gate) || !wide_rows<T>(capture.up)) return "the rows cannot be read 16 bytes at a time";
  if (gram.out.type == kFloat32) return launch_chain<T, float>(capture, select, gram, stream);
  return launch_chain<T, double>(capture, select, gram, stream);
}

const char* system_chain(const CaptureKeys& capture, const SelectNeurons& select, const MaskedGram& gram,
                         void* stream) {
  if (gram.moment.type != kFloat32) return kWrongType;
  if (capture.gate.type == kFloat32) return launch_chain<float>(capture, select, gram, stream);
  if (capture.gate.type == kBFloat16) return launch_chain<__nv_bfloat16>(capture, select, gram, stream);
  if (capture.gate.type == kFloat16) return launch_chain<__half>(capture, select, gram, stream);
  return kWrongType;
}

}  // namespace fastedit::cuda
