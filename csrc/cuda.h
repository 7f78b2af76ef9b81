// The CUDA kernels as their bindings see them: plain C++, so that the bindings compile without CUDA's headers.
//
// A launcher enqueues its kernels on the stream, a cudaStream_t, and returns null, or the text of the error. Pointers
// are to device memory; strides are in elements, not bytes. Sizes are checked in fastedit/ops/<op>.py.

#pragma once

#include <cstdint>

namespace fastedit::cuda {

// The order is that of TYPES in fastedit/ops/cuda/__init__.py.
enum Type : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };
// The order is that of ACTIVATIONS in fastedit/ops/capture_keys.py.
enum Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };
// The order is that of RULES in fastedit/ops/cuda/select_neurons.py.
enum Rule : int { kTopK = 0, kReaching = 1, kWithin = 2 };

// Why no kernel can run in this process, or null.
const char* problem();

// data is null for an argument that is None.
struct Vector {
  void* data;
  int type;
  std::int64_t stride;
};

struct Matrix {
  void* data;
  int type;
  std::int64_t row, column;
};

// (n_edits, n_templates, d_ff)
struct Rows {
  void* data;
  int type;
  std::int64_t edit, tmpl, neuron;
};

// keys (n_edits, d_ff) and mass (d_ff,), both float32 and contiguous, from gate and up, of one type but float64.
struct CaptureKeys {
  Rows gate, up;
  // (n_templates,) float32; (n_edits,) bool
  Vector weights, active;
  float *keys, *mass;
  int n_edits, n_templates, d_ff, activation;
};
const char* capture_keys(const CaptureKeys& arguments, void* stream);

// The chosen indices, ascending, in index (d_ff,), and in status (3,) their number, the number of scores that are NaN
// or Inf, and the number of negative ones. Where one of the last two is an error, the first is 0.
struct SelectNeurons {
  Vector score;
  int d_ff, rule, top_k;
  double share;
  std::int64_t *index, *status;
};
const char* select_neurons(const SelectNeurons& arguments, void* stream);

// out (k, k) = weight * moment[S, S] + history[S, S] + past[:, S]^T past[:, S] + keys[:, S]^T keys[:, S], symmetric to
// the bit. moment, history, past and keys are all float32 or all float64; products and sums are taken in the type of
// out, in the order of the edits. out may be moment. Where `count` is not null, k is read there in device memory, and
// capacity is its bound. With packed, A[i, j] is at i * k + j, whatever the strides of out.
struct MaskedGram {
  Matrix moment, keys, past, history, out;
  Vector active, index;
  const std::int64_t* count;
  double weight;
  int n_edits, n_past, d_ff, capacity, packed;
};
const char* masked_gram(const MaskedGram& arguments, void* stream);

// The three above in one cooperative launch. The score is the mass, the keys and the index of the matrix are those
// written before, and its count is the first of the status. Rows must be readable 16 bytes at a time.
const char* system_chain(const CaptureKeys& capture, const SelectNeurons& select, const MaskedGram& gram, void* stream);

// weight[:, S] += residual^T solution^T, in float32 (float64 for a float64 weight), rounded once. weight and master are
// (d_model, d_ff), the master in the dtype of the sums; residual (n_edits, d_model) and solution (width, n_edits) are
// float32 or float64. `ascending`, of one element in device memory, is scratch; null where there is no index. Equal
// neurons of the index add up.
struct ApplyDelta {
  Matrix weight, master, residual, solution;
  Vector index;
  int* ascending;
  int d_model, d_ff, width, n_edits;
};
const char* apply_delta(const ApplyDelta& arguments, void* stream);

// One Adam step in place; all of one type, float32 or float64. delta, grad and the moments are (n, d), decay and radius
// (n,); bias1 = 1 - beta1^step, bias2 = 1 - beta2^step.
struct SparseAdam {
  Matrix delta, grad, moment1, moment2;
  Vector decay, radius;
  double lr, beta1, beta2, eps, bias1, bias2;
  int n, d;
};
const char* sparse_adam(const SparseAdam& arguments, void* stream);

}  // namespace fastedit::cuda
