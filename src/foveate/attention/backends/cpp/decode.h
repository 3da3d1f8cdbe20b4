// Attention of a few query rows per KV head, for other files' use.
#pragma once
#include <cstdint>

extern "C" {

// Segment h of heads * parts: queries q[h] [rows, D] of the keys' kind, whose products are multiplied by scale; its keys
// from k[h], values from v[h], rows k_row and v_row elements apart; length[h] entries of list[h], key slots (absent: < 0
// or >= limit), or the first length[h] slots where list[h] is null. Keys of a list are turned as `turn` says by cos, sin
// [rows, pairs] before use, entry j by row j, or where `compact`, its slot being s, by row s - j; pairs 0: as they are.
// Segments h, h + heads, ... are attended to as if they were one.
// out [heads, rows, Dv], lse [heads, rows] float32. kind: 0 float32, 1 bfloat16. D and Dv multiples of 16.
void foveate_decode(int kind, const void* q, float scale, const void* const* k, const void* const* v, int64_t k_row,
                    int64_t v_row, const int64_t* const* list, const int64_t* length, int64_t limit, const float* cos,
                    const float* sin, int pairs, int span, int compact, int heads, int parts, int rows, int D, int Dv,
                    int threads, float* out, float* lse);
}
