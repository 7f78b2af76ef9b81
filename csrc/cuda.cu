// Whether a device is here and can run the kernels.

#include "cuda.cuh"

namespace fastedit::cuda {

const char* problem() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  // A failed call would be reported by the next launch.
  cudaGetLastError();
  if (error != cudaSuccess) return text_of(error);
  return devices == 0 ? "no device" : nullptr;
}

}  // namespace fastedit::cuda
