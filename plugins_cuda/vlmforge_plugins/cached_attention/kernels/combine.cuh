// Adds up the splits of decode. Grid: (heads / 4, 1, batch); one warp per head.
#pragma once

#include "params.h"

namespace vf {

constexpr int kCombineThreads = 128;

template <class Act, int D>
VF_DEVICE void combine_splits(const Params& p) {
  const int b = block_z(), lane = thread_index() % 32;
  const int head = block_x() * (kCombineThreads / 32) + thread_index() / 32;
  if (head >= p.heads || query_length(p, b) <= 0) return;
  const int count = Splits(p.past_lengths[b] + 1, p.splits).count;
  if (count == 1) return;  // decode has written the output itself

  const i64 slot = (static_cast<i64>(b) * p.heads + head) * p.splits;
  const float* lse = p.partial_lse + slot;
  float top = minus_infinity();
  for (int i = lane; i < count; i += 32) top = max_of(top, lse[i]);
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) top = max_of(top, shuffle_xor(top, mask));

  constexpr int kPairs = (D / 2 + 31) / 32;
  float x[kPairs] = {}, y[kPairs] = {}, sum = 0.f;
  for (int i = 0; i < count; ++i) {
    const float weight = exp2_approx(lse[i] - top);
    sum += weight;
#pragma unroll
    for (int j = 0; j < kPairs; ++j) {
      const int d = 2 * (lane + 32 * j);
      if (d >= D) break;
      const float* pair = p.partial_out + (slot + i) * D + d;
      x[j] += weight * pair[0];
      y[j] += weight * pair[1];
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

}  // namespace vf
