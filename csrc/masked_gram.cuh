// One 128 x 128 tile of A = weight * C[S, S] + H[S, S] + P_S^T P_S + K_S^T K_S, gathered on the fly, and its mirror.
//
// Only tiles on and below the diagonal are computed. A warp owns rows of the tile and its lanes neighbouring columns:
// keys of a row are broadcast from shared memory, and the gathers from C and H and the writes to A are coalesced. The
// mirror image goes through shared memory, 32 columns at a time, so that its writes are coalesced too.

#pragma once

#include "cuda.cuh"

namespace fastedit::cuda {

constexpr int kGramTile = 128;

// float64 takes twice the threads with half the rows each: the same number of registers for sums.
template <class Out>
constexpr int kGramThreads = sizeof(Out) == 4 ? 256 : 512;
// Edits per step of the product.
constexpr int kGramDepth = 8;

template <class Out>
struct GramShared {
  // Number of neurons, and the strides of the result.
  int size;
  std::int64_t out_row, out_column;
  int neuron[2][kGramTile];
  union {
    alignas(16) Out staged[2][kGramDepth][kGramTile];
    // One more than the tile: a warp writes along the first index, and 32 rows must not share a bank.
    Out turned[kWarpSize][kGramTile + 1];
  };
};

// Tiles of the lower triangle in rows: 0 is (0, 0), 1 is (1, 0), 2 is (1, 1), 3 is (2, 0).
__host__ __device__ inline std::int64_t triangle_size(std::int64_t rows) { return rows * (rows + 1) / 2; }

__host__ __device__ inline std::int64_t triangle_row(std::int64_t tile) {
  std::int64_t row = static_cast<std::int64_t>((sqrt(8.0 * static_cast<double>(tile) + 1.0) - 1.0) * 0.5);
  // The square root may be off by one place either way.
  while (triangle_size(row) > tile) --row;
  while (triangle_size(row + 1) <= tile) ++row;
  return row;
}

template <class In, class Out>
struct GramTile {
  static constexpr int kThreads = kGramThreads<Out>;
  static constexpr int kWarps = kThreads / kWarpSize;
  static constexpr int kDepth = kGramDepth;
  static constexpr int kRows = kGramTile / kWarps;
  static constexpr int kColumns = kGramTile / kWarpSize;
  static constexpr int kBatch = 32 / sizeof(In);
  static constexpr int kUnrolled = sizeof(In) + sizeof(Out) == 8 ? 2 : 1;
  static constexpr int kFetched = kDepth * kGramTile / kThreads;

  const MaskedGram& in;
  GramShared<Out>& shared;
  const int lane, warp;
  Out sum[kRows][kColumns];
  In ahead[2][kFetched];

  __device__ GramTile(const MaskedGram& arguments, GramShared<Out>& memory)
      : in(arguments),
        shared(memory),
        lane(static_cast<int>(threadIdx.x) % kWarpSize),
        warp(static_cast<int>(threadIdx.x) / kWarpSize) {}

  __device__ void run(int tile_row, int tile_column) {
    __syncthreads();
    for (int place = threadIdx.x; place < 2 * kGramTile; place += kThreads) {
      const int at = (place < kGramTile ? tile_row : tile_column) * kGramTile + place % kGramTile;
      shared.neuron[place / kGramTile][place % kGramTile] = at < shared.size ? neuron_at(in.index, at, in.d_ff) : -1;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) sum[r][c] = Out(0);
    }
    multiply(in.past, in.n_past, nullptr);
    multiply(in.keys, in.n_edits, static_cast<const bool*>(in.active.data));
    const bool diagonal = tile_row == tile_column;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) finish(tile_row * kGramTile, tile_column * kGramTile, c, diagonal);
  }

  // A thread fetches keys of one row neuron and one column neuron, of every (threads / tile)-th edit.
  __device__ void fetch(const Matrix& rows, int n_rows, const bool* active, int start) {
    const int place = static_cast<int>(threadIdx.x) % kGramTile;
    const int first = static_cast<int>(threadIdx.x) / kGramTile;
    const In* keys = static_cast<const In*>(rows.data);
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int neuron = shared.neuron[side][place];
      const In* column = keys + neuron * rows.column;
#pragma unroll
      for (int i = 0; i < kFetched; ++i) {
        const int edit = start + first + i * (kThreads / kGramTile);
        const bool wanted = neuron >= 0 && edit < n_rows && (active == nullptr || active[edit * in.active.stride]);
        ahead[side][i] = wanted ? column[edit * rows.row] : In(0);
      }
    }
  }

  __device__ void stage() {
    const int place = static_cast<int>(threadIdx.x) % kGramTile;
    const int first = static_cast<int>(threadIdx.x) / kGramTile;
#pragma unroll
    for (int side = 0; side < 2; ++side) {
#pragma unroll
      for (int i = 0; i < kFetched; ++i) {
        shared.staged[side][first + i * (kThreads / kGramTile)][place] =
            static_cast<Out>(ahead[side][i]);
      }
    }
  }

  // Adds the products of the active rows to `sum`, in their order. The keys of the next step are on their way while
  // those of this one are multiplied.
  __device__ void multiply(const Matrix& rows, int n_rows, const bool* active) {
    if (n_rows > 0) fetch(rows, n_rows, active, 0);
    for (int start = 0; start < n_rows; start += kDepth) {
      __syncthreads();
      stage();
      __syncthreads();
      if (start + kDepth < n_rows) fetch(rows, n_rows, active, start + kDepth);
#pragma unroll kUnrolled
      for (int depth = 0; depth < kDepth; ++depth) {
        Out column[kColumns];
#pragma unroll
        for (int c = 0; c < kColumns; ++c) column[c] = shared.staged[1][depth][lane + c * kWarpSize];
        const Piece<Out>* row = reinterpret_cast<const Piece<Out>*>(&shared.staged[0][depth][warp * kRows]);
#pragma unroll
        for (int r = 0; r < kRows; r += Piece<Out>::kSize) {
          const Piece<Out> piece = row[r / Piece<Out>::kSize];
#pragma unroll
          for (int i = 0; i < Piece<Out>::kSize; ++i) {
#pragma unroll
            for (int c = 0; c < kColumns; ++c) sum[r + i][c] += piece.value[i] * column[c];
          }
        }
      }
    }
  }

  // Adds C and H to 32 columns of the tile and writes them and their mirror image. The sums pass through shared memory,
  // so that the gathers run in a loop, kBatch of each on their way at once, and need no registers of the other columns.
  __device__ void finish(int above, int left, int c, bool diagonal) {
    Out* out = static_cast<Out*>(in.out.data);
    // The keys of the last step, or the mirror image of the last 32 columns, may still be read.
    __syncthreads();
#pragma unroll
    for (int r = 0; r < kRows; ++r) shared.turned[lane][warp * kRows + r] = sum[r][c];
    __syncwarp();
#pragma unroll 1
    for (int first = warp * kRows; first < (warp + 1) * kRows; first += kBatch) {
      gather(above + first, left, first, lane + c * kWarpSize, diagonal);
    }
    __syncthreads();
#pragma unroll 1
    for (int turned = warp; turned < kWarpSize; turned += kWarps) {
      const int column = turned + c * kWarpSize;
#pragma unroll
      for (int place = lane; place < kGramTile; place += kWarpSize) {
        if (diagonal && place == column) continue;
        if (!inside(shared.neuron[0][place], shared.neuron[1][column], place, column, diagonal)) continue;
        out[(left + column) * shared.out_row + (above + place) * shared.out_column] = shared.turned[turned][place];
      }
    }
  }

  __device__ void gather(int above, int left, int first, int column, bool diagonal) {
    const In* moment = static_cast<const In*>(in.moment.data);
    const In* history = static_cast<const In*>(in.history.data);
    Out* out = static_cast<Out*>(in.out.data);
    const int neuron = shared.neuron[1][column];
    In found[kBatch], past[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int other = shared.neuron[0][first + i];
      const bool wanted = inside(other, neuron, first + i, column, diagonal);
      found[i] = wanted ? moment[other * in.moment.row + neuron * in.moment.column] : In(0);
      past[i] = wanted && history != nullptr ? history[other * in.history.row + neuron * in.history.column] : In(0);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      Out value = static_cast<Out>(in.weight) * static_cast<Out>(found[i]);
      if (history != nullptr) value += static_cast<Out>(past[i]);
      value += shared.turned[lane][first + i];
      shared.turned[lane][first + i] = value;
      if (!inside(shared.neuron[0][first + i], neuron, first + i, column, diagonal)) continue;
      out[(above + i) * shared.out_row + (left + column) * shared.out_column] = value;
    }
  }

  // On the diagonal only elements on and below it are computed: the rest is their mirror image.
  static __device__ bool inside(int row_neuron, int column_neuron, int row, int column, bool diagonal) {
    return row_neuron >= 0 && column_neuron >= 0 && (!diagonal || row >= column);
  }
};

// Every block takes each gridDim-th tile; a tile past the count of neurons is nothing to do.
template <class In, class Out>
__device__ void gram_tiles(const MaskedGram& in, GramShared<Out>& shared) {
  const int size = in.count == nullptr || *in.count > in.capacity ? in.capacity : static_cast<int>(*in.count);
  if (threadIdx.x == 0) {
    shared.size = size;
    shared.out_row = in.packed ? size : in.out.row;
    shared.out_column = in.packed ? 1 : in.out.column;
  }
  const std::int64_t tiles = triangle_size(ceil_div(size, kGramTile));
  for (std::int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int row = static_cast<int>(triangle_row(tile));
    GramTile<In, Out>(in, shared).run(row, static_cast<int>(tile - triangle_size(row)));
  }
}

}  // namespace fastedit::cuda
