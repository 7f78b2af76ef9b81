// Exact selection of neurons by one block: a radix select on order-preserving bits, one bit a round, then one pass
// that writes the chosen indices in ascending order.
//
// The rounds find the score of the last neuron that is taken: the largest one at which the scores from it upwards are
// enough, by count (top_k) or by sum (the two shares). Sums are taken in float64, each over the same tree of threads,
// so equal inputs give equal bits. Among equal scores the smallest indices are taken.

#pragma once

#include "cuda.cuh"

namespace fastedit::cuda {

constexpr int kMaxWarps = 32;

struct Tally {
  int count;
  double mass;
};

struct SelectShared {
  Tally tally[2][kMaxWarps];
  int above[kMaxWarps], equal[kMaxWarps];
  std::uint64_t only;
};

// Words whose unsigned order is the order of the scores, and back; the two zeros are equal. No finite score is 0.
template <class T>
struct Ordered;

template <>
struct Ordered<float> {
  using Word = std::uint32_t;
  static __device__ Word word(float score) {
    const Word bits = __float_as_uint(score + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
  }
  static __device__ float score(Word word) { return __uint_as_float(word >> 31 ? word & 0x7fffffffu : ~word); }
};

template <>
struct Ordered<double> {
  using Word = std::uint64_t;
  static __device__ Word word(double score) {
    const Word bits = static_cast<Word>(__double_as_longlong(score + 0.0));
    return bits >> 63 ? ~bits : bits | 0x8000000000000000u;
  }
  static __device__ double score(Word word) {
    return __longlong_as_double(static_cast<long long>(word >> 63 ? word & 0x7fffffffffffffffu : ~word));
  }
};

// The scores are read again in every round: they stay in the first-level cache.
template <class T>
struct Selector {
  using Order = Ordered<decltype(widen(T()))>;
  using Word = typename Order::Word;
  static constexpr int kBits = 8 * sizeof(Word);

  const SelectNeurons& in;
  SelectShared& shared;
  const int lane, warp, warps, steps, first;
  int slot = 0;
  double bound = 0;

  // A warp owns `steps` rows of 32 neighbouring scores.
  __device__ Selector(const SelectNeurons& arguments, SelectShared& memory)
      : in(arguments),
        shared(memory),
        lane(static_cast<int>(threadIdx.x) % kWarpSize),
        warp(static_cast<int>(threadIdx.x) / kWarpSize),
        warps(static_cast<int>(blockDim.x) / kWarpSize),
        steps(static_cast<int>(ceil_div(arguments.d_ff, blockDim.x))),
        first(warp * steps * kWarpSize + lane) {}

  // Past the last score 0, which is no score's word.
  __device__ Word read(int step) const {
    const int place = first + step * kWarpSize;
    if (place >= in.d_ff) return 0;
    return Order::word(widen(static_cast<const T*>(in.score.data)[place * in.score.stride]));
  }

  template <class Visit>
  __device__ void each(Visit visit) const {
#pragma unroll 4
    for (int step = 0; step < steps; ++step) visit(step, read(step));
  }

  static __device__ Tally over_warp(Tally mine) {
#pragma unroll
    for (int apart = kWarpSize / 2; apart > 0; apart /= 2) {
      mine.count += __shfl_xor_sync(~0u, mine.count, apart);
      mine.mass += __shfl_xor_sync(~0u, mine.mass, apart);
    }
    return mine;
  }

  // The same sum in every thread. The two slots take turns, so one barrier is enough.
  __device__ Tally over_block(Tally mine) {
    mine = over_warp(mine);
    slot ^= 1;
    if (lane == 0) shared.tally[slot][warp] = mine;
    __syncthreads();
    return over_warp(lane < warps ? shared.tally[slot][lane] : Tally{0, 0.0});
  }

  __device__ bool enough(Tally taken) const {
    if (in.rule == kTopK) return taken.count >= in.top_k;
    if (in.rule == kReaching) return taken.count > 0 && taken.mass >= bound;
    return taken.mass > bound;
  }

  __device__ void run() {
    // bad: the number of scores that are NaN or Inf and, as its mass, of negative ones.
    Tally bad{0, 0.0}, all{0, 0.0};
    each([&](int, Word word) {
      if (word == 0) return;
      const double score = static_cast<double>(Order::score(word));
      if (!isfinite(score)) ++bad.count;
      if (score < 0) bad.mass += 1;
      all.mass += score;
    });
    bad = over_block(bad);
    if (threadIdx.x == 0) {
      in.status[0] = 0;
      in.status[1] = bad.count;
      in.status[2] = static_cast<std::int64_t>(bad.mass);
    }
    if (bad.count > 0 || (in.rule != kTopK && bad.mass > 0)) return;
    if (in.rule != kTopK) bound = in.share * over_block(all).mass;
    Word last = 0;
    Tally above{0, 0.0};
    const int equal = find_last(last, above);
    const int taken = ties(above, static_cast<double>(Order::score(last)), equal);
    if (threadIdx.x == 0) in.status[0] = above.count + taken;
    write(last, taken);
  }

  // The word of the last neuron taken, what lies above it, and how many scores equal it (0 if all are taken).
  __device__ int find_last(Word& last, Tally& above) {
    int open = in.d_ff;
    for (int bit = kBits - 1; bit >= 0 && open > 0; --bit) {
      if (open == 1) {
        const Word word = only(last >> bit >> 1, bit);
        if (enough({above.count + 1, above.mass + static_cast<double>(Order::score(word))})) {
          last = word;
          return 1;
        }
      }
      const Word wanted = (last | Word(1) << bit) >> bit;
      Tally found{0, 0.0};
      each([&](int, Word word) {
        if (word >> bit != wanted) return;
        ++found.count;
        found.mass += static_cast<double>(Order::score(word));
      });
      found = over_block(found);
      const Tally both{above.count + found.count, above.mass + found.mass};
      if (enough(both)) {
        last |= Word(1) << bit;
        open = found.count;
      } else {
        above = both;
        open -= found.count;
      }
    }
    return open;
  }

  // The one word whose bits above `bit` are `wanted`.
  __device__ Word only(Word wanted, int bit) {
    __syncthreads();
    each([&](int, Word word) {
      if (word != 0 && word >> bit >> 1 == wanted) shared.only = word;
    });
    __syncthreads();
    return static_cast<Word>(shared.only);
  }

  // How many of the scores equal to the last are taken.
  __device__ int ties(Tally above, double score, int equal) const {
    if (equal == 0) return 0;
    if (in.rule == kTopK) return in.top_k - above.count;
    const int least = above.count == 0 ? 1 : 0;
    if (score == 0) return least;
    // A quotient may be off by a rounding: the comparisons decide.
    const double quotient = (bound - above.mass) / score;
    int taken = quotient < equal ? static_cast<int>(quotient) : equal;
    if (in.rule == kReaching) {
      while (taken > 0 && above.mass + (taken - 1) * score >= bound) --taken;
      while (taken < equal && above.mass + taken * score < bound) ++taken;
    } else {
      while (taken > 0 && above.mass + taken * score > bound) --taken;
      while (taken < equal && above.mass + (taken + 1) * score <= bound) ++taken;
    }
    return taken > least ? taken : least;
  }

  // The places of all scores above the last and of the first `taken` equal to it.
  __device__ void write(Word last, int taken) {
    int above = 0, equal = 0;
    each([&](int step, Word word) {
      above += __popc(__ballot_sync(~0u, word > last));
      equal += __popc(__ballot_sync(~0u, word == last));
    });
    if (lane == 0) {
      shared.above[warp] = above;
      shared.equal[warp] = equal;
    }
    __syncthreads();
    above = equal = 0;
    for (int before = 0; before < warp; ++before) {
      above += shared.above[before];
      equal += shared.equal[before];
    }
    const unsigned earlier = (1u << lane) - 1;
    each([&](int step, Word word) {
      const unsigned over = __ballot_sync(~0u, word > last), same = __ballot_sync(~0u, word == last);
      const int over_before = above + __popc(over & earlier), same_before = equal + __popc(same & earlier);
      if (word > last || (word == last && same_before < taken)) {
        in.index[over_before + (same_before < taken ? same_before : taken)] = first + step * kWarpSize;
      }
      above += __popc(over);
      equal += __popc(same);
    });
  }
};

}  // namespace fastedit::cuda
