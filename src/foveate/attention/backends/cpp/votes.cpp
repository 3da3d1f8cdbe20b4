// What the heads of a layer vote for on CPU.
#include "bytes.h"
#include "votes.h"

extern "C" {

// Softmax weights of q [batch * heads, rows, D] over keys k of one kind (0 float32, 1 bfloat16), head h's keys from
// k + start[h], k_row elements apart. weights [batch * heads, rows, keys] for working, out [batch, groups, keys], both
// float32; greatest: 0 sums over a group's query heads, 1 takes the greatest weight. scale > 0.
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

// The slots that the query heads of each sequence choose, as `choose` in votes.h says: out [batch, first + count] int64. k:
// the keys of the slots from `first` on that may be chosen, count <= keys.
void foveate_choose(int kind, const void* q, const void* k, const int64_t* start, int64_t k_row, int64_t keys, int batch,
                    int heads, int rows, int D, float scale, int threads, int64_t first, int64_t count, int64_t* out) {
    if (kind == 0)
        choose(Rows<float>{static_cast<const float*>(q), static_cast<const float*>(k), start, k_row, keys, rows, D}, batch,
               heads, scale, threads, first, count, out);
    else
        choose(Rows<bf16>{static_cast<const bf16*>(q), static_cast<const bf16*>(k), start, k_row, keys, rows, D}, batch,
               heads, scale, threads, first, count, out);
}

// The same for keys coded in 8 bits, the steps of head h from step + step_start[h], and queries q float32.
void foveate_choose_bytes(const float* q, const int8_t* k, const int64_t* start, const float* step,
                          const int64_t* step_start, int64_t k_row, int64_t keys, int batch, int heads, int rows, int D,
                          float scale, int threads, int64_t first, int64_t count, int64_t* out) {
    Coded coded(q, static_cast<int64_t>(batch) * heads * rows, D);
    choose(ByteRows{coded.codes.data(), coded.steps.data(), k, start, step, step_start, k_row, keys, rows, D}, batch,
           heads, scale, threads, first, count, out);
}
}
