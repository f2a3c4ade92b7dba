// Rotates the new queries and keys and writes the new keys and values into their pages.
#pragma once

#include "params.h"

namespace vf {

constexpr int kWriteThreads = 256;

// A thread's item: four dimensions d..d+3 of the first half of a head and their partners in the
// second half (rotate-half), so D need only be a multiple of 8.
template <class Act, int D>
struct HeadPair {
  float x[4], y[4];

  VF_DEVICE HeadPair(const Act* head, int d) {
    const u32x2 first = *reinterpret_cast<const u32x2*>(head + d);
    const u32x2 second = *reinterpret_cast<const u32x2*>(head + D / 2 + d);
    unpack2<Act>(first.x, x[0], x[1]);
    unpack2<Act>(first.y, x[2], x[3]);
    unpack2<Act>(second.x, y[0], y[1]);
    unpack2<Act>(second.y, y[2], y[3]);
  }

  VF_DEVICE void rotate(const Params& p, int position, int d) {
    const f32x4 c = *reinterpret_cast<const f32x4*>(p.cos + static_cast<i64>(position) * (D / 2) + d);
    const f32x4 s = *reinterpret_cast<const f32x4*>(p.sin + static_cast<i64>(position) * (D / 2) + d);
    const float cosine[4] = {c.x, c.y, c.z, c.w};
    const float sine[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float turned = x[i] * cosine[i] - y[i] * sine[i];
      y[i] = y[i] * cosine[i] + x[i] * sine[i];
      x[i] = turned;
    }
  }

  template <class T>
  VF_DEVICE void store(T* head, int d, float inverse_scale) const {
    put(head + d, x, inverse_scale);
    put(head + D / 2 + d, y, inverse_scale);
  }

 private:
  template <class T>
  VF_DEVICE static void put(T* to, const float (&v)[4], float f) {
    if constexpr (is_same<T, e4m3>::value) {
      *reinterpret_cast<u32*>(to) = pack4_e4m3(v[0] * f, v[1] * f, v[2] * f, v[3] * f);
    } else {
      *reinterpret_cast<u32x2*>(to) = u32x2{pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3])};
    }
  }
};

// Grid: (items of a token / kWriteThreads, max_query, batch). The items of a token are those of its
// keys, its values and, if they are to be rotated, its queries.
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
  if (head >= 2 * p.kv_heads + (rotary ? p.heads : 0)) return;
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
