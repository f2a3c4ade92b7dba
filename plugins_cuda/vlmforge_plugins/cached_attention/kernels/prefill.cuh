// Prefill of a chunk: the new tokens of each sequence against its past and each other, causally.
//
// Grid: (query blocks x heads, 1, batch); a block takes WARPS x TILES x 16 consecutive queries of one
// head and walks the keys in tiles of STRIPS x 16, two stages deep: while a tile is multiplied the
// next is copied. One barrier per tile does for both "the tile is there" and "the other is free".
#pragma once

#include "flash.cuh"

namespace vf {

template <class S, int WARPS, int TILES, int STRIPS>
struct Prefill {
  using Act = typename S::Act;
  using Rows = Flash<S, TILES, STRIPS>;
  static constexpr int kThreads = 32 * WARPS;
  static constexpr int kRows = 16 * TILES * WARPS;
  static constexpr int kKeys = STRIPS * kStripKeys;
  static constexpr int kHalf = STRIPS * S::kBytes;  // bytes of a tile's keys, or of its values
  static constexpr int kSharedBytes = 4 * kHalf;
  static_assert(STRIPS % WARPS == 0, "each warp copies whole strips");

  const Params& p;
  const int warp, lane, b, past, length, head, first_row;

  VF_DEVICE Prefill(const Params& params, const PrefillBlock& block)
      : p(params), warp(thread_index() / 32), lane(thread_index() % 32), b(block_z()),
        past(p.past_lengths[b]), length(query_length(p, b)), head(block.head),
        first_row(block.queries * kRows) {}

  VF_DEVICE static void run(const Params& p) {
    Prefill block(p, PrefillBlock(p, kRows, block_x()));
    if (block.first_row >= block.length) return;
    Rows rows;
    block.load_queries(rows);
    block.attend(rows);
    block.store(rows);
  }

  VF_DEVICE int row(int m, int half) const {
    return first_row + (warp * TILES + m) * 16 + half * 8 + lane / 4;
  }

  VF_DEVICE void load_queries(Rows& rows) const {
    const bool rotated = p.cos != nullptr;
    const i64 stride = rotated ? static_cast<i64>(p.heads) * S::D : p.query_row;
    const Act* query = rotated
        ? static_cast<const Act*>(p.rotated) + static_cast<i64>(b) * p.max_query * stride
        : static_cast<const Act*>(p.query) + b * p.query_batch;
    query += static_cast<i64>(head) * S::D;
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int s = row(m, h);
        rows.load_query(m, h, s < length ? query + s * stride : nullptr, lane);
      }
    }
  }

  // Copies this warp's strips of a tile into a stage.
  VF_DEVICE void copy(int tile, char* stage) const {
    const int kv_head = head / (p.heads / p.kv_heads);
    const int* pages = p.block_table + static_cast<i64>(b) * p.max_pages;
    const int total = past + length;
#pragma unroll
    for (int n = warp; n < STRIPS; n += WARPS) {
      const int key = tile * kKeys + n * kStripKeys;
      const int page = key < total ? pages[key >> p.page_shift] : 0;  // else: zeroes, from page 0
      char* to = stage + n * S::kBytes;
      S::load(to, S::find(p.key_pool, p, page, kv_head, key), total - key, lane);
      S::load(to + kHalf, S::find(p.value_pool, p, page, kv_head, key), total - key, lane);
    }
    copy_commit();
  }

  VF_DEVICE void attend(Rows& rows) const {
    char* shared = shared_memory();
    const int end = first_row + kRows < length ? first_row + kRows : length;  // of its queries
    const int tiles = ceil_div(past + end, kKeys);
    // Queries of this warp: the first sees keys up to `low`, the last up to `high`.
    const int low = past + first_row + warp * TILES * 16, high = low + TILES * 16 - 1;
    const bool idle = low >= past + length;

    for (int n = warp; n < 4 * STRIPS; n += WARPS) S::clear_padding(shared + n * S::kBytes, lane);
    copy(0, shared);
    for (int i = 0; i < tiles; ++i) {
      copy_wait<0>();
      sync_threads();
      if (i + 1 < tiles) copy(i + 1, shared + (i + 1) % 2 * 2 * kHalf);
      if (idle || i * kKeys > high) continue;
      const char* stage = shared + i % 2 * 2 * kHalf;
      typename Rows::Scores scores;
      rows.score(scores, stage, lane);
      if ((i + 1) * kKeys - 1 > low) {
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
#pragma unroll
          for (int h = 0; h < 2; ++h) rows.mask(scores, m, h, i * kKeys, past + row(m, h), lane);
        }
      }
      rows.soften(scores, p.scale_log2);
      rows.accumulate(scores, stage + kHalf, lane);
    }
    rows.finish();
  }

  VF_DEVICE void store(const Rows& rows) const {
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int s = row(m, h);
        if (s >= length) continue;
        Act* to = static_cast<Act*>(p.out) + b * p.out_batch + s * p.out_row +
                  static_cast<i64>(head) * S::D;
        const float factor = p.value_scale / rows.sum[m][h];
#pragma unroll
        for (int d = 0; d < S::kSteps; ++d) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int dim = S::pair_dim(d, i, lane % 4);
            if (S::D % 16 != 0 && dim >= S::D) continue;
            float x, y;
            S::output_pair(rows.out[m][d], i, h, x, y);
            *reinterpret_cast<u32*>(to + dim) = pack2<Act>(x * factor, y * factor);
          }
        }
      }
    }
  }
};

}  // namespace vf
