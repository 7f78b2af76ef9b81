// Exact selection without a sort; see fastedit/ops/select_neurons.py. Three passes over ever fewer candidates find the
// score at which the descending order is cut: histograms of the highest 11 bits, the next 11, the last 10.
#include "gemm.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

constexpr int PASSES = 3;
constexpr int SHIFT[PASSES] = {21, 10, 0};
constexpr uint32_t BUCKETS[PASSES] = {2048, 2048, 1024};

// Numbers in the order of the scores. -0.0 becomes +0.0: they are equal scores.
inline uint32_t rank_of(float score) {
    const uint32_t raw = bits<uint32_t>(score + 0.0f);
    return raw & 0x80000000u ? ~raw : raw | 0x80000000u;
}

inline double score_of(uint32_t rank) {
    return bits<float>(rank & 0x80000000u ? rank & 0x7fffffffu : ~rank);
}

// The score at the cut, and how many of the scores equal to it are taken, smallest index first.
struct Cut {
    uint32_t rank;
    int64_t ties;
};

// How much of the descending order is taken, first by number, or by summed score.
struct Budget {
    bool by_mass, reaching;
    int64_t count;
    double mass;

    // Whether all of a bucket lies before the cut, the buckets above it summing up to `taken` and `summed`.
    bool covers(int64_t taken, double summed, int64_t size, double mass_of) const {
        if (!by_mass) return taken + size < count;
        return reaching ? summed + mass_of < mass : summed + mass_of <= mass;
    }
};

Cut find_cut(const uint32_t *ranks, int64_t n, const Budget &budget, uint32_t *candidates) {
    Scratch<int64_t> sizes(BUCKETS[0]);
    Scratch<double> sums(BUCKETS[0]);
    int64_t taken = 0;
    double summed = 0;
    uint32_t prefix = 0;
    for (int pass = 0; pass < PASSES; ++pass) {
        const uint32_t mask = BUCKETS[pass] - 1;
        std::memset(sizes.data, 0, BUCKETS[pass] * sizeof(int64_t));
        std::memset(sums.data, 0, BUCKETS[pass] * sizeof(double));
        for (int64_t i = 0; i < n; ++i) {
            const uint32_t bucket = ranks[i] >> SHIFT[pass] & mask;
            ++sizes.data[bucket];
            if (budget.by_mass) sums.data[bucket] += score_of(ranks[i]);
        }
        int64_t cut = mask, lowest = mask;
        while (lowest > 0 && sizes.data[lowest] == 0) --lowest;
        for (cut = lowest; budget.covers(taken, summed, sizes.data[cut], sums.data[cut]);) {
            int64_t next = cut - 1;
            while (next >= 0 && sizes.data[next] == 0) --next;
            // Rounding of the sums only: the whole order is taken.
            if (next < 0) break;
            taken += sizes.data[cut];
            summed += sums.data[cut];
            cut = next;
        }
        prefix |= static_cast<uint32_t>(cut) << SHIFT[pass];
        int64_t kept = 0;
        for (int64_t i = 0; i < n; ++i) {
            candidates[kept] = ranks[i];
            kept += (ranks[i] >> SHIFT[pass] & mask) == static_cast<uint32_t>(cut);
        }
        ranks = candidates;
        n = kept;
    }
    if (!budget.by_mass) return {prefix, budget.count - taken};
    const double score = score_of(prefix);
    int64_t ties = 0;
    if (budget.reaching) {
        while (ties < n && summed < budget.mass) summed += score, ++ties;
        // Enough was summed before rounding says so: the prefix is one longer than what lies above the cut.
        if (ties == 0 && taken == 0) ties = 1;
    } else {
        while (ties < n && summed + score <= budget.mass) summed += score, ++ties;
        if (ties == 0 && taken == 0) ties = 1;
    }
    return {prefix, ties};
}

}  // namespace

int64_t select_neurons(const SelectNeurons &a) {
    Scratch<uint32_t> ranks(2 * a.n);
    double total = 0;
    for (int64_t i = 0; i < a.n; ++i) ranks.data[i] = rank_of(a.score[i]);
    const bool by_mass = a.share >= 0;
    for (int64_t i = 0; by_mass && i < a.n; ++i) total += a.score[i];
    const Budget budget{by_mass, a.reaching, a.count, a.share * total};
    const Cut cut = find_cut(ranks.data, a.n, budget, ranks.data + a.n);
    int64_t found = 0, ties = cut.ties;
    for (int64_t i = 0; i < a.n; ++i) {
        const bool tie = ranks.data[i] == cut.rank && ties > 0;
        a.index[found] = i;
        found += ranks.data[i] > cut.rank || tie;
        ties -= tie;
    }
    return found;
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
