// Rotates the new queries and keys and writes the new keys and values into their pages.
#pragma once

#include "rotary.cuh"

namespace vf {

constexpr int kWriteThreads = 256;

// Grid: (items of a token / kWriteThreads, max_query, batch). The items of a token are those of its
// keys, its values and, if they are to be rotated, its queries: but decode rotates its own.
template <class Act, class Kv, int D>
VF_DEVICE void write_token(const Params& p) {
  wait_for_previous_kernel();  // first, so that what decode reads before its own wait is all there
  start_next_kernel();
  constexpr int kItems = D / 8;  // per head
  const int b = block_z(), s = block_y();
  if (block_x() == 0 && s == 0) {  // a share of them
    const int each = ceil_div(p.counters, p.batch);
    for (int i = thread_index(); i < each && b * each + i < p.counters; i += kWriteThreads) {
      p.arrivals[b * each + i] = 0;
    }
  }
  if (s >= query_length(p, b)) return;
  int item = block_x() * kWriteThreads + thread_index();
  int head = item / kItems;
  const int d = item % kItems * 4;
  const bool rotary = p.cos != nullptr;
  if (head >= 2 * p.kv_heads + (rotary && p.max_query > 1 ? p.heads : 0)) return;
  const int position = p.past_lengths[b] + s;

  if (head >= 2 * p.kv_heads) {
    head -= 2 * p.kv_heads;
    const Act* from = static_cast<const Act*>(p.query) + b * p.query_batch + s * p.query_row;
    HeadPair<Act, D> pair(from + head * D, d);
    pair.rotate(p, position, d);
    const i64 row = (static_cast<i64>(b) * p.max_query + s) * p.heads + head;
    pair.store(static_cast<Act*>(p.rotated) + row * D, d, 1.f);
    return;
  }
  const bool is_key = head < p.kv_heads;
  if (!is_key) head -= p.kv_heads;
  const Act* from = is_key
      ? static_cast<const Act*>(p.key) + b * p.key_batch + s * p.key_row
      : static_cast<const Act*>(p.value) + b * p.value_batch + s * p.value_row;
  HeadPair<Act, D> pair(from + head * D, d);
  if (is_key && rotary) pair.rotate(p, position, d);
  const int page = p.block_table[static_cast<i64>(b) * p.max_pages + (position >> p.page_shift)];
  const i64 row = ((static_cast<i64>(page) * p.kv_heads + head) << p.page_shift) +
                  (position & ((1 << p.page_shift) - 1));
  Kv* pool = static_cast<Kv*>(is_key ? p.key_pool : p.value_pool);
  pair.store(pool + row * D, d, is_key ? p.key_inverse_scale : p.value_inverse_scale);
}

}  // namespace vf
