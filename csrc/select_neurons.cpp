// Exact selection without a sort; see fastedit/ops/select_neurons.py. Histograms of 8 or 11 bits each over ever fewer
// candidates find the score at which the descending order is cut.
#include "gemm.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

// Bits of a histogram: few scores are counted faster than many buckets are emptied.
constexpr int FEW = 8, MANY = 11;

template <class T>
struct RankOf;
template <>
struct RankOf<float> {
    typedef uint32_t type;
};
template <>
struct RankOf<double> {
    typedef uint64_t type;
};

// Numbers in the order of the scores. -0.0 becomes +0.0: they are equal scores.
template <class T, class Rank = typename RankOf<T>::type>
inline Rank rank_of(T score) {
    constexpr Rank sign = Rank(1) << (8 * sizeof(Rank) - 1);
    const Rank raw = bits<Rank>(score + T(0));
    return raw & sign ? ~raw : raw | sign;
}

template <class T, class Rank>
inline double score_of(Rank rank) {
    constexpr Rank sign = Rank(1) << (8 * sizeof(Rank) - 1);
    return bits<T>(rank & sign ? rank & ~sign : ~rank);
}

// How much of the descending order is taken, by number or by summed score.
struct Budget {
    bool by_mass, reaching;
    int64_t count;
    double mass;

    // Whether the cut lies below `size` more scores summing to `more`, after `taken` that sum to `summed`.
    bool covers(int64_t taken, double summed, int64_t size, double more) const {
        if (!by_mass) return taken + size < count;
        return reaching ? summed + more < mass : summed + more <= mass;
    }
};

// The score at the cut, and how many of the scores equal to it are taken, smallest index first.
template <class Rank>
struct Cut {
    Rank rank;
    int64_t ties;
};

template <class T, class Rank>
Cut<Rank> find_cut(const Rank *ranks, int64_t n, const Budget &budget, Rank *candidates) {
    const int digit = n < 8192 ? FEW : MANY;
    const size_t buckets = size_t(1) << digit;
    Scratch<int64_t> sizes(buckets);
    Scratch<double> sums(buckets);
    int64_t taken = 0;
    double summed = 0;
    Rank prefix = 0;
    for (int high = 8 * sizeof(Rank); high > 0; high -= digit) {
        const int shift = high > digit ? high - digit : 0;
        const Rank mask = (Rank(1) << (high - shift)) - 1;
        std::memset(sizes.data, 0, buckets * sizeof(int64_t));
        std::memset(sums.data, 0, buckets * sizeof(double));
        if (budget.by_mass) {
            for (int64_t i = 0; i < n; ++i) {
                const Rank bucket = ranks[i] >> shift & mask;
                ++sizes.data[bucket];
                sums.data[bucket] += score_of<T>(ranks[i]);
            }
        } else {
            for (int64_t i = 0; i < n; ++i) ++sizes.data[ranks[i] >> shift & mask];
        }
        const auto occupied = [&sizes](int64_t bucket) {
            while (bucket >= 0 && sizes.data[bucket] == 0) --bucket;
            return bucket;
        };
        int64_t cut = occupied(static_cast<int64_t>(mask));
        while (cut >= 0 && budget.covers(taken, summed, sizes.data[cut], sums.data[cut])) {
            const int64_t next = occupied(cut - 1);
            // By rounding of the sums even the last bucket is covered: the cut is at its end.
            if (next < 0) break;
            taken += sizes.data[cut];
            summed += sums.data[cut];
            cut = next;
        }
        prefix |= static_cast<Rank>(max64(cut, 0)) << shift;
        int64_t kept = 0;
        for (int64_t i = 0; i < n; ++i) {
            const Rank rank = ranks[i];
            candidates[kept] = rank;
            kept += (rank >> shift & mask) == static_cast<Rank>(cut);
        }
        ranks = candidates;
        n = kept;
    }
    if (!budget.by_mass) return {prefix, budget.count - taken};
    const double score = score_of<T>(prefix);
    int64_t ties = 0;
    while (ties < n && (budget.reaching ? summed < budget.mass : summed + score <= budget.mass)) {
        summed += score;
        ++ties;
    }
    // At least one neuron, also where every score is 0 or the largest alone is too much.
    return {prefix, ties == 0 && taken == 0 ? 1 : ties};
}

template <class T>
int64_t run(const SelectNeurons &a) {
    typedef typename RankOf<T>::type Rank;
    const T *score = static_cast<const T *>(a.score);
    const bool by_mass = a.share >= 0, all = a.share >= 1;
    Scratch<Rank> ranks(2 * a.n);
    for (int64_t i = 0; i < a.n; ++i) ranks.data[i] = rank_of(score[i]);
    double total = 0;
    if (by_mass) {
        for (int64_t i = 0; i < a.n; ++i) total += score[i];
    }
    Cut<Rank> cut{0, a.n};
    if (!all) cut = find_cut<T>(ranks.data, a.n, Budget{by_mass, a.reaching, a.count, a.share * total}, ranks.data + a.n);
    int64_t found = 0;
    for (int64_t i = 0; i < a.n; ++i) {
        const bool tie = ranks.data[i] == cut.rank && cut.ties > 0;
        a.index[found] = i;
        found += ranks.data[i] > cut.rank || tie;
        cut.ties -= tie;
    }
    return found;
}

}  // namespace

int64_t select_neurons(const SelectNeurons &a) { return a.type == F64 ? run<double>(a) : run<float>(a); }

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
