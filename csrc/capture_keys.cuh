// Keys of a strip of neurons for every edit, and their mass: one pass over the gate and up rows.
//
// kLanes neighbouring threads hold neighbouring neurons, 16 bytes each where the rows allow it; the other threads of
// the block hold other edits. The mass is added up by each thread over its own edits in their order, then over the
// threads in theirs: no atomics, so equal inputs give equal bits.

#pragma once

#include "cuda.cuh"

namespace fastedit::cuda {

constexpr int kCaptureThreads = 256;

// One branch for all values of a thread.
template <int kVector>
__host__ __device__ inline void activate(float (&gate)[kVector], int activation) {
  if (activation == kSilu) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) gate[v] = gate[v] / (1.0f + expf(-gate[v]));
  } else if (activation == kGelu) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) gate[v] = 0.5f * gate[v] * (1.0f + erff(gate[v] * 0.70710678118654752f));
  } else if (activation == kGeluTanh) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const float inner = 0.79788456080286536f * (gate[v] + 0.044715f * gate[v] * gate[v] * gate[v]);
      gate[v] = 0.5f * gate[v] * (1.0f + tanhf(inner));
    }
  } else {
    // Not fmaxf, which would turn NaN into 0.
#pragma unroll
    for (int v = 0; v < kVector; ++v) gate[v] = gate[v] < 0.0f ? 0.0f : gate[v];
  }
}

// Neurons of a thread, and threads side by side: 128 bytes of a row where 16-byte reads are possible.
template <class T, bool kWide>
struct Strip {
  static constexpr int kVector = kWide ? Piece<T>::kSize : 1;
  static constexpr int kLanes = kWide ? 8 : 32;
  static constexpr int kGroups = kCaptureThreads / kLanes;
  static constexpr int kWidth = kVector * kLanes;
};

template <class T, bool kWide>
struct CaptureShared {
  float mass[Strip<T, kWide>::kGroups][Strip<T, kWide>::kWidth];
};

template <class T, bool kWide>
__device__ void read_row(const Rows& rows, int edit, int tmpl, int neuron, int d_ff,
                         float (&value)[Strip<T, kWide>::kVector]) {
  const T* row = static_cast<const T*>(rows.data) + edit * rows.edit + tmpl * rows.tmpl;
  constexpr int kVector = Strip<T, kWide>::kVector;
  if (kWide && neuron + kVector <= d_ff) {
    const Piece<T> piece = *reinterpret_cast<const Piece<T>*>(row + neuron);
#pragma unroll
    for (int v = 0; v < kVector; ++v) value[v] = widen(piece.value[v]);
    return;
  }
#pragma unroll
  for (int v = 0; v < kVector; ++v) value[v] = neuron + v < d_ff ? widen(row[(neuron + v) * rows.neuron]) : 0.0f;
}

template <int kVector>
__device__ void write_keys(const CaptureKeys& in, int edit, int neuron, const float (&key)[kVector]) {
  float* row = in.keys + static_cast<std::int64_t>(edit) * in.d_ff + neuron;
  if (kVector % 4 == 0 && in.d_ff % 4 == 0 && neuron + kVector <= in.d_ff) {
#pragma unroll
    for (int v = 0; v + 3 < kVector; v += 4) {
      *reinterpret_cast<float4*>(row + v) = make_float4(key[v], key[v + 1], key[v + 2], key[v + 3]);
    }
    return;
  }
#pragma unroll
  for (int v = 0; v < kVector; ++v) {
    if (neuron + v < in.d_ff) row[v] = key[v];
  }
}

template <class T, bool kWide>
__device__ void capture_strip(const CaptureKeys& in, int strip, CaptureShared<T, kWide>& shared) {
  using Shape = Strip<T, kWide>;
  const int lane = static_cast<int>(threadIdx.x) % Shape::kLanes;
  const int group = static_cast<int>(threadIdx.x) / Shape::kLanes;
  const int neuron = strip * Shape::kWidth + lane * Shape::kVector;
  const bool* active = static_cast<const bool*>(in.active.data);
  float mass[Shape::kVector] = {};
  for (int edit = group; group < Shape::kGroups && neuron < in.d_ff && edit < in.n_edits;
       edit += Shape::kGroups) {
    float key[Shape::kVector] = {};
#pragma unroll 2
    for (int tmpl = 0; tmpl < in.n_templates; ++tmpl) {
      float gate[Shape::kVector], up[Shape::kVector];
      read_row<T, kWide>(in.gate, edit, tmpl, neuron, in.d_ff, gate);
      if (in.up.data != nullptr) read_row<T, kWide>(in.up, edit, tmpl, neuron, in.d_ff, up);
      activate(gate, in.activation);
      const float weight = static_cast<const float*>(in.weights.data)[tmpl * in.weights.stride];
#pragma unroll
      for (int v = 0; v < Shape::kVector; ++v) key[v] += weight * (in.up.data != nullptr ? gate[v] * up[v] : gate[v]);
    }
    const bool counted = active == nullptr || active[edit * in.active.stride];
    write_keys<Shape::kVector>(in, edit, neuron, key);
#pragma unroll
    for (int v = 0; v < Shape::kVector; ++v) mass[v] += counted ? fabsf(key[v]) : 0.0f;
  }
  // A launch with more threads leaves the others idle here, so that sums are taken in the same order everywhere.
#pragma unroll
  for (int v = 0; v < Shape::kVector && group < Shape::kGroups; ++v) {
    shared.mass[group][lane * Shape::kVector + v] = mass[v];
  }
  __syncthreads();
  for (int place = threadIdx.x; place < Shape::kWidth; place += kCaptureThreads) {
    float sum = 0.0f;
    for (int other = 0; other < Shape::kGroups; ++other) sum += shared.mass[other][place];
    if (strip * Shape::kWidth + place < in.d_ff) in.mass[strip * Shape::kWidth + place] = sum;
  }
  __syncthreads();
}

// Whether every row of `rows` can be read 16 bytes at a time.
template <class T>
inline bool wide_rows(const Rows& rows) {
  if (rows.data == nullptr) return true;
  const bool aligned = reinterpret_cast<std::uintptr_t>(rows.data) % 16 == 0;
  return aligned && rows.neuron == 1 && rows.edit % Piece<T>::kSize == 0 && rows.tmpl % Piece<T>::kSize == 0;
}

}  // namespace fastedit::cuda
