// What a selection needs on CPU: scores of a few query rows per KV head against all keys, the heads' votes that they
// make, the best of many scores, and the rows that were chosen, turned to other positions.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "dots.h"

namespace {

constexpr int64_t STRETCH = 1024;  // keys of one task
constexpr int AHEAD = 16;          // rows fetched ahead of use
constexpr float NOTHING = -INFINITY;

// --- scores

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

template <typename T>
void scores(const Rows<T>& given, int heads, int threads, float* out) {
    int64_t stretches = (given.keys + STRETCH - 1) / STRETCH;
#pragma omp parallel for schedule(static) num_threads(threads) collapse(2)
    for (int h = 0; h < heads; ++h)
        for (int64_t s = 0; s < stretches; ++s)
            given.score(h, s * STRETCH, std::min(given.keys, (s + 1) * STRETCH), out);
}

// --- votes

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
template <typename T>
void votes(const Rows<T>& given, int batch, int heads, int groups, bool greatest, float scale, int threads,
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

// --- the best

// Unsigned numbers of the same order as the scores; NaN and -inf give 0, which is never taken; -0 is 0.
inline uint32_t ordered(float x) {
    uint32_t bits;
    float y = x + 0.0f;
    std::memcpy(&bits, &y, 4);
    uint32_t made = bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
    return x > NOTHING ? made : 0;
}

constexpr int LANES = 16;  // keys compared at once

// Bit i of sixteen: whether keys[i], masked, is `wanted`, or is above it.
inline uint32_t equal(const uint32_t* keys, uint32_t mask, uint32_t wanted) {
#if defined(__AVX512F__)
    __m512i masked = _mm512_and_si512(_mm512_loadu_si512(keys), _mm512_set1_epi32(static_cast<int>(mask)));
    return _mm512_cmpeq_epi32_mask(masked, _mm512_set1_epi32(static_cast<int>(wanted)));
#elif defined(__AVX2__)
    uint32_t bits = 0;
    for (int half = 0; half < 2; ++half) {
        __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + 8 * half));
        x = _mm256_and_si256(x, _mm256_set1_epi32(static_cast<int>(mask)));
        x = _mm256_cmpeq_epi32(x, _mm256_set1_epi32(static_cast<int>(wanted)));
        bits |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(x))) << 8 * half;
    }
    return bits;
#else
    uint32_t bits = 0;
    for (int i = 0; i < LANES; ++i) bits |= static_cast<uint32_t>((keys[i] & mask) == wanted) << i;
    return bits;
#endif
}
inline uint32_t above(const uint32_t* keys, uint32_t wanted) {
#if defined(__AVX512F__)
    return _mm512_cmpgt_epu32_mask(_mm512_loadu_si512(keys), _mm512_set1_epi32(static_cast<int>(wanted)));
#elif defined(__AVX2__)
    // Comparisons are signed here: both sides lose half of the range.
    const __m256i sign = _mm256_set1_epi32(INT32_MIN);
    const __m256i least = _mm256_xor_si256(sign, _mm256_set1_epi32(static_cast<int>(wanted)));
    uint32_t bits = 0;
    for (int half = 0; half < 2; ++half) {
        __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + 8 * half));
        x = _mm256_cmpgt_epi32(_mm256_xor_si256(x, sign), least);
        bits |= static_cast<uint32_t>(_mm256_movemask_ps(_mm256_castsi256_ps(x))) << 8 * half;
    }
    return bits;
#else
    uint32_t bits = 0;
    for (int i = 0; i < LANES; ++i) bits |= static_cast<uint32_t>(keys[i] > wanted) << i;
    return bits;
#endif
}

// What one thread needs to rank a row. Lists of keys end in zeros, so that sixteen can always be read.
struct Ranking {
    std::unique_ptr<uint32_t[]> all, same;
    int64_t room = 0;
    uint32_t counts[4][1 << 11];

    // The digit of the need-th greatest of n keys; need becomes its rank among the keys of that digit.
    uint32_t digit(const uint32_t* keys, int64_t n, int shift, uint32_t last, int64_t* need) {
        // Scores share few exponents: four counters each, so that increments do not wait for one another.
        std::memset(counts, 0, sizeof(counts));
        int64_t j = 0;
        for (; j + 4 <= n; j += 4)
            for (int i = 0; i < 4; ++i) ++counts[i][keys[j + i] >> shift & last];
        for (; j < n; ++j) ++counts[0][keys[j] >> shift & last];
        uint32_t at = last;
        for (; at > 0; --at) {
            int64_t held = static_cast<int64_t>(counts[0][at]) + counts[1][at] + counts[2][at] + counts[3][at];
            if (held >= *need) break;
            *need -= held;
        }
        return at;
    }

    // The slots of the `count` best of one row, ascending; of equals the first. -1 beyond what can be taken.
    void best(const float* row, int64_t n, int64_t count, int64_t* out, int64_t width) {
        if (n > room) {
            // Not a vector: nothing is read before it is written.
            all.reset(new uint32_t[n + LANES]);
            same.reset(new uint32_t[n + LANES]);
            room = n;
        }
        for (int64_t j = 0; j < n; ++j) all[j] = ordered(row[j]);
        std::fill_n(&all[n], LANES, 0);
        int64_t need = std::max<int64_t>(0, std::min(count, n)), left = n, taken = 0;
        const uint32_t* from = all.get();
        uint32_t least = 0, mask = 0;
        for (int shift : {21, 10, 0}) {
            uint32_t last = shift ? (1u << 11) - 1 : (1u << 10) - 1;
            least |= digit(from, left, shift, last, &need) << shift;
            mask |= last << shift;
            int64_t held = 0;
            for (int64_t j = 0; j < left; j += LANES)
                for (uint32_t bits = equal(from + j, mask, least); bits; bits &= bits - 1)
                    same[held++] = from[j + __builtin_ctz(bits)];
            // Where the prefix is 0, zeros from beyond the end were taken too.
            left = std::min(held, left);
            std::fill_n(&same[left], LANES, 0);
            from = same.get();
        }
        if (!least) need = 0;
        for (int64_t j = 0; j < n && taken < width; j += LANES) {
            uint32_t more = above(&all[j], least), level = need ? equal(&all[j], ~0u, least) : 0;
            for (uint32_t bits = more | level; bits && taken < width; bits &= bits - 1) {
                int at = __builtin_ctz(bits);
                bool tie = level >> at & 1;
                if (tie && !need) continue;
                need -= tie;
                out[taken++] = j + at;
            }
        }
        std::fill(out + taken, out + width, -1);
    }
};

// --- chosen rows

template <typename T>
void take(const T* x, const int64_t* start, int64_t row, int64_t limit, int heads, int sharing, const int64_t* index,
          int64_t count, int D, const float* cos, const float* sin, int pairs, int span, int threads, T* out,
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
                if (pairs) turn(from, cos + j * pairs, sin + j * pairs, pairs, span, y);
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

// The same for q [batch * heads, rows, D]; weights [batch * heads, rows, keys] for working, out [batch, groups, keys],
// both float32; greatest: 0 sums over a group's query heads, 1 takes the greatest weight. scale > 0.
void foveate_votes(int kind, const void* q, const void* k, const int64_t* start, int64_t k_row, int64_t keys, int batch,
                   int heads, int rows, int D, int groups, int greatest, float scale, int threads, float* weights,
                   float* out) {
    if (kind == 0)
        votes(Rows<float>{static_cast<const float*>(q), static_cast<const float*>(k), start, k_row, keys, rows, D}, batch,
              heads, groups, greatest, scale, threads, weights, out);
    else
        votes(Rows<bf16>{static_cast<const bf16*>(q), static_cast<const bf16*>(k), start, k_row, keys, rows, D}, batch,
              heads, groups, greatest, scale, threads, weights, out);
}

// The slots [0, first) and, from the votes of all query heads, the `count` best of the slots first + (0 .. keys - 1) of
// each sequence: out [batch, first + count] int64, ascending. k: the keys of those slots; count <= keys. Votes that are
// not numbers choose the lowest slots. weights [batch * heads, rows, keys], votes [batch, keys]: float32, for working.
void foveate_choose(int kind, const void* q, const void* k, const int64_t* start, int64_t k_row, int64_t keys, int batch,
                    int heads, int rows, int D, float scale, int threads, float* weights, float* votes, int64_t first,
                    int64_t count, int64_t* out) {
    foveate_votes(kind, q, k, start, k_row, keys, batch, heads, rows, D, 1, 0, scale, threads, weights, votes);
    Ranking ranking;
    for (int b = 0; b < batch; ++b) {
        int64_t* slots = out + b * (first + count);
        for (int64_t j = 0; j < first; ++j) slots[j] = j;
        slots += first;
        ranking.best(votes + b * keys, keys, count, slots, count);
        bool lost = count > 0 && slots[count - 1] < 0;
        for (int64_t j = 0; j < count; ++j) slots[j] = first + (lost ? j : slots[j]);
    }
}

// scores [rows, n] float32, count [rows]; out [rows, width] int64.
void foveate_top(const float* scores, int64_t rows, int64_t n, const int64_t* count, int64_t width, int threads,
                 int64_t* out) {
#pragma omp parallel num_threads(static_cast<int>(std::min<int64_t>(threads, rows)))
    {
        Ranking ranking;
#pragma omp for schedule(dynamic, 1)
        for (int64_t r = 0; r < rows; ++r) ranking.best(scores + r * n, n, count[r], out + r * width, width);
    }
}

// Rows of x, head h's from x + start[h], `row` elements apart, by lists index [heads / sharing, count] (absent: < 0 or
// >= limit, gives zeros) to out + out_start[h], D elements apart. The first 2 * pairs features of a row are turned:
// cos, sin [count, pairs] float32, pair p being p + span * (p / span) and the feature `span` further.
void foveate_take(int kind, const void* x, const int64_t* start, int64_t row, int64_t limit, int heads, int sharing,
                  const int64_t* index, int64_t count, int D, const float* cos, const float* sin, int pairs, int span,
                  int threads, void* out, const int64_t* out_start) {
    if (kind == 0)
        take(static_cast<const float*>(x), start, row, limit, heads, sharing, index, count, D, cos, sin, pairs, span,
             threads, static_cast<float*>(out), out_start);
    else
        take(static_cast<const bf16*>(x), start, row, limit, heads, sharing, index, count, D, cos, sin, pairs, span,
             threads, static_cast<bf16*>(out), out_start);
}
}
