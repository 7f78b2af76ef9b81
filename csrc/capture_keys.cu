// Keys and mass from gate and up rows; the strip is in capture_keys.cuh.

#include "capture_keys.cuh"

namespace fastedit::cuda {

template <class T, bool kWide>
__global__ void __launch_bounds__(kCaptureThreads) capture_keys_kernel(CaptureKeys arguments) {
  __shared__ CaptureShared<T, kWide> shared;
  capture_strip<T, kWide>(arguments, static_cast<int>(blockIdx.x), shared);
}

template <class T>
static const char* launch_capture_keys(const CaptureKeys& in, void* stream) {
  if (wide_rows<T>(in.gate) && wide_rows<T>(in.up)) {
    const std::int64_t strips = ceil_div(in.d_ff, Strip<T, true>::kWidth);
    return launch(strips, kCaptureThreads, stream, capture_keys_kernel<T, true>, in);
  }
  const std::int64_t strips = ceil_div(in.d_ff, Strip<T, false>::kWidth);
  return launch(strips, kCaptureThreads, stream, capture_keys_kernel<T, false>, in);
}

const char* capture_keys(const CaptureKeys& arguments, void* stream) {
  if (arguments.d_ff == 0) return nullptr;
  if (arguments.gate.type == kFloat32) return launch_capture_keys<float>(arguments, stream);
  if (arguments.gate.type == kBFloat16) return launch_capture_keys<__nv_bfloat16>(arguments, stream);
  if (arguments.gate.type == kFloat16) return launch_capture_keys<__half>(arguments, stream);
  return kWrongType;
}

}  // namespace fastedit::cuda
