// The system matrix weight * C[S, S] + H[S, S] + K_S^T K_S; see fastedit/ops/masked_gram.py. C and H are gathered
// tile by tile where the products stand already, so nothing of the size of C is written but the result.
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

template <class T>
void run(const MaskedGram &a) {
    Scratch<T> packed(packed_size<T>(a.n_edits, a.width));
    T *out = static_cast<T *>(a.out);
    prefer_large_pages(out, static_cast<size_t>(a.width) * a.width * sizeof(T));
    const auto finish = [&a](int64_t i, int64_t j, int64_t rows, int64_t columns, T *tile) {
        add_rows(a.moment, a.moment_type, a.moment_row, a.weight, a.index, i, j, rows, columns, tile);
        if (a.history)
            add_rows(a.history, a.history_type, a.history_row, 1.0, a.index, i, j, rows, columns, tile);
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
