// One decode step of a layer that reads what its query heads vote for: the new key is coded; where the query has turned
// away from the one that the present choice was made for, another is made; the choice and the last tokens are read.
#include <cmath>
#include <cstdint>
#include <vector>

#include "bytes.h"
#include "decode.h"
#include "votes.h"

namespace {

// In Python: `TokenStep` of cpp_votes.py. B sequences, H KV heads of G query heads each; slot `keys` - 1 is new.
struct TokenStep {
    const void *q, *k, *v;        // [B, H * G, D] contiguous; [B, H, keys, D or Dv], rows k_row, v_row apart: rotated
    const float *cos, *sin;       // [3, pairs]: from where they stand to no rotation, to qbar's, to the query's rank
    const float *back_cos, *back_sin;  // [at least keys, pairs]: by 0, -1, -2, ... positions
    const float *mean, *spread;   // [B, H, D]: what is coded is (key - mean) / spread
    int8_t* codes;                // [B, H, keys, D], D apart, c_batch and c_head
    float* steps;                 // [B, H, keys], s_batch and s_head apart
    float* held;                  // [B, H * G, D]: qbar of the choice
    int64_t* index;               // [B, first + count]: the choice
    int64_t* served;              // [B]: steps that it has served, -1: none was made
    bool* copied;                 // [B]: whether copies hold it
    const void *keys_copied, *values_copied;  // [B, H, first + count, D or Dv] contiguous: the copies, or null
    void* reading;                // [2, B, H * G, D], for working
    void* out;                    // [B, H * G, Dv]
    int64_t k_batch, k_head, k_row, v_batch, v_head, v_row, c_batch, c_head, s_batch, s_head, keys, first, last, count;
    int32_t kind, batch, heads, group, size, v_size, pairs, span, threads, lend;  // lend: steps before a copy is due
    float scale, threshold, softmax_scale;  // threshold: NaN chooses in every step
};

// x [D] turned to row `at` of the rotations, float32.
template <typename T>
void turned(const TokenStep& s, const T* x, int at, float* y) {
    turn_wide(x, s.cos + at * s.pairs, s.sin + at * s.pairs, s.pairs, s.span, y);
    for (int d = 2 * s.pairs; d < s.size; ++d) y[d] = widen(x[d]);
}

template <typename T>
void store_key(const TokenStep& s, int b, int h, float* work) {
    turned(s, static_cast<const T*>(s.k) + b * s.k_batch + h * s.k_head + (s.keys - 1) * s.k_row, 0, work);
    int64_t at = (static_cast<int64_t>(b) * s.heads + h) * s.size;
    for (int d = 0; d < s.size; ++d) {
        // As a key stored in its own type would be.
        T bare;
        store(work[d], &bare);
        work[d] = (widen(bare) - s.mean[at + d]) / s.spread[at + d];
    }
    s.steps[b * s.s_batch + h * s.s_head + s.keys - 1] =
        code(work, s.size, KEY_TOP, s.codes + b * s.c_batch + h * s.c_head + (s.keys - 1) * s.size);
}

// Whether the queries of one sequence, [n] numbers, are less alike than the choice's threshold allows.
bool unlike(const float* asked, const float* held, int64_t n, float threshold) {
    double both = 0, own = 0, other = 0;
    for (int64_t i = 0; i < n; ++i) {
        both += static_cast<double>(asked[i]) * held[i];
        own += static_cast<double>(asked[i]) * asked[i];
        other += static_cast<double>(held[i]) * held[i];
    }
    double cosine = both / std::max(1e-8, std::sqrt(own)) / std::max(1e-8, std::sqrt(other));
    return std::max(-1.0, std::min(1.0, cosine)) < threshold;
}

void choose_anew(const TokenStep& s, int b, const float* asked) {
    int all = s.heads * s.group;
    std::vector<float> scaled(static_cast<size_t>(all) * s.size);
    for (int r = 0; r < all; ++r)
        for (int d = 0; d < s.size; ++d)
            scaled[r * s.size + d] = asked[r * s.size + d] *
                                     s.spread[(static_cast<int64_t>(b) * s.heads + r / s.group) * s.size + d];
    Coded coded(scaled.data(), all, s.size);
    std::vector<int64_t> start(s.heads), step_start(s.heads);
    for (int h = 0; h < s.heads; ++h) {
        start[h] = b * s.c_batch + h * s.c_head + s.first * s.size;
        step_start[h] = b * s.s_batch + h * s.s_head + s.first;
    }
    ByteRows given{coded.codes.data(),  coded.steps.data(), s.codes,
                   start.data(),        s.steps,            step_start.data(),
                   s.size,              s.keys - s.first - s.last, s.group, s.size};
    choose(given, 1, s.heads, s.scale, s.threads, s.first, s.count, s.index + b * (s.first + s.count));
}

// The new keys, the queries at their rank, and a choice where one is due.
template <typename T>
void prepare(const TokenStep& s) {
    int all = s.heads * s.group;
    int64_t n = static_cast<int64_t>(all) * s.size;
    std::vector<float> work(s.size), asked(n);
    for (int b = 0; b < s.batch; ++b) {
        for (int h = 0; h < s.heads; ++h) store_key<T>(s, b, h, work.data());
        const T* q = static_cast<const T*>(s.q) + b * n;
        T* reading = static_cast<T*>(s.reading) + b * n;
        std::copy(q, q + n, reading + s.batch * n);
        for (int r = 0; r < all; ++r) {
            turned(s, q + r * s.size, 1, asked.data() + r * s.size);
            turned(s, q + r * s.size, 2, work.data());
            for (int d = 0; d < s.size; ++d) store(work[d], reading + r * s.size + d);
        }
        float* held = s.held + b * n;
        bool due = ++s.served[b] == 0 || std::isnan(s.threshold) || unlike(asked.data(), held, n, s.threshold);
        if (!due) continue;
        choose_anew(s, b, asked.data());
        std::copy(asked.begin(), asked.end(), held);
        s.served[b] = 0;
        s.copied[b] = false;
    }
}

// The choice, from its copies or where it lies, and the last tokens as one softmax.
template <typename T>
void read(const TokenStep& s, bool from_copies) {
    int segments = s.batch * s.heads;
    int64_t chosen = s.first + s.count;
    std::vector<const void*> k(2 * segments), v(2 * segments);
    std::vector<const int64_t*> list(2 * segments);
    std::vector<int64_t> length(2 * segments, chosen);
    for (int b = 0; b < s.batch; ++b)
        for (int h = 0; h < s.heads; ++h) {
            int at = b * s.heads + h, near = segments + at;
            const T* keys = static_cast<const T*>(s.k) + b * s.k_batch + h * s.k_head;
            const T* values = static_cast<const T*>(s.v) + b * s.v_batch + h * s.v_head;
            k[at] = from_copies ? static_cast<const T*>(s.keys_copied) + at * chosen * s.size : keys;
            v[at] = from_copies ? static_cast<const T*>(s.values_copied) + at * chosen * s.v_size : values;
            list[at] = from_copies ? nullptr : s.index + b * chosen;
            k[near] = keys + (s.keys - s.last) * s.k_row;
            v[near] = values + (s.keys - s.last) * s.v_row;
            length[near] = s.last;
        }
    int64_t n = static_cast<int64_t>(segments) * s.group;
    std::vector<float> out(n * s.v_size), lse(n);
    foveate_decode(s.kind, s.reading, s.softmax_scale, k.data(), v.data(), s.k_row, s.v_row, list.data(), length.data(),
                   s.keys, s.back_cos, s.back_sin, from_copies ? 0 : s.pairs, s.span, 1, segments, 2, s.group, s.size,
                   s.v_size, s.threads, out.data(), lse.data());
    for (int64_t i = 0; i < n * s.v_size; ++i) store(out[i], static_cast<T*>(s.out) + i);
}

// 0: done. 1: the choice has served so long that its rows are to be copied and read by the caller.
template <typename T>
int run(const TokenStep& s) {
    prepare<T>(s);
    bool copied = true, settled = true;
    for (int b = 0; b < s.batch; ++b) {
        copied &= s.copied[b];
        settled &= s.copied[b] || s.served[b] >= s.lend;
    }
    bool fits = s.keys_copied && s.k_row == s.size && s.v_row == s.v_size;
    if (settled && !(copied && fits)) return 1;
    read<T>(s, settled);
    return 0;
}

}  // namespace

extern "C" {

int foveate_token_step(const TokenStep* step) { return step->kind == 0 ? run<float>(*step) : run<bf16>(*step); }
}
