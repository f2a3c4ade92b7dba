// What stands behind a sum in a decoder, by the same launch: the residual is added, and the RMS norm of
// that is made (https://arxiv.org/abs/1910.07467). A block has a row, of `share` groups.
#pragma once

#include "lanes.cuh"

namespace vf {

constexpr u32 kRowGroups = kRegion / kThreads;  // that a thread has of a row, at most

// The sum over a block, the same bits in all its threads.
VF_DEVICE float sum_of_block(float value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  float* parts = reinterpret_cast<float*>(shared_memory());
  if (thread_index() % 32 == 0) parts[thread_index() / 32] = value;
  sync_threads();
  float total = 0;
#pragma unroll
  for (u32 warp = 0; warp < kWarps; ++warp) total += parts[warp];
  return total;
}

// A thread's part of a row.
template <class T>
struct Row {
  static constexpr int kCount = 8 / sizeof(T);
  const Params& p;
  u32 first, last;  // groups of the row
  u32x2 added[kRowGroups], scale[kRowGroups];
  float total[kRowGroups][kCount];
  float squares = 0;

  // Loads what no other rank gives, so that it is here when they do.
  VF_DEVICE explicit Row(const Params& params) : p(params) {
    first = p.first + block_x() * p.share;
    last = first + p.share;
#pragma unroll
    for (u32 i = 0; i < kRowGroups; ++i) {
      if (!has(i)) break;
      added[i] = static_cast<const u32x2*>(p.added)[group(i)];
      scale[i] = static_cast<const u32x2*>(p.scale)[group(i) - first];
    }
  }

  VF_DEVICE u32 group(u32 i) const { return first + thread_index() + i * kThreads; }
  VF_DEVICE bool has(u32 i) const { return group(i) < last; }

  // Takes a sum; what it is with the residual is rounded first of all.
  VF_DEVICE void take(u32 i, const float (&sum)[kCount]) {
    float more[kCount];
    widen_group<T>(added[i], more);
#pragma unroll
    for (int k = 0; k < kCount; ++k) more[k] += sum[k];
    const u32x2 rounded = narrow_group<T>(more);
    static_cast<u32x2*>(p.out)[group(i)] = rounded;
    widen_group<T>(rounded, total[i]);
#pragma unroll
    for (int k = 0; k < kCount; ++k) squares += total[i][k] * total[i][k];
  }

  VF_DEVICE void finish() {
    const float factor = inverse_root(sum_of_block(squares) / static_cast<float>(p.width) + p.epsilon);
#pragma unroll
    for (u32 i = 0; i < kRowGroups; ++i) {
      if (!has(i)) break;
      float by[kCount];
      widen_group<T>(scale[i], by);
#pragma unroll
      for (int k = 0; k < kCount; ++k) by[k] *= total[i][k] * factor;
      static_cast<u32x2*>(p.normed)[group(i)] = narrow_group<T>(by);
    }
  }
};

template <class T>
VF_DEVICE void sum_norm(const Params& p) {
  constexpr int kCount = Row<T>::kCount;
  Lanes lanes(p);
  u32x2 own[kRowGroups];
#pragma unroll
  for (u32 i = 0; i < kRowGroups; ++i) {
    const u32 group = lanes.begin() + i * kThreads;
    if (group >= lanes.end()) break;
    own[i] = static_cast<const u32x2*>(p.given)[group];
    lanes.give(group, own[i]);
  }
  Row<T> row(p);
#pragma unroll
  for (u32 i = 0; i < kRowGroups; ++i) {
    if (!row.has(i)) break;
    u32x2 given[kMostRanks];
    lanes.take(row.group(i), given);
    float total[kCount] = {};
#pragma unroll
    for (int rank = 0; rank < kMostRanks; ++rank) {
      if (rank >= p.size) break;
      float part[kCount];
      widen_group<T>(rank == p.rank ? own[i] : given[rank], part);
#pragma unroll
      for (int k = 0; k < kCount; ++k) total[k] = rank == 0 ? part[k] : total[k] + part[k];
    }
    row.take(i, total);
  }
  row.finish();
  lanes.done();
}

template <class T>
VF_DEVICE void norm(const Params& p) {
  Row<T> row(p);
#pragma unroll
  for (u32 i = 0; i < kRowGroups; ++i) {
    if (!row.has(i)) break;
    float sum[Row<T>::kCount];
    widen_group<T>(static_cast<const u32x2*>(p.given)[row.group(i)], sum);
    row.take(i, sum);
  }
  row.finish();
}

}  // namespace vf
