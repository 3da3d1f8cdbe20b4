// What the CPU kernels share: storage types, products of a few query rows with keys, exponentials, rotations.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <utility>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using bf16 = uint16_t;

constexpr float NOTHING = -INFINITY;  // the score of what is not there

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

// As many floats as a register holds.
#if defined(__AVX512F__)
constexpr int WIDE = 16;
#elif defined(__AVX2__)
constexpr int WIDE = 8;
#else
constexpr int WIDE = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * WIDE)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDE)));

inline Floats load(const float* x) {
    Floats y;
    std::memcpy(&y, x, sizeof(y));
    return y;
}
inline Floats load(const bf16* x) {
    typedef bf16 Halves __attribute__((vector_size(2 * WIDE)));
    Halves y;
    std::memcpy(&y, x, sizeof(y));
    return (Floats)(__builtin_convertvector(y, Ints) << 16);
}
inline void save(Floats y, float* x) { std::memcpy(x, &y, sizeof(y)); }

inline float sum(Floats x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX2__)
    __m128 y = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
#else
    float total = 0;
    for (int i = 0; i < WIDE; ++i) total += x[i];
    return total;
#endif
}

// exp of non-positive numbers, relative error below 2e-7, denormal where exp is: 2^n times a degree-6 polynomial.
inline Floats exponential(Floats x) {
    x = x < -104.0f ? Floats{} - 104.0f : x;
    Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23 rounds to a whole number
    Ints n = (Ints)shifted - 0x4b400000;
    Floats whole = shifted - 12582912.0f;
    Floats r = x - whole * 0.693145752f - whole * 1.42860677e-6f;
    Floats p = Floats{} + 1.3888889e-3f;
    for (float c : {8.3333333e-3f, 4.1666667e-2f, 1.6666667e-1f, 0.5f, 1.0f, 1.0f}) p = p * r + c;
    Ints half = n >> 1;  // 2^-150 is no float, its two halves are
    return p * (Floats)((half + 127) << 23) * (Floats)((n - half + 127) << 23);
}

// The sums of four registers.
inline void sums(Floats a, Floats b, Floats c, Floats d, float* out) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
    auto folded = [](Floats x) {
        __m512d wide = _mm512_castps_pd((__m512)x);
        return _mm256_add_ps(_mm512_castps512_ps256((__m512)x), _mm256_castpd_ps(_mm512_extractf64x4_pd(wide, 1)));
    };
#else
    auto folded = [](Floats x) { return (__m256)x; };
#endif
    __m256 low = _mm256_hadd_ps(folded(a), folded(b)), high = _mm256_hadd_ps(folded(c), folded(d));
    low = _mm256_hadd_ps(low, high);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(low), _mm256_extractf128_ps(low, 1)));
#else
    out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d);
#endif
}

// f(0) .. f(N - 1), the numbers known to the compiler: an array that they index can live in registers.
template <typename F, int... I>
__attribute__((always_inline)) inline void repeat(F&& f, std::integer_sequence<int, I...>) {
    (f(std::integral_constant<int, I>{}), ...);
}
template <int N, typename F>
__attribute__((always_inline)) inline void repeat(F&& f) {
    repeat(f, std::make_integer_sequence<int, N>{});
}

// What queries are kept as while they meet many keys of type T: 16 bits only where they are multiplied so.
#if defined(__AVX512BF16__)
template <typename T>
using Query = T;
#else
template <typename T>
using Query = float;
#endif

template <typename Q, typename T>
std::vector<Q> queries(const T* q, size_t n) {
    std::vector<Q> made(n);
    for (size_t i = 0; i < n; ++i)
        if constexpr (sizeof(Q) == sizeof(T))
            made[i] = q[i];
        else
            made[i] = widen(q[i]);
    return made;
}

// Keys at once for R rows, while their sums, the rows and a key fit in registers.
template <int R>
constexpr int AT_ONCE = R <= (WIDE == 16 ? 6 : 3) ? 4 : 1;

// out[r * gap + j] = q[r] . keys[j] for R rows and K keys; products and sums in float32. 16 divides D.
template <int R, int K, typename Q, typename T>
inline void products(const Q* q, const T* const* keys, int D, float* out, int64_t gap) {
    Floats made[K * R];
    repeat<K * R>([&](auto i) __attribute__((always_inline)) { made[i] = Floats{}; });
    int d = 0;
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == 2 && sizeof(Q) == 2)
        for (; d + 32 <= D && D % 32 == 0; d += 32)
            repeat<R>([&](auto r) __attribute__((always_inline)) {
                __m512bh y = (__m512bh)_mm512_loadu_si512(q + r * D + d);
                repeat<K>([&](auto j) __attribute__((always_inline)) {
                    __m512bh x = (__m512bh)_mm512_loadu_si512(keys[j] + d);
                    made[j * R + r] = (Floats)_mm512_dpbf16_ps((__m512)made[j * R + r], y, x);
                });
            });
#endif
    for (; d < D; d += WIDE) {
        Floats y[R];
        repeat<R>([&](auto r) __attribute__((always_inline)) { y[r] = load(q + r * D + d); });
        repeat<K>([&](auto j) __attribute__((always_inline)) {
            Floats x = load(keys[j] + d);
            repeat<R>([&](auto r) __attribute__((always_inline)) { made[j * R + r] += y[r] * x; });
        });
    }
    repeat<R>([&](auto r) __attribute__((always_inline)) {
        if constexpr (K == 4)
            sums(made[r], made[R + r], made[2 * R + r], made[3 * R + r], out + r * gap);
        else
            repeat<K>([&](auto j) __attribute__((always_inline)) { out[r * gap + j] = sum(made[j * R + r]); });
    });
}

// out[r * gap] = q[r] . k for R rows.
template <int R, typename Q, typename T>
inline void dots(const Q* q, const T* k, int D, float* out, int64_t gap) {
    products<R, 1>(q, &k, D, out, gap);
}

inline void store(float x, float* y) { *y = x; }
inline void store(float x, bf16* y) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    *y = x != x ? 0x7fc0 : static_cast<bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Rotates pair p of x, the features a = p + span * (p / span) and a + span, by the angle of cos[p], sin[p].
template <typename T>
void turn(const T* __restrict x, const float* __restrict cos, const float* __restrict sin, int pairs, int span,
          T* __restrict y) {
    if (span == 1) {
        for (int p = 0; p < pairs; ++p) {
            float a = widen(x[2 * p]), b = widen(x[2 * p + 1]);
            store(a * cos[p] - b * sin[p], y + 2 * p);
            store(b * cos[p] + a * sin[p], y + 2 * p + 1);
        }
        return;
    }
    for (int p = 0; p < pairs; p += span, x += 2 * span, y += 2 * span)
        for (int i = 0; i < span; ++i) {
            float a = widen(x[i]), b = widen(x[i + span]);
            store(a * cos[p + i] - b * sin[p + i], y + i);
            store(b * cos[p + i] + a * sin[p + i], y + i + span);
        }
}

// The same to float32, `span` features side by side where they fill registers.
template <typename T>
void turn_wide(const T* x, const float* cos, const float* sin, int pairs, int span, float* y) {
    if (span % WIDE || pairs % span) {
        for (int p = 0; p < pairs; ++p) {
            int at = p + span * (p / span);
            float a = widen(x[at]), b = widen(x[at + span]);
            y[at] = a * cos[p] - b * sin[p];
            y[at + span] = b * cos[p] + a * sin[p];
        }
        return;
    }
    for (int p = 0; p < pairs; p += span, x += 2 * span, y += 2 * span)
        for (int i = 0; i < span; i += WIDE) {
            Floats a = load(x + i), b = load(x + i + span), c = load(cos + p + i), s = load(sin + p + i);
            save(a * c - b * s, y + i);
            save(b * c + a * s, y + i + span);
        }
}

}  // namespace
