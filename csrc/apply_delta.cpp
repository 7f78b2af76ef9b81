// W[:, S] += R^T X^T in place, rounded once; see fastedit/ops/apply_delta.py. A tile of the update is added to the
// weight as soon as it is computed, so nothing of the size of the update is written.
#include "gemm.h"

namespace fastedit {
namespace FASTEDIT_ISA {
namespace {

// Rows of a tile: 18 tasks where d_model is 576.
constexpr int64_t ROWS = 32;

inline float exact(float value) { return value; }
inline double exact(double value) { return value; }
inline float exact(Bf16 value) { return wide(value); }
inline float exact(Fp16 value) { return wide(value); }
using FASTEDIT_ISA::narrow;
inline void narrow(double value, double *to) { *to = value; }

// Where an update goes. T is the dtype of its sums, W that of the weight.
template <class T, class W>
struct Target {
    W *weight;
    T *master;

    template <bool MASTER>
    inline void add(int64_t at, T delta) const {
        const T base = MASTER ? master[at] : static_cast<T>(exact(weight[at]));
        if (MASTER) master[at] = base + delta;
        narrow(base + delta, weight + at);
    }
};

template <class T, class W, bool MASTER>
void add_tile(const ApplyDelta &a, const Target<T, W> &to, bool across, int64_t i, int64_t j, int64_t rows,
              int64_t columns, const T *tile) {
    for (int64_t r = 0; r < rows; ++r, tile += TILE_STRIDE) {
        if (across) {
            // Rows of the tile are columns of the weight, which are contiguous.
            const int64_t at = (a.index ? a.index[i + r] : i + r) * a.weight_column + j;
            for (int64_t c = 0; c < columns; ++c) to.template add<MASTER>(at + c, tile[c]);
            continue;
        }
        const int64_t row = (i + r) * a.weight_row, column = a.weight_column;
        if (!a.index && column == 1) {
            for (int64_t c = 0; c < columns; ++c) to.template add<MASTER>(row + j + c, tile[c]);
        } else {
            for (int64_t c = 0; c < columns; ++c)
                to.template add<MASTER>(row + (a.index ? a.index[j + c] : j + c) * column, tile[c]);
        }
    }
}

template <class T, class W>
void run(const ApplyDelta &a) {
    // Tiles run along the contiguous dimension of the weight, if there is one.
    const bool across = a.weight_column != 1 && a.weight_row == 1;
    const int64_t down = across ? a.width : a.d_model, along = across ? a.d_model : a.width;
    Scratch<T> residual(packed_size<T>(a.n_edits, a.d_model)), solution(packed_size<T>(a.n_edits, a.width));
    const T *left = across ? solution.data : residual.data, *right = across ? residual.data : solution.data;
    const Target<T, W> to{static_cast<W *>(a.weight), static_cast<T *>(a.master)};
    const auto add = a.master ? add_tile<T, W, true> : add_tile<T, W, false>;
#pragma omp parallel num_threads(a.threads)
    {
#pragma omp for schedule(static) nowait
        for (int64_t start = 0; start < ceil_div(a.d_model, SIDE) * SIDE; start += NR<T>)
            pack_panel(residual.data + start * a.n_edits, a.residual, a.residual_type, a.n_edits, a.residual_row,
                       a.residual_column, nullptr, start, a.d_model);
#pragma omp for schedule(static)
        for (int64_t start = 0; start < ceil_div(a.width, SIDE) * SIDE; start += NR<T>)
            pack_panel(solution.data + start * a.n_edits, a.solution, a.solution_type, a.n_edits, a.solution_column,
                       a.solution_row, nullptr, start, a.width);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < down; i += ROWS) {
            alignas(64) T tile[ROWS * TILE_STRIDE];
            for (int64_t j = 0; j < along; j += SIDE) {
                product_tile(left + i * a.n_edits, right + j * a.n_edits, a.n_edits, ROWS, tile);
                add(a, to, across, i, j, min64(ROWS, down - i), min64(SIDE, along - j), tile);
            }
        }
    }
}

}  // namespace

void apply_delta(const ApplyDelta &a) {
    switch (a.type) {
        case F32: return run<float, float>(a);
        case F64: return run<double, double>(a);
        case BF16: return run<float, Bf16>(a);
        case F16: return run<float, Fp16>(a);
    }
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
