// The best of many scores.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "dots.h"

namespace {

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

// Below this, starting threads costs what they save.
constexpr int64_t WORTH_SHARING = 8192;

// What ranking a row needs. Lists of keys end in zeros, so that sixteen can always be read.
struct Ranking {
    // Keys [begin, end) of a row: one thread's.
    struct Share {
        int64_t begin = 0, end = 0, held = 0, more = 0, level = 0;
        uint32_t counts[4][1 << 11];
    };

    std::unique_ptr<uint32_t[]> all, same;
    std::vector<Share> shares;
    int64_t room = 0, lists = 0;

    // The digits of n keys are counted.
    static void count(Share& share, const uint32_t* keys, int64_t n, int shift, uint32_t last) {
        // Scores share few exponents: four counters each, so that increments do not wait for one another.
        std::memset(share.counts, 0, sizeof(share.counts));
        int64_t j = 0;
        for (; j + 4 <= n; j += 4)
            for (int i = 0; i < 4; ++i) ++share.counts[i][keys[j + i] >> shift & last];
        for (; j < n; ++j) ++share.counts[0][keys[j] >> shift & last];
    }

    // The digit of the need-th greatest of the keys counted; need becomes its rank among the keys of that digit.
    static uint32_t digit(const Share* shares, size_t sharing, uint32_t last, int64_t* need) {
        uint32_t at = last;
        for (; at > 0; --at) {
            int64_t held = 0;
            for (size_t t = 0; t < sharing; ++t)
                for (const auto& counts : shares[t].counts) held += counts[at];
            if (held >= *need) break;
            *need -= held;
        }
        return at;
    }

    // Those of n keys whose masked bits are `wanted`, to `to`; how many.
    static int64_t gather(const uint32_t* keys, int64_t n, uint32_t mask, uint32_t wanted, uint32_t* to) {
        int64_t held = 0;
        for (int64_t j = 0; j < n; j += LANES)
            for (uint32_t bits = equal(keys + j, mask, wanted); bits; bits &= bits - 1)
                to[held++] = keys[j + __builtin_ctz(bits)];
        // Where the prefix is 0, zeros from beyond the end were taken too.
        return std::min(held, n);
    }

    void make_room(int64_t n, int threads) {
        int sharing = n < WORTH_SHARING ? 1 : std::max(1, threads);
        if (n > room || sharing > static_cast<int>(shares.size())) {
            // Not vectors: nothing is read before it is written.
            room = std::max(room, n), lists = room + LANES;
            all.reset(new uint32_t[lists]);
            same.reset(new uint32_t[lists * sharing]);
        }
        shares.resize(sharing);
        for (int t = 0; t < sharing; ++t) {
            auto cut = [&](int64_t at) { return at == sharing ? n : n * at / sharing / LANES * LANES; };
            shares[t].begin = cut(t), shares[t].end = cut(t + 1);
        }
    }

    // The slots of the `count` best of one row, ascending; of equals the first. -1 beyond what can be taken.
    void best(const float* row, int64_t n, int64_t count_wanted, int64_t* out, int64_t width, int threads = 1) {
        make_room(n, threads);
        int sharing = static_cast<int>(shares.size());
        std::fill_n(&all[n], LANES, 0);
        constexpr int FIRST = 21;
        constexpr uint32_t ELEVEN = (1u << 11) - 1;
#pragma omp parallel for num_threads(sharing) if (sharing > 1)
        for (int t = 0; t < sharing; ++t) {
            for (int64_t j = shares[t].begin; j < shares[t].end; ++j) all[j] = ordered(row[j]);
            count(shares[t], &all[shares[t].begin], shares[t].end - shares[t].begin, FIRST, ELEVEN);
        }
        int64_t need = std::max<int64_t>(0, std::min(count_wanted, n));
        uint32_t least = digit(shares.data(), sharing, ELEVEN, &need) << FIRST, mask = ELEVEN << FIRST;
#pragma omp parallel for num_threads(sharing) if (sharing > 1)
        for (int t = 0; t < sharing; ++t) {
            Share& own = shares[t];
            own.held = gather(&all[own.begin], own.end - own.begin, mask, least, &same[t * lists]);
        }
        int64_t left = shares[0].held;
        for (int t = 1; t < sharing; left += shares[t++].held)
            std::memmove(&same[left], &same[t * lists], shares[t].held * sizeof(uint32_t));
        least |= lower_digits(left, mask, &need, least);
        if (!least) need = 0;
        write(least, need, out, width);
    }

    // The digits below the first of the need-th greatest of same[0, left), all of the prefix `least`.
    uint32_t lower_digits(int64_t left, uint32_t mask, int64_t* need, uint32_t least) {
        uint32_t prefix = least;
        for (int shift : {10, 0}) {
            uint32_t last = shift ? (1u << 11) - 1 : (1u << 10) - 1;
            std::fill_n(&same[left], LANES, 0);
            count(shares[0], same.get(), left, shift, last);
            least |= digit(shares.data(), 1, last, need) << shift;
            mask |= last << shift;
            left = gather(same.get(), left, mask, least, same.get());
        }
        return least ^ prefix;
    }

    // The slots of all keys above `least`, and of the first `need` that equal it.
    void write(uint32_t least, int64_t need, int64_t* out, int64_t width) {
        int sharing = static_cast<int>(shares.size());
        if (sharing > 1) {
#pragma omp parallel for num_threads(sharing)
            for (int t = 0; t < sharing; ++t) {
                Share& own = shares[t];
                own.more = own.level = 0;
                for (int64_t j = own.begin; j < own.end; j += LANES) {
                    own.more += __builtin_popcount(above(&all[j], least));
                    own.level += __builtin_popcount(equal(&all[j], ~0u, least));
                }
            }
        }
        std::vector<int64_t> first(sharing + 1), ties(sharing);
        for (int t = 0; t < sharing; ++t) {
            ties[t] = sharing > 1 ? std::min(need, shares[t].level) : need;
            first[t + 1] = std::min(width, first[t] + shares[t].more + ties[t]);
            need -= ties[t];
        }
        if (sharing == 1) first[1] = width;
        int64_t end = 0;
#pragma omp parallel for num_threads(sharing) if (sharing > 1)
        for (int t = 0; t < sharing; ++t) {
            int64_t taken = first[t];
            for (int64_t j = shares[t].begin; j < shares[t].end && taken < first[t + 1]; j += LANES) {
                uint32_t more = above(&all[j], least), level = ties[t] ? equal(&all[j], ~0u, least) : 0;
                for (uint32_t bits = more | level; bits && taken < first[t + 1]; bits &= bits - 1) {
                    int at = __builtin_ctz(bits);
                    bool tie = level >> at & 1;
                    if (tie && !ties[t]) continue;
                    ties[t] -= tie;
                    out[taken++] = j + at;
                }
            }
            if (t == sharing - 1) end = taken;
        }
        std::fill(out + end, out + width, -1);
    }
};

}  // namespace
