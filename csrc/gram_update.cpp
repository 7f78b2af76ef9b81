// The running sum H += K^T K; see fastedit/ops/gram_update.py. Half of the tiles are multiplied, the rest mirrored.
#include "gemm.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

template <class T>
void run(const GramUpdate &a) {
    Scratch<T> packed(packed_size<T>(a.n, a.width));
    T *history = static_cast<T *>(a.history);
    const auto finish = [&a, history](int64_t i, int64_t j, int64_t rows, int64_t columns, T *tile) {
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c)
                tile[r * TILE_STRIDE + c] += history[(i + r) * a.history_row + j + c];
    };
#pragma omp parallel num_threads(a.threads)
    {
#pragma omp for schedule(static)
        for (int64_t start = 0; start < ceil_div(a.width, SIDE) * SIDE; start += NR<T>)
            pack_panel(packed.data + start * a.n, a.keys, a.type, a.n, a.keys_row, a.keys_column, nullptr, start,
                       a.width);
        symmetric_product(packed.data, a.n, a.width, history, a.history_row, finish);
    }
}

}  // namespace

void gram_update(const GramUpdate &a) {
    if (a.type == F64) return run<double>(a);
    run<float>(a);
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
