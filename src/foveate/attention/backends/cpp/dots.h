// What the CPU kernels share: storage types, and products of a few query rows with one key.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using bf16 = uint16_t;

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

// out[r * gap] = q[r] . k for R rows; products and sums in float32.
template <int R>
inline void dots(const float* q, const float* k, int D, float* out, int64_t gap) {
#if defined(__AVX512F__)
    __m512 acc[R];
    for (int r = 0; r < R; ++r) acc[r] = _mm512_setzero_ps();
    for (int d = 0; d < D; d += 16) {
        __m512 x = _mm512_loadu_ps(k + d);
        for (int r = 0; r < R; ++r) acc[r] = _mm512_fmadd_ps(_mm512_loadu_ps(q + r * D + d), x, acc[r]);
    }
    for (int r = 0; r < R; ++r) out[r * gap] = _mm512_reduce_add_ps(acc[r]);
#else
    for (int r = 0; r < R; ++r) {
        float sum = 0;
        for (int d = 0; d < D; ++d) sum += q[r * D + d] * k[d];
        out[r * gap] = sum;
    }
#endif
}

template <int R>
inline void dots(const bf16* q, const bf16* k, int D, float* out, int64_t gap) {
#if defined(__AVX512BF16__)
    if (D % 32 == 0) {
        __m512 acc[R];
        for (int r = 0; r < R; ++r) acc[r] = _mm512_setzero_ps();
        for (int d = 0; d < D; d += 32) {
            __m512bh x = (__m512bh)_mm512_loadu_si512(k + d);
            for (int r = 0; r < R; ++r)
                acc[r] = _mm512_dpbf16_ps(acc[r], (__m512bh)_mm512_loadu_si512(q + r * D + d), x);
        }
        for (int r = 0; r < R; ++r) out[r * gap] = _mm512_reduce_add_ps(acc[r]);
        return;
    }
#endif
    for (int r = 0; r < R; ++r) {
        float sum = 0;
        for (int d = 0; d < D; ++d) sum += widen(q[r * D + d]) * widen(k[d]);
        out[r * gap] = sum;
    }
}

}  // namespace
