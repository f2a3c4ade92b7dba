// Decode: one new token per sequence against all its keys. Bound by reading the pool once.
//
// Grid: (splits, kv_heads x query tiles, batch). The query heads that share a key head are the rows
// of one tensor-core tile (16; more heads than that take further tiles), so the pool is read once
// for all of them. Each warp walks its own strips through its own ring of shared-memory stages with
// no block-wide barrier; warps, then splits, are merged by their maxima and sums at the end. If FUSED,
// the block that finishes a row's tile last adds up the splits; else a kernel does, later.
//
// Launched to overlap, it attends to past tokens while the kernel in front, the write, still runs: it
// rotates its queries itself. Who comes to the newest token waits for the write, and all do before they
// write what a call before this one may still read (partial results).
#pragma once

#include "bulk_strip.cuh"
#include "combine.cuh"
#include "flash.cuh"
#include "rotary.cuh"

namespace vf {

template <class S, int WARPS, int STAGES, bool FUSED>
struct Decode {
  using Act = typename S::Act;
  using Kv = typename S::Kv;
  static constexpr int kThreads = 32 * WARPS;
  using Combine = CombineTile<Act, S::D, kThreads>;
  static constexpr int kStageBytes = 2 * S::kBytes;  // a strip of keys, then its values
  static constexpr int kMergePitch = S::kSteps * 16 + 8;  // rows start in different banks
  static constexpr int kMergeBytes = WARPS * 16 * (kMergePitch + 2) * 4;
  static constexpr int kRingBytes = WARPS * STAGES * kStageBytes;
  static constexpr int kQueries = kRingBytes > kMergeBytes ? kRingBytes : kMergeBytes;  // where
  static constexpr int kQueryPitch = S::D + 20;  // rows start in different banks
  static constexpr int kBarriers = kQueries + 16 * kQueryPitch * 2;
  static constexpr int kSharedBytes = kBarriers + (S::kBulk ? WARPS * STAGES * 8 : 0);

  static_assert(kSharedBytes >= 16 + Combine::kBytes, "the ring is free when splits are added up");

  const Params& p;
  const int warp, lane, b, kv_head, first_head, rows;  // of this block's tile: query heads

  VF_DEVICE Decode(const Params& params, int tiles)
      : p(params), warp(thread_index() / 32), lane(thread_index() % 32), b(block_z()),
        kv_head(block_y() / tiles),
        first_head(kv_head * (p.heads / p.kv_heads) + block_y() % tiles * 16),
        rows(min_of(16, (kv_head + 1) * (p.heads / p.kv_heads) - first_head)) {}

  VF_DEVICE static int min_of(int a, int b) { return a < b ? a : b; }

  VF_DEVICE static void run(const Params& p) {
    start_next_kernel();
    const int b = block_z();
    if (thread_index() * 32 < p.max_pages) {  // the table comes while the lengths do
      prefetch_l2(p.block_table + static_cast<i64>(b) * p.max_pages + thread_index() * 32);
    }
    const int total = p.past_lengths[b] + 1;  // both lengths are on their way at the same time
    const Splits splits(total, p.splits);
    if (query_length(p, b) <= 0 || block_x() >= splits.count) return wait_for_previous_kernel();
    Decode block(p, ceil_div(p.heads / p.kv_heads, 16));
    Flash<S, 1, 1> flash;
    block.attend(flash, block_x() * splits.keys, min_of((block_x() + 1) * splits.keys, total), total);
    wait_for_previous_kernel();
    block.merge(flash, splits.count == 1);
    if (FUSED && splits.count > 1) block.combine(splits.count);
  }

  VF_DEVICE void attend(Flash<S, 1, 1>& flash, int begin, int end, int total) {
    char* ring = shared_memory() + warp * STAGES * kStageBytes;
    const int* pages = p.block_table + static_cast<i64>(b) * p.max_pages;
    const int strips = ceil_div(end - begin, kStripKeys);
    const int mine = strips > warp ? ceil_div(strips - warp, WARPS) : 0;
    begin += warp * kStripKeys;
    constexpr int kStride = WARPS * kStripKeys;

    u64* filled = reinterpret_cast<u64*>(shared_memory() + kBarriers) + warp * STAGES;
    if constexpr (S::kBulk) {
      if (elect_one()) {
        for (int i = 0; i < STAGES; ++i) barrier_init(&filled[i], 1);
        publish_barriers();
      }
      sync_warp();
    }
    // The page of the strip to be copied next is read one strip ahead: a copy waits for no table. The
    // first is on its way while queries are rotated.
    int page = mine > 0 ? pages[begin >> p.page_shift] : 0;
    if (p.cos != nullptr) rotate_queries(total - 1);
    const auto copy = [&](int i) {
      if (i < mine) {
        const int key = begin + i * kStride;
        if (key + kStripKeys >= total) wait_for_previous_kernel();
        char* stage = ring + i % STAGES * kStageBytes;
        const auto* keys = S::find(p.key_pool, p, page, kv_head, key);
        const auto* values = S::find(p.value_pool, p, page, kv_head, key);
        if constexpr (!S::kBulk) {
          S::load(stage, keys, total - key, lane);
          S::load(stage + S::kBytes, values, total - key, lane);
        } else if (elect_one()) {
          u64* barrier = &filled[i % STAGES];
          barrier_expect(barrier, kStageBytes);
          copy_bulk<true>(stage, keys, S::kBytes, barrier);
          copy_bulk<true>(stage + S::kBytes, values, S::kBytes, barrier);
        }
        if (i + 1 < mine) page = pages[(key + kStride) >> p.page_shift];
      }
      if constexpr (!S::kBulk) copy_commit();  // an empty group keeps the count of groups in step
    };
    if constexpr (!S::kBulk) {
      for (int i = 0; i < 2 * STAGES; ++i) S::clear_padding(ring + i * S::kBytes, lane);
    }
    // Copies that wait for nobody go first, then the queries.
    const int old = min_of(STAGES - 1, mine - (begin + (mine - 1) * kStride + kStripKeys >= total));
#pragma unroll 1
    for (int i = 0; i < old; ++i) copy(i);
    load_queries(flash);
#pragma unroll 1
    for (int i = old; i < STAGES - 1; ++i) copy(i);

    for (int i = 0; i < mine; ++i) {
      if constexpr (S::kBulk) {
        barrier_wait(&filled[i % STAGES], i / STAGES & 1);
      } else {
        copy_wait<STAGES - 2>();
      }
      sync_warp();  // strip i is there for all lanes, and all are done with strip i - 1
      copy(i + STAGES - 1);
      char* stage = ring + i % STAGES * kStageBytes;
      typename Flash<S, 1, 1>::Scores scores;
      flash.score(scores, stage, lane);
      const int key = begin + i * kStride;
      if (key + kStripKeys > total) {
        flash.mask(scores, 0, 0, key, total - 1, lane);
        flash.mask(scores, 0, 1, key, total - 1, lane);
        if constexpr (S::kBulk) {
          S::clear_rows(stage + S::kBytes, total - key, lane);
          sync_warp();
        }
      }
      flash.soften(scores, p.scale_log2);
      flash.accumulate(scores, stage + S::kBytes, lane);
    }
    flash.finish();
  }

  // The block's first, as they come.
  VF_DEVICE const Act* queries() const {
    return static_cast<const Act*>(p.query) + b * p.query_batch + first_head * S::D;
  }
  // And rotated.
  VF_DEVICE Act* rotated() const { return reinterpret_cast<Act*>(shared_memory() + kQueries); }

  VF_DEVICE void rotate_queries(int position) const {
    constexpr int kItems = S::D / 8;
    for (int i = thread_index(); i < rows * kItems; i += kThreads) {
      const int row = i / kItems, d = i % kItems * 4;
      HeadPair<Act, S::D> pair(queries() + row * S::D, d);
      pair.rotate(p, position, d);
      pair.store(rotated() + row * kQueryPitch, d, 1.f);
    }
  }

  VF_DEVICE void load_queries(Flash<S, 1, 1>& flash) const {
    const bool rotate = p.cos != nullptr;
    if (rotate) sync_threads();
    const Act* query = rotate ? rotated() : queries();
    const int pitch = rotate ? kQueryPitch : S::D;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = lane / 4 + 8 * h;
      flash.load_query(0, h, row < rows ? query + row * pitch : nullptr, lane);
    }
  }

  // Puts every warp's rows into shared memory (over the ring, no longer needed), then adds them up.
  VF_DEVICE void merge(const Flash<S, 1, 1>& flash, bool final) const {
    float* outs = reinterpret_cast<float*>(shared_memory());  // [WARPS][16][kMergePitch]
    float* maxima = outs + WARPS * 16 * kMergePitch;          // [WARPS][16], then the sums
    float* sums = maxima + WARPS * 16;
    copy_wait<0>();
    sync_threads();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = lane / 4 + 8 * h;
      if (row >= rows) continue;
      const int at = warp * 16 + row;
      maxima[at] = flash.maximum[0][h];
      sums[at] = flash.sum[0][h];
#pragma unroll
      for (int d = 0; d < S::kSteps; ++d) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          f32x2 pair;
          S::output_pair(flash.out[0][d], i, h, pair.x, pair.y);
          float* to = outs + at * kMergePitch + S::pair_slot(d, i, lane % 4);
          *reinterpret_cast<f32x2*>(to) = pair;
        }
      }
    }
    sync_threads();
    for (int i = thread_index(); i < rows * (S::D / 2); i += kThreads) {
      merge_pair(outs, maxima, sums, i / (S::D / 2), i % (S::D / 2) * 2, final);
    }
  }

  VF_DEVICE void combine(int count) const {
    // A word of the merge's that is free once all are through with it.
    int* last = reinterpret_cast<int*>(shared_memory());
    sync_threads();
    if (thread_index() == 0) {  // on behalf of the block: barriers order what its other threads did
      int* arrivals = p.arrivals + b * grid_y() + block_y();
      *last = arrive_device(arrivals) == count - 1;
      if (*last) *arrivals = 0;
    }
    sync_threads();
    if (!*last) return;
    float* shared = reinterpret_cast<float*>(shared_memory() + 16);
    Combine::run(p, b, first_head, rows, count, shared);
  }

  VF_DEVICE void merge_pair(const float* outs, const float* maxima, const float* sums, int row,
                            int d, bool final) const {
    float top = minus_infinity();
#pragma unroll
    for (int w = 0; w < WARPS; ++w) top = max_of(top, maxima[w * 16 + row]);
    float sum = 0.f, x = 0.f, y = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {  // a warp without strips has maximum -inf: weight 0
      const float weight = exp2_approx((maxima[w * 16 + row] - top) * p.scale_log2);
      const float* from = outs + (w * 16 + row) * kMergePitch + S::slot(d);
      const f32x2 pair = *reinterpret_cast<const f32x2*>(from);
      sum += weight * sums[w * 16 + row];
      x += weight * pair.x;
      y += weight * pair.y;
    }
    const float factor = p.value_scale / sum;
    const int head = first_head + row;
    if (final) {
      Act* to = static_cast<Act*>(p.out) + b * p.out_batch + static_cast<i64>(head) * S::D + d;
      *reinterpret_cast<u32*>(to) = pack2<Act>(x * factor, y * factor);
      return;
    }
    const i64 slot = (static_cast<i64>(b) * p.heads + head) * p.splits + block_x();
    *reinterpret_cast<f32x2*>(p.partial_out + slot * S::D + d) = f32x2{x * factor, y * factor};
    if (d == 0) p.partial_lse[slot] = top * p.scale_log2 + log2_approx(sum);
  }
};

}  // namespace vf
