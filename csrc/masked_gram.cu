// The system matrix of a closed-form update; the tile is in masked_gram.cuh.

#include "masked_gram.cuh"

namespace fastedit::cuda {

template <class In, class Out>
__global__ void __launch_bounds__(kGramThreads<Out>, sizeof(Out) == 4 ? 2 : 1)
    masked_gram_kernel(MaskedGram arguments) {
  __shared__ GramShared<Out> shared;
  gram_tiles<In, Out>(arguments, shared);
}

template <class In, class Out>
static const char* launch_masked_gram(const MaskedGram& arguments, void* stream) {
  const std::int64_t tiles = triangle_size(ceil_div(arguments.capacity, kGramTile));
  return launch(tiles, kGramThreads<Out>, stream, masked_gram_kernel<In, Out>, arguments);
}

const char* masked_gram(const MaskedGram& arguments, void* stream) {
  if (arguments.capacity == 0) return nullptr;
  const int from = arguments.moment.type, to = arguments.out.type;
  if (from == kFloat32 && to == kFloat32) return launch_masked_gram<float, float>(arguments, stream);
  if (from == kFloat32 && to == kFloat64) return launch_masked_gram<float, double>(arguments, stream);
  if (from == kFloat64 && to == kFloat32) return launch_masked_gram<double, float>(arguments, stream);
  if (from == kFloat64 && to == kFloat64) return launch_masked_gram<double, double>(arguments, stream);
  return kWrongType;
}

}  // namespace fastedit::cuda
