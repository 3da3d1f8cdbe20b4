// Attention of a few query rows per KV head over all stored keys, or over a list of them, on CPU.
//
// One task reads one stretch of one KV head's keys once for all R rows of its group; the partial results of the
// stretches are merged by their log-sum-exps. Scores, weights and sums are float32 whatever the storage.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

constexpr int BLOCK = 64;      // keys whose scores are held at once
constexpr int AHEAD = 8;       // keys fetched ahead of use
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

using bf16 = uint16_t;

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

template <typename T>
inline void prefetch(const T* row, int width) {
    for (int byte = 0; byte < width * static_cast<int>(sizeof(T)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(row) + byte, 0, 1);
}

#if defined(__AVX512F__)
inline __m512 load(const float* p) { return _mm512_loadu_ps(p); }
inline __m512 load(const bf16* p) {
    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
// exp of non-positive numbers, relative error below 2e-7: 2^n times a degree-6 polynomial.
inline __m512 exp512(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.3f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693145752f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(1.42860677e-6f), r);
    __m512 p = _mm512_set1_ps(1.3888889e-3f);
    for (float c : {8.3333333e-3f, 4.1666667e-2f, 1.6666667e-1f, 0.5f, 1.0f, 1.0f})
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
    return _mm512_scalef_ps(p, n);
}
#endif

// scores[r] += q[r] . k for R rows
template <typename T, int R>
inline void dots(const float* q, const T* k, int D, float* out) {
#if defined(__AVX512F__)
    __m512 acc[R];
    for (int r = 0; r < R; ++r) acc[r] = _mm512_setzero_ps();
    for (int d = 0; d < D; d += 16) {
        __m512 kv = load(k + d);
        for (int r = 0; r < R; ++r) acc[r] = _mm512_fmadd_ps(_mm512_loadu_ps(q + r * D + d), kv, acc[r]);
    }
    for (int r = 0; r < R; ++r) out[r] = _mm512_reduce_add_ps(acc[r]);
#else
    for (int r = 0; r < R; ++r) {
        float sum = 0;
        for (int d = 0; d < D; ++d) sum += q[r * D + d] * widen(k[d]);
        out[r] = sum;
    }
#endif
}

template <typename T, int R>
inline void accumulate(const float* p, const T* v, int D, float* acc, int begin, int end) {
#if defined(__AVX512F__)
    for (int d = begin; d < end; d += 16) {
        __m512 vv = load(v + d);
        for (int r = 0; r < R; ++r) {
            float* a = acc + r * D + d;
            _mm512_storeu_ps(a, _mm512_fmadd_ps(_mm512_set1_ps(p[r * BLOCK]), vv, _mm512_loadu_ps(a)));
        }
    }
#else
    for (int r = 0; r < R; ++r)
        for (int d = begin; d < end; ++d) acc[r * D + d] += p[r * BLOCK] * widen(v[d]);
#endif
}

#if defined(__AVX512F__)
// 64 columns of a block's values at once: the sums stay in registers over all keys of the block.
template <typename T, int R>
inline void accumulate_block(const float* p, const T* const* rows, int count, int D, float* acc, int d) {
    __m512 a[R][4];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < 4; ++c) a[r][c] = _mm512_loadu_ps(acc + r * D + d + 16 * c);
    for (int j = 0; j < count; ++j) {
        const T* v = rows[j] + d;
        __m512 x0 = load(v), x1 = load(v + 16), x2 = load(v + 32), x3 = load(v + 48);
        for (int r = 0; r < R; ++r) {
            __m512 w = _mm512_set1_ps(p[r * BLOCK + j]);
            a[r][0] = _mm512_fmadd_ps(w, x0, a[r][0]);
            a[r][1] = _mm512_fmadd_ps(w, x1, a[r][1]);
            a[r][2] = _mm512_fmadd_ps(w, x2, a[r][2]);
            a[r][3] = _mm512_fmadd_ps(w, x3, a[r][3]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < 4; ++c) _mm512_storeu_ps(acc + r * D + d + 16 * c, a[r][c]);
}
#endif

inline float weigh(float* s, int count, float top) {
    float sum = 0;
    int j = 0;
#if defined(__AVX512F__)
    __m512 total = _mm512_setzero_ps(), shift = _mm512_set1_ps(top);
    for (; j + 16 <= count; j += 16) {
        __m512 w = exp512(_mm512_sub_ps(_mm512_loadu_ps(s + j), shift));
        _mm512_storeu_ps(s + j, w);
        total = _mm512_add_ps(total, w);
    }
    sum = _mm512_reduce_add_ps(total);
#endif
    for (; j < count; ++j) {
        s[j] = std::exp(s[j] - top);
        sum += s[j];
    }
    return sum;
}

// One stretch [first, last) of a list (or of all keys) for R rows: acc [R, Dv], top [R], sum [R].
template <typename T, int R>
void stretch(const float* q, const T* k, const T* v, int64_t k_row, int64_t v_row, const int64_t* list, int64_t first,
             int64_t last, int D, int Dv, float* acc, float* top, float* sum) {
    float scores[R * BLOCK], one[R];
    const T* values[BLOCK];
    std::fill(acc, acc + R * Dv, 0.0f);
    std::fill(top, top + R, NOTHING);
    std::fill(sum, sum + R, 0.0f);
    for (int64_t begin = first; begin < last;) {
        int count = 0;
        for (; begin < last && count < BLOCK; ++begin) {
            int64_t slot = list ? list[begin] : begin;
            if (slot < 0) continue;  // absent
            if (list && begin + AHEAD < last && list[begin + AHEAD] >= 0) {
                prefetch(k + list[begin + AHEAD] * k_row, D);
                prefetch(v + list[begin + AHEAD] * v_row, Dv);
            }
            dots<T, R>(q, k + slot * k_row, D, one);
            for (int r = 0; r < R; ++r) scores[r * BLOCK + count] = one[r];
            values[count++] = v + slot * v_row;
        }
        if (!count) continue;
        for (int r = 0; r < R; ++r) {
            float* s = scores + r * BLOCK;
            float high = std::max(top[r], *std::max_element(s, s + count));
            float fade = top[r] == NOTHING ? 0.0f : std::exp(top[r] - high);
            if (fade != 1.0f)
                for (int d = 0; d < Dv; ++d) acc[r * Dv + d] *= fade;
            sum[r] = sum[r] * fade + weigh(s, count, high);
            top[r] = high;
        }
        int d = 0;
#if defined(__AVX512F__)
        for (; d + 64 <= Dv; d += 64) accumulate_block<T, R>(scores, values, count, Dv, acc, d);
#endif
        if (d < Dv)
            for (int j = 0; j < count; ++j) accumulate<T, R>(scores + j, values[j], Dv, acc, d, Dv);
    }
}

template <typename T>
using Stretch = void (*)(const float*, const T*, const T*, int64_t, int64_t, const int64_t*, int64_t, int64_t, int, int,
                         float*, float*, float*);

template <typename T>
Stretch<T> pick(int rows) {
    switch (rows) {
        case 1: return stretch<T, 1>;
        case 2: return stretch<T, 2>;
        case 3: return stretch<T, 3>;
        case 4: return stretch<T, 4>;
        case 5: return stretch<T, 5>;
        case 6: return stretch<T, 6>;
        case 7: return stretch<T, 7>;
        default: return stretch<T, 8>;
    }
}

template <typename T>
void run(const float* q, const T* k, const T* v, const int64_t* k_start, const int64_t* v_start, int64_t k_row,
         int64_t v_row, const int64_t* list, const int64_t* length, int64_t list_row, int heads, int rows, int D, int Dv,
         int threads, float* out, float* lse) {
    // Enough stretches that all threads have work, each long enough to pay for its merge.
    int64_t longest = *std::max_element(length, length + heads);
    int wanted = (threads * 2 + heads - 1) / heads;
    int splits = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(wanted, longest / 256)));
    int pieces = (rows + 7) / 8;
    std::vector<float> acc(static_cast<size_t>(heads) * splits * rows * Dv), top(heads * splits * rows),
        sum(heads * splits * rows);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) collapse(2)
    for (int h = 0; h < heads; ++h)
        for (int s = 0; s < splits; ++s) {
            int64_t first = length[h] * s / splits, last = length[h] * (s + 1) / splits;
            for (int piece = 0; piece < pieces; ++piece) {
                int r = piece * 8, n = std::min(8, rows - r);
                size_t at = (static_cast<size_t>(h) * splits + s) * rows + r;
                pick<T>(n)(q + (static_cast<size_t>(h) * rows + r) * D, k + k_start[h], v + v_start[h], k_row, v_row,
                           list ? list + h * list_row : nullptr, first, last, D, Dv, &acc[at * Dv], &top[at], &sum[at]);
            }
        }
    for (int h = 0; h < heads; ++h)
        for (int r = 0; r < rows; ++r) {
            float high = NOTHING, total = 0;
            for (int s = 0; s < splits; ++s) high = std::max(high, top[(h * splits + s) * rows + r]);
            float* o = out + (static_cast<size_t>(h) * rows + r) * Dv;
            std::fill(o, o + Dv, 0.0f);
            for (int s = 0; s < splits && high != NOTHING; ++s) {
                size_t at = (static_cast<size_t>(h) * splits + s) * rows + r;
                if (top[at] == NOTHING) continue;
                float share = std::exp(top[at] - high);
                total += share * sum[at];
                for (int d = 0; d < Dv; ++d) o[d] += share * acc[at * Dv + d];
            }
            for (int d = 0; d < Dv && total > 0; ++d) o[d] /= total;
            lse[h * rows + r] = total > 0 ? high + std::log(total) : NOTHING;
        }
}

}  // namespace

extern "C" {

// q [heads, rows, D] float32, already scaled; k, v: first elements of storage, head h starting at k_start[h], rows
// k_row elements apart; list [heads, list_row] key slots (< 0: absent) or null for slots 0..length[h]; length [heads].
// out [heads, rows, Dv], lse [heads, rows] float32. kind: 0 float32, 1 bfloat16. D and Dv multiples of 16.
void foveate_decode(int kind, const float* q, const void* k, const void* v, const int64_t* k_start,
                    const int64_t* v_start, int64_t k_row, int64_t v_row, const int64_t* list, const int64_t* length,
                    int64_t list_row, int heads, int rows, int D, int Dv, int threads, float* out, float* lse) {
    if (kind == 0)
        run(q, static_cast<const float*>(k), static_cast<const float*>(v), k_start, v_start, k_row, v_row, list, length,
            list_row, heads, rows, D, Dv, threads, out, lse);
    else
        run(q, static_cast<const bf16*>(k), static_cast<const bf16*>(v), k_start, v_start, k_row, v_row, list, length,
            list_row, heads, rows, D, Dv, threads, out, lse);
}
}
