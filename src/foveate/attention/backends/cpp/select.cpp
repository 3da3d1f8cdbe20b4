// What a selection needs on CPU: scores of a few query rows per KV head against all keys, and the best of many scores.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "dots.h"

namespace {

constexpr int64_t STRETCH = 1024;  // keys of one task

template <typename T, int R>
void many(const T* q, const T* k, int64_t k_row, int64_t first, int64_t last, int D, float* out, int64_t gap) {
    for (int64_t j = first; j < last; ++j) dots<R>(q, k + j * k_row, D, out + j, gap);
}

template <typename T>
void scores(const T* q, const T* k, const int64_t* start, int64_t k_row, int64_t keys, int heads, int rows, int D,
            int threads, float* out) {
    using Many = void (*)(const T*, const T*, int64_t, int64_t, int64_t, int, float*, int64_t);
    static const Many by_rows[] = {many<T, 1>, many<T, 2>, many<T, 3>, many<T, 4>,
                                   many<T, 5>, many<T, 6>, many<T, 7>, many<T, 8>};
    int64_t stretches = (keys + STRETCH - 1) / STRETCH;
#pragma omp parallel for schedule(static) num_threads(threads) collapse(2)
    for (int h = 0; h < heads; ++h)
        for (int64_t s = 0; s < stretches; ++s)
            for (int r = 0; r < rows; r += 8) {
                int n = std::min(8, rows - r);
                int64_t at = static_cast<int64_t>(h) * rows + r;
                by_rows[n - 1](q + at * D, k + start[h], k_row, s * STRETCH, std::min(keys, (s + 1) * STRETCH), D,
                               out + at * keys, keys);
            }
}

// Unsigned numbers of the same order as the scores; NaN and -inf give 0, which is never taken; -0 is 0.
inline uint32_t ordered(float x) {
    if (!(x > -INFINITY)) return 0;
    x += 0.0f;
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// The slots of the `count` best of one row, ascending; of equals the first. -1 beyond what can be taken.
void best(const float* row, int64_t n, int64_t count, int64_t* out, int64_t width, std::vector<uint32_t>& keys) {
    keys.resize(n);
    for (int64_t j = 0; j < n; ++j) keys[j] = ordered(row[j]);
    uint32_t prefix = 0, mask = 0;
    int64_t need = std::min(count, n), taken = 0;
    for (int shift : {21, 10, 0}) {
        int bits = shift == 0 ? 10 : 11;
        std::vector<int64_t> histogram(1u << bits, 0);
        uint32_t digit = (1u << bits) - 1;
        for (int64_t j = 0; j < n; ++j)
            if ((keys[j] & mask) == prefix) ++histogram[(keys[j] >> shift) & digit];
        uint32_t at = digit;
        while (at > 0 && histogram[at] < need) need -= histogram[at--];
        prefix |= at << shift;
        mask |= digit << shift;
    }
    for (int64_t j = 0; j < n && taken < width; ++j) {
        if (!keys[j] || count <= 0) continue;
        if (keys[j] > prefix)
            out[taken++] = j;
        else if (keys[j] == prefix && need > 0) {
            out[taken++] = j;
            --need;
        }
    }
    std::fill(out + taken, out + width, -1);
}

}  // namespace

extern "C" {

// q [heads, rows, D] and keys k of one kind (0 float32, 1 bfloat16), head h's keys from k + start[h], k_row elements
// apart; out [heads, rows, keys] float32.
void foveate_scores(int kind, const void* q, const void* k, const int64_t* start, int64_t k_row, int64_t keys, int heads,
                    int rows, int D, int threads, float* out) {
    if (kind == 0)
        scores(static_cast<const float*>(q), static_cast<const float*>(k), start, k_row, keys, heads, rows, D, threads,
               out);
    else
        scores(static_cast<const bf16*>(q), static_cast<const bf16*>(k), start, k_row, keys, heads, rows, D, threads,
               out);
}

// scores [rows, n] float32, count [rows]; out [rows, width] int64.
void foveate_top(const float* scores, int64_t rows, int64_t n, const int64_t* count, int64_t width, int threads,
                 int64_t* out) {
#pragma omp parallel num_threads(static_cast<int>(std::min<int64_t>(threads, rows)))
    {
        std::vector<uint32_t> keys;
#pragma omp for schedule(dynamic, 1)
        for (int64_t r = 0; r < rows; ++r) best(scores + r * n, n, count[r], out + r * width, width, keys);
    }
}
}
