// Attention of a few query rows per KV head over all stored keys, or over a list of them, on CPU.
//
// One task reads one stretch of one KV head's keys once for all R rows of its group; the partial results of the
// stretches are merged by their log-sum-exps. Scores, weights and sums are float32 whatever the storage.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "decode.h"
#include "dots.h"

namespace {

constexpr int BLOCK = 64;      // keys whose scores are held at once
constexpr int TURNING = 256;   // entries whose rotations stay in cache until all heads have used them

template <typename T>
inline void prefetch(const T* row, int width) {
    for (int byte = 0; byte < width * static_cast<int>(sizeof(T)); byte += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(row) + byte, 0, 1);
}

#if defined(__AVX512F__)
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

// One key's values, WIDE columns at a time.
template <typename T, int R>
inline void accumulate(const float* p, const T* v, int D, float* acc, int begin, int end) {
    for (int d = begin; d < end; d += WIDE) {
        Floats x = load(v + d);
        for (int r = 0; r < R; ++r) save(load(acc + r * D + d) + p[r * BLOCK] * x, acc + r * D + d);
    }
}

#if defined(__AVX512F__)
// Four registers of 64 columns of one value row. Storage of 16 bits is widened without shuffles: the even columns of
// 32 by a shift, the odd ones by a mask, so its sums lie in the order that `place` gives.
inline void columns(const float* v, __m512* x) {
    for (int c = 0; c < 4; ++c) x[c] = _mm512_loadu_ps(v + 16 * c);
}
inline void columns(const bf16* v, __m512* x) {
    for (int c = 0; c < 2; ++c) {
        __m512i pair = _mm512_loadu_si512(v + 32 * c);
        x[2 * c] = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
        x[2 * c + 1] = _mm512_castsi512_ps(_mm512_and_si512(pair, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
    }
}

template <int R>
constexpr int WIDTH = 64;

// WIDTH columns of a block's values at once: the sums stay in registers over all keys of the block.
template <typename T, int R, typename F>
inline void accumulate_block(const float* p, const T* const* rows, int count, int D, float* acc, int d, F&& ahead) {
    __m512 a[R][4], x[4];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < 4; ++c) a[r][c] = _mm512_loadu_ps(acc + r * D + d + 16 * c);
    for (int j = 0; j < count; ++j) {
        ahead(j);
        columns(rows[j] + d, x);
        for (int r = 0; r < R; ++r) {
            __m512 w = _mm512_set1_ps(p[r * BLOCK + j]);
            for (int c = 0; c < 4; ++c) a[r][c] = _mm512_fmadd_ps(w, x[c], a[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < 4; ++c) _mm512_storeu_ps(acc + r * D + d + 16 * c, a[r][c]);
}
#else
// Sixteen registers hold the sums of R rows, the values, and a weight.
template <int R>
constexpr int WIDTH = R <= 4 ? 2 * WIDE : WIDE;

template <typename T, int R, typename F>
inline void accumulate_block(const float* p, const T* const* rows, int count, int D, float* acc, int d, F&& ahead) {
    constexpr int C = WIDTH<R> / WIDE;
    Floats a[R][C], x[C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) a[r][c] = load(acc + r * D + d + WIDE * c);
    for (int j = 0; j < count; ++j) {
        ahead(j);
        for (int c = 0; c < C; ++c) x[c] = load(rows[j] + d + WIDE * c);
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) a[r][c] += p[r * BLOCK + j] * x[c];
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) save(a[r][c], acc + r * D + d + WIDE * c);
}
#endif

// Where the sum of column d lies.
template <typename T>
inline int place(int d, int D) {
#if defined(__AVX512F__)
    if (sizeof(T) == 2 && d < D / 64 * 64) return (d & ~31) + ((d & 31) >> 1) + (d & 1) * 16;
#endif
    return d;
}

// s becomes scale * s; its greatest.
inline float greatest(float* s, int count, float scale) {
    float high = NOTHING;
    int j = 0;
    if (count >= WIDE) {
        Floats tops = Floats{} + NOTHING;
        for (; j + WIDE <= count; j += WIDE) {
            Floats x = load(s + j) * scale;
            save(x, s + j);
            tops = x > tops ? x : tops;
        }
        for (int i = 0; i < WIDE; ++i) high = std::max(high, tops[i]);
    }
    for (; j < count; ++j) high = std::max(high, s[j] *= scale);
    return high;
}

inline float weigh(float* s, int count, float top) {
    int j = 0;
    Floats total{};
    for (; j + WIDE <= count; j += WIDE) {
#if defined(__AVX512F__)
        Floats w = (Floats)exp512((__m512)(load(s + j) - top));
#else
        Floats w = exponential(load(s + j) - top);
#endif
        save(w, s + j);
        total += w;
    }
    float made = sum(total);
    for (; j < count; ++j) {
        s[j] = std::exp(s[j] - top);
        made += s[j];
    }
    return made;
}

// The rotations of a list's keys: cos, sin [rows, pairs] as `turn` reads them; none where pairs is 0. Entry j, slot s, is
// turned by row j, or where `compact` by row s - j: by how far it moves to stand side by side with the others.
struct Turns {
    const float* cos;
    const float* sin;
    int pairs, span;
    bool compact;

    int64_t row(int64_t entry, int64_t slot) const { return compact ? slot - entry : entry; }
};

// Scores of `count` keys, out [R, BLOCK]; ahead(j) is called before key j's turn.
template <int R, typename Q, typename T, typename F>
inline void score(const Q* q, const T* const* keys, int count, int D, float* out, F&& ahead) {
    int j = 0;
    for (; j + AT_ONCE<R> <= count; j += AT_ONCE<R>) {
        for (int i = 0; i < AT_ONCE<R>; ++i) ahead(j + i);
        products<R, AT_ONCE<R>>(q, keys + j, D, out + j, BLOCK);
    }
    for (; j < count; ++j) {
        ahead(j);
        dots<R>(q, keys[j], D, out + j, BLOCK);
    }
}

// One stretch [first, last) of a list (or of all keys) for R rows: acc [R, Dv], top [R], sum [R].
template <typename T, int R>
void stretch(const T* q, float scale, const T* k, const T* v, int64_t k_row, int64_t v_row, const int64_t* list,
             int64_t limit, const Turns& turns, int64_t first, int64_t last, int D, int Dv, float* acc, float* top,
             float* sum) {
    float scores[R * BLOCK];
    const T *keys[BLOCK], *values[BLOCK];
    int64_t entry[BLOCK];
    bool turning = list && turns.pairs;
    // Turned keys are not rounded again.
    std::vector<float> turned(turning ? BLOCK * D : 0), wide = queries<float>(q, turning ? R * D : 0);
    std::vector<Query<T>> own = queries<Query<T>>(q, turning ? 0 : R * D);
    const float* fresh[BLOCK];
    for (int j = 0; turning && j < BLOCK; ++j) fresh[j] = turned.data() + j * D;
    std::fill(acc, acc + R * Dv, 0.0f);
    std::fill(top, top + R, NOTHING);
    std::fill(sum, sum + R, 0.0f);
    for (int64_t j = first; list && j < std::min(last, first + BLOCK); ++j)
        if (list[j] >= 0 && list[j] < limit) prefetch(k + list[j] * k_row, D), prefetch(v + list[j] * v_row, Dv);
    for (int64_t begin = first; begin < last;) {
        int count = 0;
        for (; begin < last && count < BLOCK; ++begin) {
            int64_t slot = list ? list[begin] : begin;
            if (list && (slot < 0 || slot >= limit)) continue;  // absent
            entry[count] = turns.row(begin, slot);
            keys[count] = k + slot * k_row;
            values[count++] = v + slot * v_row;
        }
        if (!count) continue;
        // Rows of a list lie anywhere: the next block's keys are fetched while this one's are scored, its values while
        // this one's are summed.
        auto coming = [&](int j) {
            int64_t slot = list && begin + j < last ? list[begin + j] : -1;
            return slot < limit ? slot : -1;
        };
        auto next_key = [&](int j) {
            int64_t slot = coming(j);
            if (slot < 0) return;
            prefetch(k + slot * k_row, D);
            if (!turning || !turns.compact) return;
            int64_t row = turns.row(begin + j, slot) * turns.pairs;
            prefetch(turns.cos + row, turns.pairs), prefetch(turns.sin + row, turns.pairs);
        };
        auto next_value = [&](int j) {
            if (int64_t slot = coming(j); slot >= 0) prefetch(v + slot * v_row, Dv);
        };
        if (turning) {
            int width = 2 * turns.pairs;
            for (int j = 0; j < count; ++j) {
                float* to = turned.data() + j * D;
                const float *cos = turns.cos + entry[j] * turns.pairs, *sin = turns.sin + entry[j] * turns.pairs;
                turn_wide(keys[j], cos, sin, turns.pairs, turns.span, to);
                for (int d = width; d < D; ++d) to[d] = widen(keys[j][d]);
            }
            score<R>(wide.data(), fresh, count, D, scores, next_key);
        } else {
            score<R>(own.data(), keys, count, D, scores, next_key);
        }
        for (int r = 0; r < R; ++r) {
            float* s = scores + r * BLOCK;
            float high = std::max(top[r], greatest(s, count, scale));
            float fade = top[r] == NOTHING ? 0.0f : std::exp(top[r] - high);
            if (fade != 1.0f)
                for (int d = 0; d < Dv; ++d) acc[r * Dv + d] *= fade;
            sum[r] = sum[r] * fade + weigh(s, count, high);
            top[r] = high;
        }
        int d = 0;
        auto nothing = [](int) {};
        if (WIDTH<R> <= Dv) accumulate_block<T, R>(scores, values, count, Dv, acc, d, next_value), d += WIDTH<R>;
        for (; d + WIDTH<R> <= Dv; d += WIDTH<R>) accumulate_block<T, R>(scores, values, count, Dv, acc, d, nothing);
        if (d < Dv)
            for (int j = 0; j < count; ++j) accumulate<T, R>(scores + j, values[j], Dv, acc, d, Dv);
    }
}

template <typename T>
using Stretch = void (*)(const T*, float, const T*, const T*, int64_t, int64_t, const int64_t*, int64_t, const Turns&,
                         int64_t, int64_t, int, int, float*, float*, float*);

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

// Segments of keys, each with its own queries; `parts` of them, `heads` apart, make one softmax.
template <typename T>
struct Segments {
    const T* q;
    float scale;
    const T* const* k;
    const T* const* v;
    int64_t k_row, v_row;
    const int64_t* const* list;
    const int64_t* length;
    int64_t limit;
    Turns turns;
    int heads, parts, rows, D, Dv;
};

template <typename T>
void run(const Segments<T>& given, int threads, float* out, float* lse) {
    const int64_t* length = given.length;
    int heads = given.heads, all = heads * given.parts, rows = given.rows, D = given.D, Dv = given.Dv;
    // Enough stretches that all threads have work, each long enough to pay for its merge.
    int64_t longest = *std::max_element(length, length + all);
    int wanted = (threads * 2 + heads - 1) / heads;
    int64_t splits = given.turns.pairs ? longest / TURNING : std::min<int64_t>(wanted, longest / 256);
    splits = std::max<int64_t>(1, splits);
    int pieces = (rows + 7) / 8;
    std::vector<float> acc(static_cast<size_t>(all) * splits * rows * Dv), top(all * splits * rows),
        sum(all * splits * rows);
    // One thread reads a stretch of the rotations for all heads, where that leaves work for all threads.
    int together = given.turns.pairs && splits * given.parts >= 2 * threads ? heads : 1;
#pragma omp parallel for schedule(dynamic, together) num_threads(threads) collapse(3)
    for (int part = 0; part < given.parts; ++part)
        for (int64_t s = 0; s < splits; ++s)
            for (int head = 0; head < heads; ++head) {
                int h = part * heads + head;
                int64_t first = length[h] * s / splits, last = length[h] * (s + 1) / splits;
                for (int piece = 0; piece < pieces; ++piece) {
                    int r = piece * 8, n = std::min(8, rows - r);
                    size_t at = (static_cast<size_t>(h) * splits + s) * rows + r;
                    pick<T>(n)(given.q + (static_cast<size_t>(h) * rows + r) * D, given.scale, given.k[h], given.v[h],
                               given.k_row, given.v_row, given.list[h], given.limit, given.turns, first, last, D, Dv,
                               &acc[at * Dv], &top[at], &sum[at]);
                }
            }
    for (int h = 0; h < heads; ++h)
        for (int r = 0; r < rows; ++r) {
            float high = NOTHING, total = 0;
            float* o = out + (static_cast<size_t>(h) * rows + r) * Dv;
            std::fill(o, o + Dv, 0.0f);
            auto at = [&](int part, int64_t s) { return (static_cast<size_t>(part * heads + h) * splits + s) * rows + r; };
            for (int part = 0; part < given.parts; ++part)
                for (int64_t s = 0; s < splits; ++s) high = std::max(high, top[at(part, s)]);
            for (int part = 0; part < given.parts && high != NOTHING; ++part)
                for (int64_t s = 0; s < splits; ++s) {
                    size_t i = at(part, s);
                    if (top[i] == NOTHING) continue;
                    float share = std::exp(top[i] - high);
                    total += share * sum[i];
                    for (int d = 0; d < Dv; ++d) o[d] += share * acc[i * Dv + place<T>(d, Dv)];
                }
            for (int d = 0; d < Dv && total > 0; ++d) o[d] /= total;
            lse[h * rows + r] = total > 0 ? high + std::log(total) : NOTHING;
        }
}

}  // namespace

extern "C" {

void foveate_decode(int kind, const void* q, float scale, const void* const* k, const void* const* v, int64_t k_row,
                    int64_t v_row, const int64_t* const* list, const int64_t* length, int64_t limit, const float* cos,
                    const float* sin, int pairs, int span, int compact, int heads, int parts, int rows, int D, int Dv,
                    int threads, float* out, float* lse) {
    Turns turns{cos, sin, pairs, span, compact != 0};
    if (kind == 0)
        run(Segments<float>{static_cast<const float*>(q), scale, reinterpret_cast<const float* const*>(k),
                            reinterpret_cast<const float* const*>(v), k_row, v_row, list, length, limit, turns, heads,
                            parts, rows, D, Dv},
            threads, out, lse);
    else
        run(Segments<bf16>{static_cast<const bf16*>(q), scale, reinterpret_cast<const bf16* const*>(k),
                           reinterpret_cast<const bf16* const*>(v), k_row, v_row, list, length, limit, turns, heads,
                           parts, rows, D, Dv},
            threads, out, lse);
}
}
