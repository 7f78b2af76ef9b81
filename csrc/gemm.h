// Small dense products of packed panels. A matrix with n rows is packed as panels of NR columns, each panel
// (n, NR) contiguous and padded with zeros; left and right factor have the same form.
#pragma once

#include <cstdlib>
#include <new>

#include "simd.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fastedit {
namespace FASTEDIT_ISA {

template <class T>
struct Vector;
template <>
struct Vector<float> {
    typedef VecF type;
};
template <>
struct Vector<double> {
    typedef VecD type;
};

// Rows and columns of one inner product block: its sums, two columns' vectors and a broadcast fit the registers.
constexpr int64_t MR = FASTEDIT_BYTES == 64 ? 8 : 4;
template <class T>
constexpr int64_t NR = 2 * FASTEDIT_BYTES / sizeof(T);

// Rows and columns of a tile, a multiple of every NR; its row stride avoids that a column falls into few cache sets.
constexpr int64_t SIDE = 64;
constexpr int64_t TILE_STRIDE = SIDE + 8;
// Rows of the factors per pass over a tile: a panel's part stays in the second-level cache.
constexpr int64_t DEPTH = 256;

static inline int64_t thread_number() {
#if defined(_OPENMP)
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// The first use of 4 KB pages costs more than a kernel that fills them once; large pages cost next to nothing.
static inline void prefer_large_pages(void *start, size_t bytes) {
#if defined(__linux__)
    const uintptr_t page = 1 << 21, first = (reinterpret_cast<uintptr_t>(start) + page - 1) / page * page;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(start) + bytes) / page * page;
    if (last > first) madvise(reinterpret_cast<void *>(first), last - first, MADV_HUGEPAGE);
#else
    (void)start, (void)bytes;
#endif
}

template <class T>
struct Scratch {
    T *data;
    explicit Scratch(int64_t size) {
        const size_t bytes = static_cast<size_t>(size) * sizeof(T), page = bytes < (1 << 22) ? 64 : 1 << 21;
        data = static_cast<T *>(aligned_alloc(page, (bytes / page + 1) * page));
        if (!data) throw std::bad_alloc();
        prefer_large_pages(data, bytes);
    }
    ~Scratch() { free(data); }
    Scratch(const Scratch &) = delete;
    Scratch &operator=(const Scratch &) = delete;
};

// One panel of a float32 or float64 matrix: rows stride `row`, columns stride `column`, or picked by `index`.
template <class T, class From>
static void pack_panel(T *to, const From *from, int64_t n, int64_t row, int64_t column, const int64_t *index,
                       int64_t start, int64_t width) {
    const int64_t here = min64(NR<T>, width - start);
    for (int64_t e = 0; e < n; ++e, to += NR<T>, from += row) {
        for (int64_t c = 0; c < here; ++c)
            to[c] = static_cast<T>(from[(index ? index[start + c] : start + c) * column]);
        for (int64_t c = max64(here, 0); c < NR<T>; ++c) to[c] = 0;
    }
}

template <class T>
static void pack_panel(T *to, const void *from, Type type, int64_t n, int64_t row, int64_t column,
                       const int64_t *index, int64_t start, int64_t width) {
    if (type == F64)
        pack_panel(to, static_cast<const double *>(from), n, row, column, index, start, width);
    else
        pack_panel(to, static_cast<const float *>(from), n, row, column, index, start, width);
}

// Size of a packed matrix: whole tiles.
template <class T>
static int64_t packed_size(int64_t n, int64_t width) {
    return n * ceil_div(width, SIDE) * SIDE;
}

// sums[r][c] = or += sum over e < n of left[e][r] * right[e][c], r < MR, c < NR; rows of sums `stride` apart.
template <class T>
static inline void block(const T *left, const T *right, int64_t n, T *sums, int64_t stride, bool add) {
    typedef typename Vector<T>::type V;
    constexpr int64_t half = NR<T> / 2;
    V low[MR], high[MR];
#pragma GCC unroll 8
    for (int64_t r = 0; r < MR; ++r) low[r] = high[r] = V{};
    for (int64_t e = 0; e < n; ++e, left += NR<T>, right += NR<T>) {
        const V first = load_as<V>(right), second = load_as<V>(right + half);
#pragma GCC unroll 8
        for (int64_t r = 0; r < MR; ++r) {
            low[r] += left[r] * first;
            high[r] += left[r] * second;
        }
    }
#pragma GCC unroll 8
    for (int64_t r = 0; r < MR; ++r, sums += stride) {
        store_as(sums, add ? load_as<V>(sums) + low[r] : low[r]);
        store_as(sums + half, add ? load_as<V>(sums + half) + high[r] : high[r]);
    }
}

// A tile of up to `rows` x SIDE sums of products, in the order of e whatever the sizes of the matrices.
template <class T>
static void product_tile(const T *left, const T *right, int64_t n, int64_t rows, T *tile) {
    for (int64_t depth = 0; depth < max64(n, 1); depth += DEPTH) {
        const int64_t here = min64(DEPTH, n - depth);
        for (int64_t c = 0; c < SIDE; c += NR<T>)
            for (int64_t r = 0; r < rows; r += MR)
                block(left + (r / NR<T> * n + depth) * NR<T> + r % NR<T>, right + c * n + depth * NR<T>, here,
                      tile + r * TILE_STRIDE + c, TILE_STRIDE, depth > 0);
    }
}

// out = finish(K^T K), symmetric to the bit. K is packed (n, width); finish(i, j, rows, columns, tile) completes the
// tile at (i, j), of which the lower triangle of `out` and its mirror image are then written.
template <class T, class Finish>
static void symmetric_product(const T *packed, int64_t n, int64_t width, T *out, int64_t stride, const Finish &finish) {
    const int64_t tiles = ceil_div(width, SIDE);
    // Longest rows of tiles first, so that the threads end together. No tile depends on another.
#pragma omp for schedule(dynamic, 1)
    for (int64_t down = 0; down < tiles; ++down) {
        alignas(64) T tile[SIDE * TILE_STRIDE];
        const int64_t i = (tiles - 1 - down) * SIDE, rows = min64(SIDE, width - i);
        for (int64_t j = 0; j <= i; j += SIDE) {
            const int64_t columns = min64(SIDE, width - j);
            product_tile(packed + i * n, packed + j * n, n, SIDE, tile);
            finish(i, j, rows, columns, tile);
            for (int64_t r = 0; r < rows; ++r)
                std::memcpy(out + (i + r) * stride + j, tile + r * TILE_STRIDE,
                            static_cast<size_t>(i == j ? r + 1 : columns) * sizeof(T));
            for (int64_t c = 0; c < columns; ++c)
                for (int64_t r = i == j ? c + 1 : 0; r < rows; ++r)
                    out[(j + c) * stride + i + r] = tile[r * TILE_STRIDE + c];
        }
    }
}

}  // namespace FASTEDIT_ISA
}  // namespace fastedit
