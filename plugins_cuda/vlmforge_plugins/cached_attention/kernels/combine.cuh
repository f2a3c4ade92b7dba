// Adds up the splits of decode: by the block that finishes last, or by a kernel of its own.
#pragma once

#include "params.h"

namespace vf {

constexpr int kCombineThreads = 128;
constexpr int kMaxSplits = 64;  // MAX_SPLITS of plan.py

// Shares of the splits in the outputs of up to 16 heads. Their sums are all asked for before the first
// is used: one trip to the L2 cache.
template <int THREADS>
VF_DEVICE void weigh_splits(const float* lse, int splits, int rows, int count, float* weights) {
  constexpr int kLanes = THREADS / 16;  // threads a head
  constexpr int kEach = kMaxSplits / kLanes;
  const int row = thread_index() / kLanes, lane = thread_index() % kLanes;
  float mine[kEach], top = minus_infinity(), sum = 0.f;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int split = lane + i * kLanes;
    mine[i] = minus_infinity();
    if (row < rows && split < count) mine[i] = load_l2(lse + row * splits + split);
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) top = max_of(top, mine[i]);
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) top = max_of(top, shuffle_xor(top, mask));
#pragma unroll
  for (int i = 0; i < kEach; ++i) sum += mine[i] = row < rows ? exp2_approx(mine[i] - top) : 0.f;
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
#pragma unroll
  for (int i = 0; i < kEach; ++i) weights[row * kMaxSplits + lane + i * kLanes] = mine[i] / sum;
}

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

// Up to 16 neighbouring heads of one row, by a whole block. A warp takes a head at a time; if there
// are fewer heads than warps, several take parts of its splits.
template <class Act, int D, int THREADS>
struct CombineTile {
  static constexpr int kWarps = THREADS / 32;
  static constexpr int kBytes = (16 * kMaxSplits + kWarps * D) * 4;  // of shared memory

  static constexpr int kBatch = 8;  // splits on their way at the same time

  VF_DEVICE static void run(const Params& p, int b, int first_head, int rows, int count,
                            float* shared) {
    const int warp = thread_index() / 32, lane = thread_index() % 32;
    const i64 first = (static_cast<i64>(b) * p.heads + first_head) * p.splits;
    const int parts = rows < kWarps ? kWarps / rows : 1, jobs = rows * parts;
    float* sums = shared + 16 * kMaxSplits;  // [kWarps][D]
    f32x4 x[kBatch];
    const auto ask = [&](int job, int split) {  // before the weights are known: one trip, not two
      const float* from = p.partial_out + (first + job / parts * p.splits) * D + 4 * lane;
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int at = split + i * parts;
        x[i] = f32x4{0.f, 0.f, 0.f, 0.f};
        if (at < count && 4 * lane < D) x[i] = load_l2_quad(from + static_cast<i64>(at) * D);
      }
    };
    if (warp < jobs) ask(warp, warp % parts);
    weigh_splits<THREADS>(p.partial_lse + first, p.splits, rows, count, shared);
    sync_threads();
    for (int job = warp; job < jobs; job += kWarps) {
      const float* weights = shared + job / parts * kMaxSplits;
      f32x4 sum{0.f, 0.f, 0.f, 0.f};
      for (int split = job % parts; split < count; split += kBatch * parts) {
        if (job > warp || split > job % parts) ask(job, split);
        add(sum, x, weights, split, parts, count);
      }
      if (parts == 1) store(p, b, first_head + job, lane, sum);
      else if (4 * lane < D) *reinterpret_cast<f32x4*>(sums + warp * D + 4 * lane) = sum;
    }
    if (parts == 1) return;
    sync_threads();
    if (warp >= rows || 4 * lane >= D) return;
    f32x4 sum = *reinterpret_cast<const f32x4*>(sums + warp * parts * D + 4 * lane);
    for (int part = 1; part < parts; ++part) {
      const float* more = sums + (warp * parts + part) * D + 4 * lane;
      sum = {sum.x + more[0], sum.y + more[1], sum.z + more[2], sum.w + more[3]};
    }
    store(p, b, first_head + warp, lane, sum);
  }

  VF_DEVICE static void add(f32x4& sum, const f32x4 (&x)[kBatch], const float* weights, int first,
                            int parts, int count) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int split = first + i * parts;
      const float weight = split < count ? weights[split] : 0.f;
      sum.x += weight * x[i].x;
      sum.y += weight * x[i].y;
      sum.z += weight * x[i].z;
      sum.w += weight * x[i].w;
    }
  }

  VF_DEVICE static void store(const Params& p, int b, int head, int lane, const f32x4& sum) {
    if (4 * lane >= D) return;
    Act* to = static_cast<Act*>(p.out) + b * p.out_batch + static_cast<i64>(head) * D + 4 * lane;
    const u32x2 packed{pack2<Act>(sum.x, sum.y), pack2<Act>(sum.z, sum.w)};
    *reinterpret_cast<u32x2*>(to) = packed;
  }
};

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
