// What stands behind a sum in a decoder, by the same launch: the residual is added, and the RMS norm of
// that is made (https://arxiv.org/abs/1910.07467). A block has a row, of `share` groups.
//
// Every result is rounded as by kernels one after the other: the sum, what it is with the residual, and
// the norm of that. So it does not matter for a token which way a sum went.
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

// A thread's part of a row: every kThreads-th group of it.
struct Row {
  const Params& p;
  u32 start;  // of the row, in groups
  u32 own;    // the first group of this thread

  VF_DEVICE explicit Row(const Params& params)
      : p(params), start(p.first + block_x() * p.share), own(start + thread_index()) {}

  VF_DEVICE u32 group(u32 i) const { return own + i * kThreads; }
  VF_DEVICE bool has(u32 i) const { return group(i) < start + p.share; }

  // Groups of a tensor that has rows from `from` on.
  VF_DEVICE void load(const void* tensor, u32 from, u32x2 (&to)[kRowGroups]) const {
#pragma unroll
    for (u32 i = 0; i < kRowGroups; ++i) {
      if (!has(i)) break;
      to[i] = static_cast<const u32x2*>(tensor)[group(i) - from];
    }
  }

  // Weights have run through the L2 cache since they were used last.
  VF_DEVICE void prefetch(const void* tensor, u32 from) const {
    if (thread_index() % 4 != 0) return;  // a sector for each
#pragma unroll
    for (u32 i = 0; i < kRowGroups; ++i) {
      if (has(i)) prefetch_l2(static_cast<const u32x2*>(tensor) + group(i) - from);
    }
  }
};

// The residual that is added, and what the norm is multiplied by: no other rank gives them.
template <class T>
struct Residual {
  static constexpr int kCount = 8 / sizeof(T);
  const Params& p;
  const Row& row;
  u32x2 added[kRowGroups], scale[kRowGroups];

  VF_DEVICE explicit Residual(const Row& of) : p(of.p), row(of) {
    row.load(p.added, 0, added);
    row.load(p.scale, row.start, scale);
  }

  // Of what was summed.
  VF_DEVICE void norm(const u32x2 (&sum)[kRowGroups]) const {
    float total[kRowGroups][kCount], squares = 0;
#pragma unroll
    for (u32 i = 0; i < kRowGroups; ++i) {
      if (!row.has(i)) break;
      float more[kCount];
      widen_group<T>(sum[i], total[i]);
      widen_group<T>(added[i], more);
#pragma unroll
      for (int k = 0; k < kCount; ++k) total[i][k] += more[k];
      const u32x2 rounded = narrow_group<T>(total[i]);
      static_cast<u32x2*>(p.out)[row.group(i)] = rounded;
      widen_group<T>(rounded, total[i]);
#pragma unroll
      for (int k = 0; k < kCount; ++k) squares += total[i][k] * total[i][k];
    }
    const float mean = sum_of_block(squares) / static_cast<float>(p.width);
    const float factor = inverse_root(mean + p.epsilon);
#pragma unroll
    for (u32 i = 0; i < kRowGroups; ++i) {
      if (!row.has(i)) break;
      float by[kCount];
      widen_group<T>(scale[i], by);
#pragma unroll
      for (int k = 0; k < kCount; ++k) by[k] *= total[i][k] * factor;
      static_cast<u32x2*>(p.normed)[row.group(i)] = narrow_group<T>(by);
    }
  }
};

// What all give of a row. Looks are at as many groups at once as registers allow: one takes as long.
template <class T, int RANKS>
struct Shares {
  static constexpr int kCount = 8 / sizeof(T), kOthers = RANKS - 1;
  static constexpr u32 kAtOnce = RANKS == 2 ? kRowGroups : RANKS == 4 ? 2 : 1;
  const Params& p;
  const Row& row;
  u32x2 own[kRowGroups], given[kRowGroups][kOthers];

  VF_DEVICE explicit Shares(const Row& of) : p(of.p), row(of) { row.load(p.given, 0, own); }

  VF_DEVICE bool is(int other) const { return RANKS == 2 || other < p.size - 1; }
  VF_DEVICE int rank(int other) const { return other < p.rank ? other : other + 1; }

  VF_DEVICE void give(const Lanes& lanes) const {
    const u64 number = u64{lanes.count} << 32;
#pragma unroll
    for (int other = 0; other < kOthers; ++other) {
      if (!is(other)) break;
      u32x4* to = p.lanes[rank(other)] + lanes.place(p.rank, row.own);
#pragma unroll
      for (u32 i = 0; i < kRowGroups; ++i) {
        if (row.has(i)) store_system_pair(to + i * kThreads, number | own[i].x, number | own[i].y);
      }
    }
  }

  // Anything where a rank gives nothing.
  VF_DEVICE void take(Lanes& lanes) {
#pragma unroll
    for (u32 i = 0; i < kRowGroups; i += kAtOnce) {
      if (!row.has(i)) break;
      for (u32 looks = 1; lanes.go_on(is_here(lanes, i), looks); ++looks) continue;
    }
  }

  VF_DEVICE bool is_here(const Lanes& lanes, u32 from) {
    u64 low[kAtOnce][kOthers], high[kAtOnce][kOthers];
#pragma unroll
    for (int other = 0; other < kOthers; ++other) {
      const u32x4* at = p.lanes[p.rank] + lanes.place(rank(other), row.group(from));
#pragma unroll
      for (u32 i = 0; i < kAtOnce; ++i) {
        if (is(other) && row.has(from + i)) {
          load_system_pair(at + i * kThreads, low[i][other], high[i][other]);
        }
      }
    }
    bool here = true;
#pragma unroll
    for (u32 i = 0; i < kAtOnce; ++i) {
#pragma unroll
      for (int other = 0; other < kOthers; ++other) {
        if (is(other) && row.has(from + i)) {
          const u64 low_word = low[i][other], high_word = high[i][other];
          given[from + i][other] = {static_cast<u32>(low_word), static_cast<u32>(high_word)};
          here = here && static_cast<u32>(low_word >> 32) == lanes.count &&
                 static_cast<u32>(high_word >> 32) == lanes.count;
        }
      }
    }
    return here;
  }

  // In fp32 and in the order of the ranks.
  VF_DEVICE u32x2 sum(u32 i) const {
    float total[kCount] = {};
#pragma unroll
    for (int rank = 0; rank < RANKS; ++rank) {
      if (rank >= p.size) break;
      float part[kCount];
      const u32x2 before = given[i][rank < kOthers ? rank : 0], behind = given[i][rank ? rank - 1 : 0];
      widen_group<T>(rank == p.rank ? own[i] : rank < p.rank ? before : behind, part);
#pragma unroll
      for (int k = 0; k < kCount; ++k) total[k] = rank == 0 ? part[k] : total[k] + part[k];
    }
    return narrow_group<T>(total);
  }
};

// What is given goes first of all, and everything else is loaded while it is on its way.
template <class T, int RANKS>
VF_DEVICE void sum_norm_of(const Params& p) {
  const Row row(p);
  row.prefetch(p.scale, row.start);
  row.prefetch(p.added, 0);
  wait_for_previous_kernel();
  Shares<T, RANKS> shares(row);
  Lanes lanes(p);
  shares.give(lanes);
  const Residual<T> residual(row);
  shares.take(lanes);
  u32x2 sum[kRowGroups];
#pragma unroll
  for (u32 i = 0; i < kRowGroups; ++i) {
    if (row.has(i)) sum[i] = shares.sum(i);
  }
  residual.norm(sum);
  lanes.done();
}

template <class T>
VF_DEVICE void sum_norm(const Params& p) {
  if (p.size == 2) {
    sum_norm_of<T, 2>(p);
  } else if (p.size <= 4) {
    sum_norm_of<T, 4>(p);
  } else {
    sum_norm_of<T, kMostRanks>(p);
  }
}

template <class T>
VF_DEVICE void norm(const Params& p) {
  const Row row(p);
  u32x2 sum[kRowGroups];
  row.load(p.given, 0, sum);
  const Residual<T> residual(row);
  residual.norm(sum);
}

}  // namespace vf
