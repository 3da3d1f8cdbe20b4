// What a selection needs on CPU: scores of a few query rows per KV head against all keys, the best of many scores, and
// the rows that were chosen, turned to other positions. Votes are in votes.cpp.
#include "ranking.h"
#include "scored.h"

namespace {

constexpr int AHEAD = 16;  // rows fetched ahead of use

template <typename T>
void scores(const Rows<T>& given, int heads, int threads, float* out) {
    int64_t stretches = (given.keys + STRETCH - 1) / STRETCH;
#pragma omp parallel for schedule(static) num_threads(threads) collapse(2)
    for (int h = 0; h < heads; ++h)
        for (int64_t s = 0; s < stretches; ++s)
            given.score(h, s * STRETCH, std::min(given.keys, (s + 1) * STRETCH), out);
}

// --- chosen rows

template <typename T>
void take(const T* x, const int64_t* start, int64_t row, int64_t limit, int heads, int sharing, const int64_t* index,
          int64_t count, int D, const float* cos, const float* sin, int pairs, int span, bool compact, int threads, T* out,
          const int64_t* out_start) {
    int64_t pieces = (count + STRETCH - 1) / STRETCH;
#pragma omp parallel for schedule(static) num_threads(threads) collapse(2)
    for (int h = 0; h < heads; ++h)
        for (int64_t piece = 0; piece < pieces; ++piece) {
            const int64_t* list = index + h / sharing * count;
            int64_t last = std::min(count, (piece + 1) * STRETCH);
            for (int64_t j = piece * STRETCH; j < last; ++j) {
                T* y = out + out_start[h] + j * D;
                if (j + AHEAD < last && list[j + AHEAD] >= 0) {
                    const char* ahead = reinterpret_cast<const char*>(x + start[h] + list[j + AHEAD] * row);
                    for (size_t byte = 0; byte < D * sizeof(T); byte += 64) __builtin_prefetch(ahead + byte);
                }
                if (list[j] < 0 || list[j] >= limit) {
                    std::memset(y, 0, D * sizeof(T));
                    continue;
                }
                const T* from = x + start[h] + list[j] * row;
                int turned = 2 * pairs;
                int64_t at = (compact ? list[j] - j : j) * pairs;
                if (pairs) turn(from, cos + at, sin + at, pairs, span, y);
                std::memcpy(y + turned, from + turned, (D - turned) * sizeof(T));
            }
        }
}

}  // namespace

extern "C" {

// q [heads, rows, D] and keys k of one kind (0 float32, 1 bfloat16), head h's keys from k + start[h], k_row elements
// apart; out [heads, rows, keys] float32.
void foveate_scores(int kind, const void* q, const void* k, const int64_t* start, int64_t k_row, int64_t keys, int heads,
                    int rows, int D, int threads, float* out) {
    if (kind == 0)
        scores(Rows<float>{static_cast<const float*>(q), static_cast<const float*>(k), start, k_row, keys, rows, D},
               heads, threads, out);
    else
        scores(Rows<bf16>{static_cast<const bf16*>(q), static_cast<const bf16*>(k), start, k_row, keys, rows, D}, heads,
               threads, out);
}

// scores [rows, n] float32, count [rows]; out [rows, width] int64.
void foveate_top(const float* scores, int64_t rows, int64_t n, const int64_t* count, int64_t width, int threads,
                 int64_t* out) {
    if (rows < threads) {
        Ranking ranking;
        for (int64_t r = 0; r < rows; ++r) ranking.best(scores + r * n, n, count[r], out + r * width, width, threads);
        return;
    }
#pragma omp parallel num_threads(threads)
    {
        Ranking ranking;
#pragma omp for schedule(dynamic, 1)
        for (int64_t r = 0; r < rows; ++r) ranking.best(scores + r * n, n, count[r], out + r * width, width);
    }
}

// Rows of x, head h's from x + start[h], `row` elements apart, by lists index [heads / sharing, count] (absent: < 0 or
// >= limit, gives zeros) to out + out_start[h], D elements apart. The first 2 * pairs features of a row are turned:
// cos, sin [rows, pairs] float32, pair p being p + span * (p / span) and the feature `span` further; entry j by row j, or
// where `compact`, its slot being s, by row s - j.
void foveate_take(int kind, const void* x, const int64_t* start, int64_t row, int64_t limit, int heads, int sharing,
                  const int64_t* index, int64_t count, int D, const float* cos, const float* sin, int pairs, int span,
                  int compact, int threads, void* out, const int64_t* out_start) {
    if (kind == 0)
        take(static_cast<const float*>(x), start, row, limit, heads, sharing, index, count, D, cos, sin, pairs, span,
             compact != 0, threads, static_cast<float*>(out), out_start);
    else
        take(static_cast<const bf16*>(x), start, row, limit, heads, sharing, index, count, D, cos, sin, pairs, span,
             compact != 0, threads, static_cast<bf16*>(out), out_start);
}
}
