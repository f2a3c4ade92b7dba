// What a launch is told. Mirrored field by field in launcher.py; a test compares the offsets.
#pragma once

#include "device.cuh"

namespace vf {

// A tensor map (CUtensorMap): one of the pools as rows of D elements, read in boxes of a page of one
// head and 64 elements, written in the 128-byte swizzle. Made by the driver; zeroes if not needed.
struct alignas(64) TileMap { u64 opaque[16]; };

struct Params {
  TileMap key_map, value_map;
  // New tokens: row (b, s) of `query` starts at b * query_batch + s * query_row elements and holds
  // heads x D; likewise key and value with kv_heads x D. They may be slices of one packed tensor.
  const void* query;
  const void* key;
  const void* value;
  void* key_pool;         // [pages, kv_heads, page_size, D]
  void* value_pool;       // [pages, kv_heads, page_size, D]
  const float* cos;       // [positions, D / 2], or null: query and key are rotated already
  const float* sin;
  const int* past_lengths;  // [batch]
  const int* query_lengths; // [batch]; 0 is an inactive row. Null: all have max_query
  const int* block_table;   // [batch, max_pages]
  void* out;              // [batch, max_query, heads, D] by its strides
  void* rotated;          // workspace of prefill: the rotated query, dense [batch, max_query, heads, D]
  float* partial_out;     // workspace [batch, heads, splits, D], unused if splits is 1
  float* partial_lse;     // workspace [batch, heads, splits]: log2 of the sums of exp2
  int* arrivals;          // workspace [counters]: of each tile of decode, splits that are done; of
                          // Hopper's prefill, how many blocks of queries are taken
  i64 query_batch, query_row;
  i64 key_batch, key_row;
  i64 value_batch, value_row;
  i64 out_batch, out_row;
  int batch, max_query;
  int heads, kv_heads;
  int max_pages, page_shift;  // page_size = 1 << page_shift
  int splits;
  int heads_together;         // of prefill, see PrefillBlock
  int counters;               // of arrivals
  float scale_log2;           // score scale x log2(e) x key_scale: softmax works in base 2
  float key_inverse_scale;    // fp8 pools store key * key_inverse_scale
  float value_inverse_scale;
  float value_scale;          // and attention multiplies what it read by value_scale
};

VF_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

VF_DEVICE int query_length(const Params& p, int b) {
  return p.query_lengths == nullptr ? p.max_query : p.query_lengths[b];
}

// How decode cuts one sequence. The host fixes `splits` from the longest sequence it may meet (so a
// captured graph stays valid); a shorter sequence uses fewer, which every block works out alike.
struct Splits {
  static constexpr int kMinKeys = 64;
  int keys;   // per split, a multiple of 64
  int count;  // splits that have keys

  VF_DEVICE Splits(int total, int splits) {
    const int even = ceil_div(ceil_div(total, splits), 64) * 64;
    keys = even < kMinKeys ? kMinKeys : even;
    count = ceil_div(total, keys);
  }
};

// Which queries number `index` of a row of the batch is. Blocks late in a sequence have the most keys and go first, so
// that the grid's tail is short; but only `heads_together` heads at a time, whose keys and values the
// L2 cache can hold.
struct PrefillBlock {
  int head, queries;  // index among the head's blocks of `rows` queries

  VF_DEVICE PrefillBlock(const Params& p, int rows, int index) {
    const int blocks = ceil_div(p.max_query, rows);
    const int first = index / (blocks * p.heads_together) * p.heads_together;
    const int left = p.heads - first;
    const int heads = left < p.heads_together ? left : p.heads_together;
    index -= first * blocks;
    head = first + index % heads;
    queries = blocks - 1 - index / heads;
  }
};

}  // namespace vf
