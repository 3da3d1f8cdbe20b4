// Keys coded in 8 bits, met by queries coded in 16: products are whole numbers, the same on every machine.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "scored.h"

namespace {

constexpr float KEY_TOP = 127.0f, QUERY_TOP = 32639.0f;  // a query's code is 256 a + b, a and b of 8 bits

// x [D] as whole numbers of at most `top`, half to even, times the step that is returned; no finite step: zeros, NaN.
template <typename C>
float code(const float* x, int D, float top, C* out) {
    float high = 0;
    bool lost = false;
    for (int d = 0; d < D; ++d) {
        float size = std::fabs(x[d]);
        high = std::max(high, size);
        lost |= !(size <= std::numeric_limits<float>::max());
    }
    float step = high / top, by = step > 0 ? step : 1.0f;
    for (int d = 0; d < D; ++d) out[d] = lost ? C{0} : static_cast<C>(std::nearbyint(x[d] / by));
    return lost ? NAN : step;
}

// Queries q [n, D] coded in 16 bits.
struct Coded {
    std::vector<int16_t> codes;
    std::vector<float> steps;

    Coded(const float* q, int64_t n, int D) : codes(n * D), steps(n) {
        for (int64_t r = 0; r < n; ++r) steps[r] = code(q + r * D, D, QUERY_TOP, &codes[r * D]);
    }
};

// out[r * gap + j] = q[r] . keys[j], whole numbers; no sum overflows while D <= 512. 16 divides D.
template <int R, int K>
inline void whole(const int16_t* q, const int8_t* const* keys, int D, int32_t* out, int64_t gap) {
#if defined(__AVX2__)
    __m256i made[K * R];
    repeat<K * R>([&](auto i) __attribute__((always_inline)) { made[i] = _mm256_setzero_si256(); });
    for (int d = 0; d < D; d += 16)
        repeat<K>([&](auto j) __attribute__((always_inline)) {
            __m256i x = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(keys[j] + d)));
            repeat<R>([&](auto r) __attribute__((always_inline)) {
                __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + r * D + d));
                made[j * R + r] = _mm256_add_epi32(made[j * R + r], _mm256_madd_epi16(x, y));
                asm("" : "+x"(made[j * R + r]));  // or the sums are spilled
            });
        });
    auto halves = [](__m256i x) {
        return _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    };
    repeat<R>([&](auto r) __attribute__((always_inline)) {
        if constexpr (K == 4) {
            __m128i low = _mm_hadd_epi32(halves(made[r]), halves(made[R + r]));
            __m128i high = _mm_hadd_epi32(halves(made[2 * R + r]), halves(made[3 * R + r]));
            _mm_storeu_si128(reinterpret_cast<__m128i*>(out + r * gap), _mm_hadd_epi32(low, high));
        } else {
            repeat<K>([&](auto j) __attribute__((always_inline)) {
                __m128i x = halves(made[j * R + r]);
                x = _mm_hadd_epi32(x, x);
                out[r * gap + j] = _mm_cvtsi128_si32(_mm_hadd_epi32(x, x));
            });
        }
    });
#else
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < K; ++j) {
            int32_t made = 0;
            for (int d = 0; d < D; ++d) made += static_cast<int32_t>(q[r * D + d]) * keys[j][d];
            out[r * gap + j] = made;
        }
#endif
}

template <int R>
void many_whole(const int16_t* q, const int8_t* k, int64_t k_row, int64_t count, int D, int32_t* out, int64_t gap) {
    constexpr int K = R <= 3 ? 4 : 1;
    int64_t j = 0;
    for (; j + K <= count; j += K) {
        const int8_t* keys[K];
        for (int i = 0; i < K; ++i) keys[i] = k + (j + i) * k_row;
        whole<R, K>(q, keys, D, out + j, gap);
    }
    for (; j < count; ++j) {
        const int8_t* key = k + j * k_row;
        whole<R, 1>(q, &key, D, out + j, gap);
    }
}

// Coded keys, head h's from k + start[h], rows k_row elements apart, key j of it being step[step_start[h] + j] times its
// code; `rows` queries per head, q [heads, rows, D] times q_step [heads, rows].
struct ByteRows {
    const int16_t* q;
    const float* q_step;
    const int8_t* k;
    const int64_t* start;
    const float* step;
    const int64_t* step_start;
    int64_t k_row, keys;
    int rows, D;

    // out [heads, rows, keys]: the products of head h with the keys [first, last).
    void score(int h, int64_t first, int64_t last, float* out) const {
        using Many = void (*)(const int16_t*, const int8_t*, int64_t, int64_t, int, int32_t*, int64_t);
        static const Many by_rows[] = {many_whole<1>, many_whole<2>, many_whole<3>, many_whole<4>,
                                       many_whole<5>, many_whole<6>, many_whole<7>, many_whole<8>};
        const float* steps = step + step_start[h] + first;
        int32_t made[8 * STRETCH];
        for (int r = 0; r < rows; r += 8) {
            int64_t at = static_cast<int64_t>(h) * rows + r;
            int n = std::min(8, rows - r);
            by_rows[n - 1](q + at * D, k + start[h] + first * k_row, k_row, last - first, D, made, STRETCH);
            for (int i = 0; i < n; ++i) {
                float* to = out + (at + i) * keys + first;
                for (int64_t j = 0; j < last - first; ++j)
                    to[j] = static_cast<float>(made[i * STRETCH + j]) * (q_step[at + i] * steps[j]);
            }
        }
    }
};

}  // namespace
