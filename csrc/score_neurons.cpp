// Contribution scores a[i, j] * <W[:, j], g[i]>, or the best of every slot; see fastedit/ops/score_neurons.py. W is
// read once: by rows in memory order for a few slots, in packed tiles for many. A column's products are summed in order,
// 256 rows at a time, so the result does not depend on the number of threads.
#include "gemm.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

// Slots up to which reading W bounds the time and packing it would cost more than it saves.
constexpr int64_t FEW = 8;
// Columns per task. The sums of a few slots, and a packed tile, stay in the second-level cache.
constexpr int64_t STRIP = 2048, TILE = 256;
// Rows of W that are read together, so that sums are loaded and stored once for all of them.
constexpr int64_t ROWS = 8;

template <class T>
constexpr int64_t WIDE = FASTEDIT_BYTES / sizeof(T);

inline VecD load(const double *from) { return load_as<VecD>(from); }
using FASTEDIT_ISA::load;

// The first `count` elements, zero after them.
template <class T, class W>
inline typename Vector<T>::type load_some(const W *from, int64_t count) {
    if (count >= WIDE<T>) return load(from);
    W some[WIDE<T>] = {};
    std::memcpy(some, from, static_cast<size_t>(count) * sizeof(W));
    return load(some);
}

// A score in the order of the results, above all numbers for NaN, and its neuron.
struct Entry {
    uint64_t rank;
    int64_t neuron;
    bool before(const Entry &other) const {
        return rank != other.rank ? rank > other.rank : neuron < other.neuron;
    }
};

inline uint64_t rank_of(double score) {
    if (score != score) return ~uint64_t(0);
    const uint64_t raw = bits<uint64_t>(score + 0.0), sign = uint64_t(1) << 63;
    return raw & sign ? ~raw : raw | sign;
}

inline void swap(Entry &a, Entry &b) {
    const Entry kept = a;
    a = b;
    b = kept;
}

// Moves the first `k` of the order to the front. No two entries are equal.
void select(Entry *all, int64_t size, int64_t k) {
    int64_t low = 0, high = size - 1;
    while (low < high) {
        const Entry pivot = all[low + (high - low) / 2];
        int64_t i = low, j = high;
        while (i <= j) {
            while (all[i].before(pivot)) ++i;
            while (pivot.before(all[j])) --j;
            if (i <= j) swap(all[i++], all[j--]);
        }
        if (k - 1 <= j)
            high = j;
        else if (k - 1 >= i)
            low = i;
        else
            return;
    }
}

// Heap sort into the order.
void sort(Entry *all, int64_t size) {
    const auto sink = [all](int64_t parent, int64_t end) {
        for (int64_t child; (child = 2 * parent + 1) < end; parent = child) {
            if (child + 1 < end && all[child].before(all[child + 1])) ++child;
            if (!all[parent].before(all[child])) return;
            swap(all[parent], all[child]);
        }
    };
    for (int64_t i = size / 2 - 1; i >= 0; --i) sink(i, size);
    for (int64_t end = size - 1; end > 0; --end) {
        swap(all[0], all[end]);
        sink(0, end);
    }
}

// The best entries that one thread has found for one slot, among columns that come in ascending order.
struct Best {
    Entry *entries;
    int64_t size, room, k;
    uint64_t floor;

    void take(uint64_t rank, int64_t neuron) {
        // Of equal scores the first is kept.
        if (rank <= floor) return;
        entries[size++] = {rank, neuron};
        if (size < room) return;
        select(entries, size, k);
        size = k;
        floor = ~uint64_t(0);
        for (int64_t i = 0; i < k; ++i) floor = entries[i].rank < floor ? entries[i].rank : floor;
    }
};

template <class T, class W>
struct Task {
    const ScoreNeurons &a;
    const T *directions;
    const T *packed;
    Best *best;

    // Scores of `width` columns from their sums, `stride` apart.
    void finish(int64_t start, int64_t width, const T *sums, int64_t stride) const {
        for (int64_t s = 0; s < a.n_slots; ++s, sums += stride) {
            const T *activation = static_cast<const T *>(a.activations) + s * a.d_ff + start;
            if (best) {
                for (int64_t c = 0; c < width; ++c) best[s].take(rank_of(activation[c] * sums[c]), start + c);
            } else {
                T *out = static_cast<T *>(a.values) + s * a.d_ff + start;
                for (int64_t c = 0; c < width; ++c) out[c] = activation[c] * sums[c];
            }
        }
    }

    // partial += COUNT rows of W times their factors.
    template <int COUNT>
    void add_rows(int64_t row, int64_t start, int64_t width, T *partial, int64_t stride) const {
        typedef typename Vector<T>::type V;
        const W *from = static_cast<const W *>(a.weight) + row * a.weight_row + start;
        for (int64_t c = 0; c < width; c += WIDE<T>) {
            V rows[COUNT];
#pragma GCC unroll 8
            for (int q = 0; q < COUNT; ++q) {
                const W *at = from + q * a.weight_row + c;
                rows[q] = load_some<T>(at, width - c);
                // The rows after these start on other pages, where the processor does not look ahead.
                __builtin_prefetch(at + COUNT * a.weight_row);
            }
            for (int64_t s = 0; s < a.n_slots; ++s) {
                const T *factor = directions + s * a.d_model + row;
                V sum = load_as<V>(partial + s * stride + c);
#pragma GCC unroll 8
                for (int q = 0; q < COUNT; ++q) sum += factor[q] * rows[q];
                store_as(partial + s * stride + c, sum);
            }
        }
    }

    void strip(int64_t start, int64_t width, T *sums, int64_t stride) const {
        T *partial = sums + a.n_slots * stride;
        std::memset(sums, 0, static_cast<size_t>(a.n_slots * stride) * sizeof(T));
        for (int64_t depth = 0; depth < a.d_model; depth += DEPTH) {
            const int64_t end = min64(depth + DEPTH, a.d_model);
            std::memset(partial, 0, static_cast<size_t>(a.n_slots * stride) * sizeof(T));
            int64_t row = depth;
            for (; row + ROWS <= end; row += ROWS) add_rows<ROWS>(row, start, width, partial, stride);
            for (; row < end; ++row) add_rows<1>(row, start, width, partial, stride);
            for (int64_t c = 0; c < a.n_slots * stride; ++c) sums[c] += partial[c];
        }
        finish(start, width, sums, stride);
    }

    void tile(int64_t start, int64_t width, T *sums, T *panels) const {
        for (int64_t depth = 0; depth < max64(a.d_model, 1); depth += DEPTH) {
            const int64_t here = min64(DEPTH, a.d_model - depth);
            for (int64_t e = 0; e < here; ++e) {
                const W *from = static_cast<const W *>(a.weight) + (depth + e) * a.weight_row + start;
                for (int64_t c = 0; c < TILE; c += WIDE<T>)
                    store_as(panels + (c / NR<T> * DEPTH + e) * NR<T> + c % NR<T>,
                             load_some<T>(from + min64(c, width), max64(width - c, 0)));
            }
            for (int64_t c = 0; c < ceil_div(width, NR<T>) * NR<T>; c += NR<T>)
                for (int64_t s = 0; s < a.n_slots; s += MR)
                    block(packed + (s / NR<T> * a.d_model + depth) * NR<T> + s % NR<T>, panels + c * DEPTH, here,
                          sums + s * TILE + c, TILE, depth > 0);
        }
        finish(start, width, sums, TILE);
    }
};

template <class T, class W>
void run(const ScoreNeurons &a) {
    if (a.d_ff == 0 || a.n_slots == 0) return;
    const bool few = a.n_slots <= FEW;
    const int64_t rounds = ceil_div(a.d_ff, a.threads * STRIP);
    const int64_t task = few ? ceil_div(ceil_div(a.d_ff, rounds * a.threads), 64) * 64 : TILE;
    const int64_t slots = ceil_div(a.n_slots, SIDE) * SIDE, room = few ? 2 * a.n_slots * task : slots * TILE;
    Scratch<T> packed(few ? 0 : packed_size<T>(a.d_model, a.n_slots)), sums(a.threads * room);
    Scratch<T> panels(few ? 0 : a.threads * DEPTH * TILE);
    // Twice k, so that a selection comes once per k new entries.
    const int64_t capacity = min64(2 * a.top_k + 64, max64(a.d_ff, a.top_k) + 1);
    Scratch<Entry> entries(a.top_k ? a.threads * a.n_slots * capacity : 0);
    Scratch<Best> best(a.top_k ? a.threads * a.n_slots : 0);
    for (int64_t i = 0; a.top_k && i < a.threads * a.n_slots; ++i)
        best.data[i] = {entries.data + i * capacity, 0, capacity, a.top_k, 0};
#pragma omp parallel num_threads(a.threads)
    {
        if (!few) {
#pragma omp for schedule(static)
            for (int64_t s = 0; s < slots; s += NR<T>)
                pack_panel(packed.data + s * a.d_model, static_cast<const T *>(a.directions), a.d_model, 1, a.d_model,
                           nullptr, s, a.n_slots);
        }
        const int64_t own = thread_number();
        const Task<T, W> job{a, static_cast<const T *>(a.directions), packed.data,
                             a.top_k ? best.data + own * a.n_slots : nullptr};
// Ascending within a thread, on which `Best` relies.
#pragma omp for schedule(monotonic : dynamic, 1)
        for (int64_t start = 0; start < a.d_ff; start += task) {
            const int64_t width = min64(task, a.d_ff - start);
            if (few)
                job.strip(start, width, sums.data + own * room, task);
            else
                job.tile(start, width, sums.data + own * room, panels.data + own * DEPTH * TILE);
        }
    }
    if (!a.top_k) return;
    Scratch<Entry> all(a.threads * capacity);
    for (int64_t s = 0; s < a.n_slots; ++s) {
        int64_t size = 0;
        for (int64_t t = 0; t < a.threads; ++t) {
            const Best &one = best.data[t * a.n_slots + s];
            std::memcpy(all.data + size, one.entries, static_cast<size_t>(one.size) * sizeof(Entry));
            size += one.size;
        }
        select(all.data, size, a.top_k);
        sort(all.data, a.top_k);
        for (int64_t i = 0; i < a.top_k; ++i) a.neurons[s * a.top_k + i] = all.data[i].neuron;
        T *values = static_cast<T *>(a.values) + s * a.top_k;
        for (int64_t i = 0; i < a.top_k; ++i) {
            const uint64_t rank = all.data[i].rank, sign = uint64_t(1) << 63;
            const double value = bits<double>(rank & sign ? rank & ~sign : ~rank);
            values[i] = static_cast<T>(rank == ~uint64_t(0) ? __builtin_nan("") : value);
        }
    }
}

}  // namespace

void score_neurons(const ScoreNeurons &a) {
    switch (a.type) {
        case F32: return run<float, float>(a);
        case F64: return run<double, double>(a);
        case BF16: return run<float, Bf16>(a);
        case F16: return run<float, Fp16>(a);
    }
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
