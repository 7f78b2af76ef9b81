// W[:, S] += R^T X^T in place: one 128 x 128 tile of the update per block, added to the weight as it leaves the
// registers and rounded once.
//
// A warp owns rows of the tile and its lanes neighbouring neurons, so that reads and writes of W are coalesced as far
// as the chosen neurons lie together.

#include "cuda.cuh"

namespace fastedit::cuda {

constexpr int kDeltaTile = 128;
constexpr int kDeltaDepth = 8;
// Breaks up the banks when eight edits of a neuron are stored side by side, and keeps rows on 16 bytes.
constexpr int kDeltaPitch = kDeltaTile + 4;

template <class Sum>
constexpr int kDeltaThreads = sizeof(Sum) == 4 ? 256 : 512;

template <class Sum>
struct DeltaShared {
  // The neuron of a column, -1 where there is nothing to write; its first place in the index; how often it is there.
  int neuron[kDeltaTile], first[kDeltaTile], times[kDeltaTile];
  union {
    alignas(16) Sum staged[2][kDeltaDepth][kDeltaPitch];
    Sum sums[kDeltaTile][kWarpSize];
  };
};

template <class Sum>
__device__ Sum read_wide(const Matrix& from, std::int64_t at) {
  if (from.type == kFloat64) return static_cast<Sum>(static_cast<const double*>(from.data)[at]);
  return static_cast<Sum>(static_cast<const float*>(from.data)[at]);
}

template <class W, class Sum>
struct DeltaTile {
  static constexpr int kThreads = kDeltaThreads<Sum>;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kRows = kDeltaTile / kWarps;
  static constexpr int kColumns = kDeltaTile / kWarpSize;
  static constexpr int kFetched = kDeltaDepth * kDeltaTile / kThreads;
  static constexpr int kBatch = sizeof(Sum) == 4 ? 8 : 2;

  const ApplyDelta& in;
  DeltaShared<Sum>& shared;
  const int above, left, lane, warp;
  Sum sum[kRows][kColumns];
  Sum ahead[2][kFetched];

  __device__ DeltaTile(const ApplyDelta& arguments, DeltaShared<Sum>& memory, int tile, int across)
      : in(arguments),
        shared(memory),
        above(tile / across * kDeltaTile),
        left(tile % across * kDeltaTile),
        lane(static_cast<int>(threadIdx.x) % kWarpSize),
        warp(static_cast<int>(threadIdx.x) / kWarpSize) {}

  __device__ void run() {
    find_neurons();
    multiply();
#pragma unroll
    for (int c = 0; c < kColumns; ++c) add(c);
  }

  __device__ void find_neurons() {
    for (int place = threadIdx.x; place < kDeltaTile; place += kThreads) {
      const int at = left + place;
      shared.neuron[place] = at < in.width ? neuron_at(in.index, at, in.d_ff) : -1;
      shared.first[place] = at;
      shared.times[place] = 1;
    }
    __syncthreads();
    if (in.ascending == nullptr || *in.ascending != 0) return;
    // Only the first of equal neurons writes its column: see `update_of`.
    const int place = static_cast<int>(threadIdx.x) % kDeltaTile;
    for (int at = static_cast<int>(threadIdx.x) / kDeltaTile; at < in.width; at += kThreads / kDeltaTile) {
      if (at == left + place || neuron_at(in.index, at, in.d_ff) != shared.neuron[place]) continue;
      atomicMin(&shared.first[place], at);
      atomicAdd(&shared.times[place], 1);
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < kDeltaTile && shared.first[place] != left + place) shared.neuron[place] = -1;
    __syncthreads();
  }

  // X at a place and an edit; for a neuron that is there more than once the sum over its places, in their order.
  __device__ Sum update_of(int place, int edit) const {
    Sum value = read_wide<Sum>(in.solution, (left + place) * in.solution.row + edit * in.solution.column);
    if (shared.times[place] == 1) return value;
    for (int at = left + place + 1; at < in.width; ++at) {
      if (neuron_at(in.index, at, in.d_ff) != shared.neuron[place]) continue;
      value += read_wide<Sum>(in.solution, at * in.solution.row + edit * in.solution.column);
    }
    return value;
  }

  // Where the i-th value that a thread fetches of side 0 (R) or 1 (X) belongs. Neighbouring threads take neighbouring
  // addresses: rows of R; of X the edits of a neuron, or neurons if those are contiguous.
  __device__ void place_of(int side, int i, int& place, int& depth) const {
    const int at = static_cast<int>(threadIdx.x) + i * kThreads;
    const bool along_edits = side == 1 && in.solution.column == 1;
    place = along_edits ? at / kDeltaDepth : at % kDeltaTile;
    depth = along_edits ? at % kDeltaDepth : at / kDeltaTile;
  }

  __device__ void fetch(int start) {
#pragma unroll
    for (int i = 0; i < kFetched; ++i) {
      int place, depth;
      place_of(0, i, place, depth);
      const int row = above + place, edit = start + depth;
      const bool wanted = row < in.d_model && edit < in.n_edits;
      ahead[0][i] = wanted ? read_wide<Sum>(in.residual, edit * in.residual.row + row * in.residual.column) : Sum(0);
      place_of(1, i, place, depth);
      ahead[1][i] = shared.neuron[place] >= 0 && start + depth < in.n_edits ? update_of(place, start + depth) : Sum(0);
    }
  }

  // Leaves R^T X^T in `sum`, added up in the order of the edits. The operands of the next step are on their way while
  // those of this one are multiplied.
  __device__ void multiply() {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum[r][c] = Sum(0);
    }
    if (in.n_edits > 0) fetch(0);
#pragma unroll 1
    for (int start = 0; start < in.n_edits; start += kDeltaDepth) {
      __syncthreads();
#pragma unroll
      for (int side = 0; side < 2; ++side) {
#pragma unroll
        for (int i = 0; i < kFetched; ++i) {
          int place, depth;
          place_of(side, i, place, depth);
          shared.staged[side][depth][place] = ahead[side][i];
        }
      }
      __syncthreads();
      if (start + kDeltaDepth < in.n_edits) fetch(start + kDeltaDepth);
#pragma unroll(sizeof(Sum) == 4 ? 2 : 1)
      for (int depth = 0; depth < kDeltaDepth; ++depth) {
        Sum column[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) column[c] = shared.staged[1][depth][lane + c * kWarpSize];
        const Piece<Sum>* row = reinterpret_cast<const Piece<Sum>*>(&shared.staged[0][depth][warp * kRows]);
#pragma unroll
        for (int r = 0; r < kRows; r += Piece<Sum>::kSize) {
          const Piece<Sum> piece = row[r / Piece<Sum>::kSize];
#pragma unroll
          for (int i = 0; i < Piece<Sum>::kSize; ++i) {
#pragma unroll
            for (int c = 0; c < kColumns; ++c) sum[r + i][c] += piece.value[i] * column[c];
          }
        }
      }
    }
    __syncthreads();
  }

  // Adds one column of each row of this warp to the weight. The sums pass through shared memory, each read by the
  // thread that wrote it, so that the rest is a loop and needs no registers of the other columns.
  __device__ void add(int c) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) shared.sums[warp * kRows + r][lane] = sum[r][c];
    const int place = lane + c * kWarpSize;
    if (shared.neuron[place] < 0) return;
#pragma unroll 1
    for (int first = warp * kRows; first < (warp + 1) * kRows; first += kBatch) add_batch(first, place);
  }

  __device__ void add_batch(int first, int place) {
    const std::int64_t neuron = shared.neuron[place];
    W* weight = static_cast<W*>(in.weight.data) + neuron * in.weight.column;
    Sum* master = static_cast<Sum*>(in.master.data);
    W old[kBatch];
    Sum wide[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = above + first + i;
      if (row >= in.d_model) continue;
      old[i] = weight[row * in.weight.row];
      if (master != nullptr) wide[i] = master[row * in.master.row + neuron * in.master.column];
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int row = above + first + i;
      if (row >= in.d_model) continue;
      const Sum value = (master != nullptr ? wide[i] : static_cast<Sum>(widen(old[i]))) + shared.sums[first + i][lane];
      if (master != nullptr) master[row * in.master.row + neuron * in.master.column] = value;
      narrow(value, weight[row * in.weight.row]);
    }
  }
};

// Two blocks fit on a multiprocessor with float32 sums, one of twice the threads with float64.
template <class W, class Sum>
__global__ void __launch_bounds__(kDeltaThreads<Sum>, sizeof(Sum) == 4 ? 2 : 1) apply_delta_kernel(ApplyDelta in) {
  __shared__ DeltaShared<Sum> shared;
  const int across = static_cast<int>(ceil_div(in.width, kDeltaTile));
  DeltaTile<W, Sum>(in, shared, static_cast<int>(blockIdx.x), across).run();
}

// Whether every neuron of the index is larger than the one before it.
__global__ void __launch_bounds__(1024) ascending_kernel(Vector index, int width, int* ascending) {
  const std::int64_t* neurons = static_cast<const std::int64_t*>(index.data);
  bool out_of_order = false;
  for (int at = threadIdx.x + 1; at < width; at += blockDim.x) {
    out_of_order = out_of_order || neurons[at * index.stride] <= neurons[(at - 1) * index.stride];
  }
  const bool any = __syncthreads_or(out_of_order) != 0;
  if (threadIdx.x == 0) *ascending = any ? 0 : 1;
}

template <class W, class Sum>
static const char* launch_apply_delta(const ApplyDelta& in, void* stream) {
  const std::int64_t tiles = ceil_div(in.d_model, kDeltaTile) * ceil_div(in.width, kDeltaTile);
  return launch(tiles, kDeltaThreads<Sum>, stream, apply_delta_kernel<W, Sum>, in);
}

const char* apply_delta(const ApplyDelta& in, void* stream) {
  if (in.d_model == 0 || in.width == 0) return nullptr;
  if (in.ascending != nullptr) {
    const char* error = launch(1, 1024, stream, ascending_kernel, in.index, in.width, in.ascending);
    if (error != nullptr) return error;
  }
  if (in.weight.type == kFloat32) return launch_apply_delta<float, float>(in, stream);
  if (in.weight.type == kBFloat16) return launch_apply_delta<__nv_bfloat16, float>(in, stream);
  if (in.weight.type == kFloat16) return launch_apply_delta<__half, float>(in, stream);
  if (in.weight.type == kFloat64) return launch_apply_delta<double, double>(in, stream);
  return kWrongType;
}

}  // namespace fastedit::cuda
