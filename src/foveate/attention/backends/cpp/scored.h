// A few query rows per KV head against stretches of its keys.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "dots.h"

namespace {

constexpr int64_t STRETCH = 1024;  // keys of one task

template <typename T, int R>
void many(const Query<T>* q, const T* k, int64_t k_row, int64_t count, int D, float* out, int64_t gap) {
    constexpr int K = AT_ONCE<R>;
    int64_t j = 0;
    for (; j + K <= count; j += K) {
        const T* keys[K];
        for (int i = 0; i < K; ++i) keys[i] = k + (j + i) * k_row;
        products<R, K>(q, keys, D, out + j, gap);
    }
    for (; j < count; ++j) dots<R>(q, k + j * k_row, D, out + j, gap);
}

// Keys k [heads], head h's from k + start[h], k_row elements apart, each with its own `rows` queries q [heads, rows, D].
template <typename T>
struct Rows {
    const T* q;
    const T* k;
    const int64_t* start;
    int64_t k_row, keys;
    int rows, D;

    // out [heads, rows, keys]: the products of head h with the keys [first, last).
    void score(int h, int64_t first, int64_t last, float* out) const {
        using Many = void (*)(const Query<T>*, const T*, int64_t, int64_t, int, float*, int64_t);
        static const Many by_rows[] = {many<T, 1>, many<T, 2>, many<T, 3>, many<T, 4>,
                                       many<T, 5>, many<T, 6>, many<T, 7>, many<T, 8>};
        auto own = queries<Query<T>>(q + static_cast<int64_t>(h) * rows * D, static_cast<size_t>(rows) * D);
        for (int r = 0; r < rows; r += 8) {
            int64_t at = static_cast<int64_t>(h) * rows + r;
            by_rows[std::min(8, rows - r) - 1](own.data() + r * D, k + start[h] + first * k_row, k_row, last - first, D,
                                               out + at * keys + first, keys);
        }
    }
};

}  // namespace
