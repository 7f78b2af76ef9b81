// The system matrix weight * C[S, S] + H[S, S] + K_S^T K_S; see fastedit/ops/masked_gram.py. C and H are gathered
// tile by tile and added to the products, so nothing of the size of C is written but the result.
#include "gemm.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

// tile += factor * source[S, S]
template <class T, class From>
void add_rows(const From *source, int64_t stride, T factor, const int64_t *index, int64_t i, int64_t j, int64_t rows,
              int64_t columns, T *tile) {
    for (int64_t r = 0; r < rows; ++r, tile += TILE_STRIDE) {
        const From *row = source + (index ? index[i + r] : i + r) * stride;
        if (index)
            for (int64_t c = 0; c < columns; ++c) tile[c] += factor * static_cast<T>(row[index[j + c]]);
        else
            for (int64_t c = 0; c < columns; ++c) tile[c] += factor * static_cast<T>(row[j + c]);
    }
}

template <class T>
void add_rows(const void *source, Type type, int64_t stride, double factor, const int64_t *index, int64_t i, int64_t j,
              int64_t rows, int64_t columns, T *tile) {
    if (type == F64)
        add_rows(static_cast<const double *>(source), stride, static_cast<T>(factor), index, i, j, rows, columns, tile);
    else
        add_rows(static_cast<const float *>(source), stride, static_cast<T>(factor), index, i, j, rows, columns, tile);
}

#if defined(__AVX512F__)
// The columns index[j .. j + columns) of a matrix, picked out of its rows 16 neighbours at a time: packing the marked
// elements of a register costs as much as gathering two elements.
struct Cutter {
    // Neighbours looked through at most: with fewer than one column in eight, picking them one by one is faster.
    static constexpr int64_t MOST = SIDE / 2;
    int64_t n = 0;
    int32_t offset[MOST];
    int32_t place[MOST];
    uint16_t marks[MOST];

    // False where the columns are not ascending or too far apart.
    bool take(const int64_t *index, int64_t j, int64_t columns) {
        n = 0;
        for (int64_t c = 0; c < columns; ++c) {
            const int64_t column = index[j + c];
            if (c > 0 && column <= index[j + c - 1]) return false;
            if (n == 0 || column >= offset[n - 1] + 16) {
                if (n == MOST || column > INT32_MAX) return false;
                offset[n] = static_cast<int32_t>(column);
                place[n] = static_cast<int32_t>(c);
                marks[n++] = 0;
            }
            marks[n - 1] = static_cast<uint16_t>(marks[n - 1] | 1u << (column - offset[n - 1]));
        }
        return true;
    }

    // `to` has room for 15 elements more than there are columns.
    void cut(const float *row, float *to) const {
        for (int64_t v = 0; v < n; ++v) {
            const __m512 there = _mm512_maskz_loadu_ps(marks[v], row + offset[v]);
            _mm512_storeu_ps(to + place[v], _mm512_maskz_compress_ps(marks[v], there));
        }
    }
};

// tile += factor * source[S, S], with the columns of each row picked by the cutter.
template <class T>
void cut_rows(const Cutter &cutter, const float *source, int64_t stride, T factor, const int64_t *index, int64_t i,
              int64_t rows, int64_t columns, T *tile) {
    alignas(64) float row[SIDE + 16];
    for (int64_t r = 0; r < rows; ++r, tile += TILE_STRIDE) {
        cutter.cut(source + index[i + r] * stride, row);
        for (int64_t c = 0; c < columns; ++c) tile[c] += factor * static_cast<T>(row[c]);
    }
}
#else
struct Cutter {
    bool take(const int64_t *, int64_t, int64_t) { return false; }
};
template <class T>
void cut_rows(const Cutter &, const float *, int64_t, T, const int64_t *, int64_t, int64_t, int64_t, T *) {}
#endif

template <class T>
void run(const MaskedGram &a) {
    Scratch<T> packed(packed_size<T>(a.n_edits, a.width));
    T *out = static_cast<T *>(a.out);
    prefer_large_pages(out, static_cast<size_t>(a.width) * a.width * sizeof(T));
    const auto finish = [&a](int64_t i, int64_t j, int64_t rows, int64_t columns, T *tile) {
        Cutter cutter;
        const bool ready = a.index && cutter.take(a.index, j, columns);
        const auto add = [&](const void *source, Type type, int64_t stride, double factor) {
            if (ready && type == F32)
                cut_rows(cutter, static_cast<const float *>(source), stride, static_cast<T>(factor), a.index, i, rows,
                         columns, tile);
            else
                add_rows(source, type, stride, factor, a.index, i, j, rows, columns, tile);
        };
        add(a.moment, a.moment_type, a.moment_row, a.weight);
        if (a.history) add(a.history, a.history_type, a.history_row, 1.0);
    };
#pragma omp parallel num_threads(a.threads)
    {
#pragma omp for schedule(static)
        for (int64_t start = 0; start < ceil_div(a.width, SIDE) * SIDE; start += NR<T>)
            pack_panel(packed.data + start * a.n_edits, a.keys, a.keys_type, a.n_edits, a.keys_row, a.keys_column,
                       a.index, start, a.width);
        symmetric_product(packed.data, a.n_edits, a.width, out, a.width, finish);
    }
}

}  // namespace

void masked_gram(const MaskedGram &a) {
    if (a.out_type == F64) return run<double>(a);
    run<float>(a);
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
