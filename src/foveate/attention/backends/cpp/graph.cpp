// Graphs over keys on CPU: the walk that searches one, and the exact nearest keys from which one is made.
//
// One task of the walk is one query head: it scores keys along links, a round of links at a time, fetching ahead.
// One task of the exact search is some queries against all keys; the products of 32 queries with 8 keys stay in
// registers, and a product is looked at again only when it beats the worst that its query holds.
#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "dots.h"

namespace {

constexpr size_t AHEAD = 12;  // keys fetched ahead of use

inline void fetch(const void* row, int64_t bytes) {
    for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(row) + byte, 0, 2);
}

struct Candidate {
    float score;
    int32_t id;
    uint32_t order;  // scored as which one
    bool open;       // not expanded yet
};

inline bool before(const Candidate& a, const Candidate& b) {
    return a.score > b.score || (a.score == b.score && a.order < b.order);
}

// Best-first search of one query over n keys, holding the `beam` best in order.
template <typename T>
class Walk {
  public:
    Walk(const T* q, const T* keys, int64_t k_row, int64_t n, int D, size_t beam)
        : q(q), keys(keys), k_row(k_row), n(n), D(D), beam(beam), seen((n + 63) / 64) {}

    void offer(int64_t id) {
        if (id < 0 || id >= n) return;  // absent
        uint64_t bit = uint64_t{1} << (id & 63);
        if (seen[id >> 6] & bit) return;
        seen[id >> 6] |= bit;
        fresh.push_back(static_cast<int32_t>(id));
    }

    // Score what was offered, and keep the best.
    void score() {
        size_t sorted = held.size();
        float worst = sorted == beam ? held.back().score : NOTHING;
        size_t fetched = 0;
        for (size_t i = 0; i < fresh.size(); ++i) {
            for (; fetched < std::min(i + AHEAD, fresh.size()); ++fetched)
                fetch(keys + fresh[fetched] * k_row, D * sizeof(T));
            float product;
            dots<1>(q, keys + fresh[i] * k_row, D, &product, 1);
            if (product > worst) held.push_back({product, fresh[i], static_cast<uint32_t>(scanned), true});
            ++scanned;
        }
        fresh.clear();
        if (held.size() > sorted) settle(sorted);
    }

    // Offer what the best `count` open keys link to; false when none is open. Keys from `linked` on have no links.
    bool expand(int count, const int32_t* links, int degree, int64_t linked) {
        nodes.clear();
        for (size_t i = 0; i < held.size() && static_cast<int>(nodes.size()) < count; ++i)
            if (held[i].open) {
                held[i].open = false;
                nodes.push_back(held[i].id);
                if (held[i].id < linked) fetch(links + int64_t{held[i].id} * degree, degree * sizeof(int32_t));
            }
        for (int32_t node : nodes)
            for (int j = 0; node < linked && j < degree; ++j) offer(links[int64_t{node} * degree + j]);
        return !nodes.empty();
    }

    void best(int64_t count, int64_t* index) const {
        for (int64_t j = 0; j < count; ++j) index[j] = j < static_cast<int64_t>(held.size()) ? held[j].id : -1;
    }

    int64_t scanned = 0;

  private:
    // The first `sorted` of what is held are in order: merge the rest in.
    void settle(size_t sorted) {
        auto middle = held.begin() + sorted;
        if (held.size() - sorted > beam) {
            std::nth_element(middle, middle + beam, held.end(), before);
            held.resize(sorted + beam);
        }
        std::sort(middle, held.end(), before);
        merged.resize(held.size());
        std::merge(held.begin(), middle, middle, held.end(), merged.begin(), before);
        merged.resize(std::min(merged.size(), beam));
        held.swap(merged);
    }

    const T *q, *keys;
    int64_t k_row, n;
    int D;
    size_t beam;
    std::vector<uint64_t> seen;
    std::vector<int32_t> fresh, nodes;
    std::vector<Candidate> held, merged;
};

struct Graphs {
    const int32_t* links;    // [B, heads, capacity, degree]
    const int64_t* entries;  // [B, heads, most]
    const int64_t *linked, *length;
    int64_t capacity, most;
    int degree, heads;
};

template <typename T>
void walks(const T* q, const T* keys, const int64_t* stride, const Graphs& of, int B, int Hq, int Hkv, int D,
           int64_t beam, int round, int64_t count, int threads, int64_t* index, int64_t* scanned) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(std::min(threads, B* Hq)) collapse(2)
    for (int b = 0; b < B; ++b)
        for (int h = 0; h < Hq; ++h) {
            int64_t row = int64_t{b} * Hq + h, graph = int64_t{b} * of.heads + h / (Hq / of.heads);
            const T* own = keys + b * stride[0] + h / (Hq / Hkv) * stride[1];
            const int32_t* links = of.links + graph * of.capacity * of.degree;
            Walk<T> walk(q + row * D, own, stride[2], of.length[b], D, beam);
            for (int64_t e = 0; e < of.most; ++e) walk.offer(of.entries[graph * of.most + e]);
            for (int64_t j = of.linked[b]; j < of.length[b]; ++j) walk.offer(j);
            do walk.score();
            while (walk.expand(round, links, of.degree, of.linked[b]));
            walk.best(count, index + row * count);
            scanned[row] = walk.scanned;
        }
}

// --- exact search

using lanes = float __attribute__((vector_size(64)));
constexpr int LANES = 16, GROUP = 2 * LANES;  // queries that are multiplied at once
constexpr int KEYS = 8;                       // keys that are multiplied at once
constexpr int TILE = 64;                      // keys that stay in the first cache while a task's queries pass
constexpr int64_t TASK = 8 * GROUP;           // most queries of a task

// Bit i: x[i] is above least[i], or no number.
inline uint32_t above(const lanes& x, const float* least) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x, _mm512_loadu_ps(least), _CMP_NLE_UQ);
#else
    uint32_t bits = 0;
    for (int i = 0; i < LANES; ++i) bits |= static_cast<uint32_t>(!(x[i] <= least[i])) << i;
    return bits;
#endif
}

struct Scored {
    float score;
    int32_t id;
};

inline bool better(const Scored& a, const Scored& b) {
    return a.score > b.score || (a.score == b.score && a.id < b.id);
}

// 32 queries, transposed, and the best keys that each has met.
class Group {
  public:
    Group(const float* q, int64_t queries, int D, size_t count) : D(D), count(count), pack(2 * D), held(queries) {
        std::fill(least, least + GROUP, std::numeric_limits<float>::infinity());
        std::fill(least, least + queries, NOTHING);
        for (auto& each : held) each.reserve(2 * count);
        for (int64_t i = 0; i < queries; ++i)
            for (int d = 0; d < D; ++d) pack[2 * d + i / LANES][i % LANES] = q[i * D + d];
    }

    // Keys [first, first + K), their products raised by bias.
    template <int K>
    void meet(const float* keys, const float* bias, int64_t first) {
        lanes sum[K][2];
        const float* key = keys + first * D;
        for (int j = 0; j < K; ++j) sum[j][0] = sum[j][1] = lanes{} + (bias ? bias[first + j] : 0.0f);
        for (int d = 0; d < D; ++d)
            for (int j = 0; j < K; ++j) {
                sum[j][0] += pack[2 * d] * key[j * D + d];
                sum[j][1] += pack[2 * d + 1] * key[j * D + d];
            }
        for (int j = 0; j < K; ++j)
            for (int half = 0; half < 2; ++half)
                for (uint32_t bits = above(sum[j][half], least + half * LANES); bits; bits &= bits - 1) {
                    int i = __builtin_ctz(bits);
                    take(half * LANES + i, sum[j][half][i], first + j);
                }
    }

    void finish(int64_t* out) {
        for (auto& each : held) {
            std::sort(each.begin(), each.end(), better);
            for (size_t j = 0; j < count; ++j) *out++ = each[j].id;
        }
    }

  private:
    void take(int i, float score, int64_t id) {
        // What is no number ranks last, so that a query never has fewer than it asks for.
        score = score > std::numeric_limits<float>::lowest() ? score : std::numeric_limits<float>::lowest();
        if (!(score > least[i])) return;
        auto& mine = held[i];
        mine.push_back({score, static_cast<int32_t>(id)});
        if (mine.size() < 2 * count) return;
        std::nth_element(mine.begin(), mine.begin() + (count - 1), mine.end(), better);
        mine.resize(count);
        least[i] = mine.back().score;
    }

    int D;
    size_t count;
    float least[GROUP];  // what a key must beat
    std::vector<lanes> pack;
    std::vector<std::vector<Scored>> held;
};

void nearest(const float* q, const float* keys, const float* bias, int64_t m, int64_t n, int D, int64_t count,
             int threads, int64_t* out) {
    int64_t share = (m + threads - 1) / threads;
    int64_t size = std::clamp<int64_t>((share + GROUP - 1) / GROUP * GROUP, GROUP, TASK);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t start = 0; start < m; start += size) {
        std::vector<Group> groups;
        for (int64_t at = start; at < std::min(m, start + size); at += GROUP)
            groups.emplace_back(q + at * D, std::min<int64_t>(GROUP, m - at), D, count);
        for (int64_t tile = 0; tile < n; tile += TILE)
            for (Group& each : groups) {
                int64_t j = tile, end = std::min(n, tile + TILE);
                for (; j + KEYS <= end; j += KEYS) each.meet<KEYS>(keys, bias, j);
                for (; j < end; ++j) each.meet<1>(keys, bias, j);
            }
        for (size_t g = 0; g < groups.size(); ++g) groups[g].finish(out + (start + g * GROUP) * count);
    }
}

}  // namespace

extern "C" {

// q [B, Hq, D] and keys of one kind (0 float32, 1 bfloat16), D a multiple of 16; keys [B, Hkv, n, D] with the given
// strides of the first three axes. links [B, heads, capacity, degree] and entries [B, heads, most], absent: < 0;
// linked, length [B]. Hkv and heads divide Hq. index [B, Hq, count], -1 beyond what was found; scanned [B, Hq].
void foveate_walks(int kind, const void* q, const void* keys, const int64_t* stride, const int32_t* links,
                   const int64_t* entries, const int64_t* linked, const int64_t* length, int64_t capacity, int64_t most,
                   int degree, int heads, int B, int Hq, int Hkv, int D, int64_t beam, int round, int64_t count,
                   int threads, int64_t* index, int64_t* scanned) {
    Graphs of{links, entries, linked, length, capacity, most, degree, heads};
    if (kind == 0)
        walks(static_cast<const float*>(q), static_cast<const float*>(keys), stride, of, B, Hq, Hkv, D, beam, round,
              count, threads, index, scanned);
    else
        walks(static_cast<const bf16*>(q), static_cast<const bf16*>(keys), stride, of, B, Hq, Hkv, D, beam, round,
              count, threads, index, scanned);
}

// q [m, D], keys [n, D], bias [n] or null; out [m, count], best first, of equals the lower; 1 <= count <= n.
void foveate_nearest(const float* q, const float* keys, const float* bias, int64_t m, int64_t n, int D, int64_t count,
                     int threads, int64_t* out) {
    nearest(q, keys, bias, m, n, D, count, threads, out);
}
}
