// Adds up the splits of decode: by the block that finishes last, or by a kernel of its own.
#pragma once

#include "params.h"

namespace vf {

constexpr int kCombineThreads = 128;

// One head of one row, by one warp. Its `count` partial results may just have been written by other
// multiprocessors: they are read from the L2 cache.
template <class Act, int D>
VF_DEVICE void combine_head(const Params& p, int b, int head, int count, int lane) {
  const i64 slot = (static_cast<i64>(b) * p.heads + head) * p.splits;
  const float* lse = p.partial_lse + slot;
  float top = minus_infinity();
  for (int i = lane; i < count; i += 32) top = max_of(top, load_l2(lse + i));
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) top = max_of(top, shuffle_xor(top, mask));

  constexpr int kPairs = (D / 2 + 31) / 32;
  float x[kPairs] = {}, y[kPairs] = {}, sum = 0.f;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    const float weight = exp2_approx(load_l2(lse + i) - top);
    sum += weight;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int d = 2 * (lane + 32 * j);
      if (d >= D) break;
      const f32x2 pair = load_l2_pair(p.partial_out + (slot + i) * D + d);
      x[j] += weight * pair.x;
      y[j] += weight * pair.y;
    }
  }
  Act* out = static_cast<Act*>(p.out) + b * p.out_batch + static_cast<i64>(head) * D;
#pragma unroll
  for (int j = 0; j < kPairs; ++j) {
    const int d = 2 * (lane + 32 * j);
    if (d >= D) break;
    *reinterpret_cast<u32*>(out + d) = pack2<Act>(x[j] / sum, y[j] / sum);
  }
}

// The kernel. Grid: (heads / 4, 1, batch); one warp per head.
template <class Act, int D>
VF_DEVICE void combine_splits(const Params& p) {
  const int b = block_z(), lane = thread_index() % 32;
  const int head = block_x() * (kCombineThreads / 32) + thread_index() / 32;
  if (head >= p.heads || query_length(p, b) <= 0) return;
  const int count = Splits(p.past_lengths[b] + 1, p.splits).count;
  if (count > 1) combine_head<Act, D>(p, b, head, count, lane);  // else decode wrote the output
}

}  // namespace vf
