// What the query heads of a layer vote for: softmax weights over all keys, and the keys that get most.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "ranking.h"
#include "scored.h"

namespace {

inline Floats some(const float* x, int64_t n, float rest) {
    Floats y = Floats{} + rest;
    if (n >= WIDE)
        std::memcpy(&y, x, sizeof(y));
    else
        std::memcpy(&y, x, n * sizeof(float));
    return y;
}

inline void put(Floats y, float* x, int64_t n) {
    if (n >= WIDE)
        std::memcpy(x, &y, sizeof(y));
    else
        std::memcpy(x, &y, n * sizeof(float));
}

// s becomes exp(scale * s - top), top being the greatest scale * s; the sum is returned. Not numbers stay such.
float weigh(float* s, int64_t n, float scale, float* top) {
    Floats high = Floats{} + NOTHING, total{};
    for (int64_t j = 0; j < n; j += WIDE) {
        Floats x = some(s + j, n - j, NOTHING) * scale;
        high = x > high ? x : high;
    }
    *top = NOTHING;
    for (int i = 0; i < WIDE; ++i) *top = std::max(*top, high[i]);
    // Where all are -inf, their difference would be no number.
    float shift = *top == NOTHING ? 0.0f : *top;
    for (int64_t j = 0; j < n; j += WIDE) {
        Floats w = exponential(some(s + j, n - j, NOTHING) * scale - shift);
        put(w, s + j, n - j);
        total += w;
    }
    float sum = 0;
    for (int i = 0; i < WIDE; ++i) sum += total[i];
    return sum;
}

// out[j] = sum or greatest over rows of share[r] * weights[r][j].
void mix(const float* weights, int64_t gap, const float* share, int64_t share_gap, int rows, bool greatest, int64_t n,
         float* out) {
    for (int64_t j = 0; j < n; j += WIDE) {
        Floats made{};
        for (int r = 0; r < rows; ++r) {
            Floats x = some(weights + r * gap + j, n - j, 0.0f) * share[r * share_gap];
            made = greatest ? (x > made) | (x != x) ? x : made : made + x;
        }
        put(made, out + j, n - j);
    }
}

// Softmax weights over all keys, reduced over the query heads of each of `groups` groups. Each exponential is taken
// once, against the greatest score of its own stretch; what a stretch then counts in its row is a number per stretch.
template <typename Given>
void votes(const Given& given, int batch, int heads, int groups, bool greatest, float scale, int threads,
           float* weights, float* out) {
    int64_t keys = given.keys, stretches = (keys + STRETCH - 1) / STRETCH;
    int all = heads * given.rows, each = all / groups;
    std::vector<float> top(batch * all * stretches), sum(top.size());
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static) collapse(2)
        for (int b = 0; b < batch; ++b)
            for (int64_t s = 0; s < stretches; ++s)
                for (int h = b * heads; h < (b + 1) * heads; ++h) {
                    int64_t first = s * STRETCH, last = std::min(keys, first + STRETCH);
                    given.score(h, first, last, weights);
                    for (int64_t r = h * given.rows; r < (h + 1) * given.rows; ++r)
                        sum[r * stretches + s] =
                            weigh(weights + r * keys + first, last - first, scale, &top[r * stretches + s]);
                }
#pragma omp for schedule(static)
        for (int64_t r = 0; r < batch * all; ++r) {
            float *tops = &top[r * stretches], high = *std::max_element(tops, tops + stretches), total = 0;
            for (int64_t s = 0; s < stretches; ++s) {
                tops[s] = std::exp(tops[s] - high);
                total += tops[s] * sum[r * stretches + s];
            }
            for (int64_t s = 0; s < stretches; ++s) tops[s] /= total;
        }
#pragma omp for schedule(static) collapse(2)
        for (int b = 0; b < batch; ++b)
            for (int64_t s = 0; s < stretches; ++s)
                for (int g = b * groups; g < (b + 1) * groups; ++g) {
                    int64_t r = static_cast<int64_t>(g) * each, first = s * STRETCH;
                    mix(weights + r * keys + first, keys, &top[r * stretches + s], stretches, each, greatest,
                        std::min(STRETCH, keys - first), out + g * keys + first);
                }
    }
}

// The slots [0, first) and, from the votes of all query heads, the `count` best of the slots first + (0 .. keys - 1) of
// each sequence: out [batch, first + count], ascending. Votes that are not numbers choose the lowest slots.
template <typename Given>
void choose(const Given& given, int batch, int heads, float scale, int threads, int64_t first, int64_t count,
            int64_t* out) {
    int64_t keys = given.keys;
    // Not vectors: nothing is read before it is written.
    std::unique_ptr<float[]> weights(new float[static_cast<size_t>(batch) * heads * given.rows * keys]);
    std::unique_ptr<float[]> made(new float[static_cast<size_t>(batch) * keys]);
    votes(given, batch, heads, 1, false, scale, threads, weights.get(), made.get());
    Ranking ranking;
    for (int b = 0; b < batch; ++b) {
        int64_t* slots = out + b * (first + count);
        for (int64_t j = 0; j < first; ++j) slots[j] = j;
        slots += first;
        ranking.best(made.get() + b * keys, keys, count, slots, count, threads);
        bool lost = count > 0 && slots[count - 1] < 0;
        for (int64_t j = 0; j < count; ++j) slots[j] = first + (lost ? j : slots[j]);
    }
}

}  // namespace
