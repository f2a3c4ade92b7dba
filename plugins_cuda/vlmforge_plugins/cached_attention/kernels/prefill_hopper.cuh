// Prefill for sm_90a: the function of prefill.cuh with warpgroup products.
//
// Grid as there; a block has two consumer warpgroups of 64 queries each and one producer warpgroup.
// Keys and values arrive in turn, K0 V0 K1 V1 ..., in tiles of 128 through a ring of four buffers with
// a "full" and an "empty" barrier each. The producer gathers pages with asynchronous copies, so any
// page size will do, and writes the swizzle that the products read. A consumer keeps its queries and
// probabilities in registers; while the tensor cores multiply the probabilities of one tile with its
// values, it takes the softmax of the next (as FlashAttention-3, https://arxiv.org/abs/2407.08608).
#pragma once

#include "flash.cuh"
#include "hopper.cuh"

namespace vf {

template <class S>
struct HopperPrefill {
  using Act = typename S::Act;
  static constexpr int D = S::D;
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kKeys = 128;
  static constexpr int kStrips = kKeys / kStripKeys;
  static constexpr int kBuffers = 4;
  static constexpr int kPanelBytes = kKeys * 128;  // all keys of a tile, 64 dimensions of them
  static constexpr int kTileBytes = D / 64 * kPanelBytes;
  static constexpr int kSharedBytes = kBuffers * kTileBytes + kBuffers * 2 * 8;
  static_assert(!S::kFp8 && D % 64 == 0, "whole panels of 16-bit elements");
  using Rows = Flash<S, 1, kStrips>;

  const Params& p;
  const int group, lane, b, head, past, length, first_row;
  u64* const full;
  u64* const empty;

  VF_DEVICE explicit HopperPrefill(const Params& params)
      : p(params), group(uniform(thread_index() / 128)), lane(thread_index() % 32), b(block_z()),
        head(block_y()), past(p.past_lengths[b]), length(query_length(p, b)),
        first_row((grid_x() - 1 - block_x()) * kRows),
        full(reinterpret_cast<u64*>(shared_memory() + kBuffers * kTileBytes)),
        empty(full + kBuffers) {}

  VF_DEVICE static void run(const Params& p) {
    HopperPrefill block(p);
    if (block.first_row >= block.length) return;
    if (thread_index() == 0) {
      for (int i = 0; i < kBuffers; ++i) {
        barrier_init(&block.full[i], 128);
        barrier_init(&block.empty[i], kConsumers * 128);
      }
    }
    sync_threads();
    if (block.group == kConsumers) {
      give_registers<24>();
      block.produce();
    } else {
      take_registers<240>();
      block.consume();
    }
  }

  // Tiles of keys that the queries before `row` of this chunk can see.
  VF_DEVICE int tiles_before(int row) const {
    return ceil_div(past + (row < length ? row : length), kKeys);
  }

  VF_DEVICE void produce() const {
    const int units = 2 * tiles_before(first_row + kRows);
    const int kv_head = head / (p.heads / p.kv_heads);
    for (int unit = 0; unit < units; ++unit) {
      const int buffer = unit % kBuffers;
      barrier_wait(&empty[buffer], (unit / kBuffers & 1) ^ 1);
      copy(unit % 2 == 0 ? p.key_pool : p.value_pool, kv_head, unit / 2 * kKeys,
           shared_memory() + buffer * kTileBytes);
      copy_commit();
      if (unit > 0) announce<1>(unit - 1);
    }
    announce<0>(units - 1);
  }

  // Once all but PENDING copies are there: products may read the unit.
  template <int PENDING>
  VF_DEVICE void announce(int unit) const {
    copy_wait<PENDING>();
    publish_shared();
    barrier_arrive(&full[unit % kBuffers]);
  }

  VF_DEVICE void copy(const void* pool, int kv_head, int first, char* to) const {
    constexpr int kUnits = D / 8;            // 16-byte units of a row
    constexpr int kStep = 128 / kUnits;      // rows that the warpgroup copies at once
    const int* pages = p.block_table + static_cast<i64>(b) * p.max_pages;
    const int total = past + length;
    const int unit = thread_index() % kUnits, row = thread_index() % 128 / kUnits;
    char* const column = to + unit / 8 * kPanelBytes;
#pragma unroll 4
    for (int i = 0; i < kKeys / kStep; ++i) {
      const int r = row + i * kStep, key = first + r;
      const bool there = key < total;
      const int page = there ? pages[key >> p.page_shift] : 0;  // else: zeroes
      const typename S::Kv* from = S::find(pool, p, page, kv_head, there ? key : 0) + unit * 8;
      copy_async<16>(column + r * 128 + ((unit ^ r) & 7) * 16, from, there);
    }
  }

  VF_DEVICE int row(int half) const {
    return first_row + thread_index() / 32 * 16 + half * 8 + lane / 4;
  }

  VF_DEVICE void load_queries(Rows& rows) const {
    const bool rotated = p.cos != nullptr;
    const i64 stride = rotated ? static_cast<i64>(p.heads) * D : p.query_row;
    const Act* query = rotated
        ? static_cast<const Act*>(p.rotated) + static_cast<i64>(b) * p.max_query * stride
        : static_cast<const Act*>(p.query) + b * p.query_batch;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int s = row(h);
      rows.load_query(0, h, s < length ? query + s * stride + static_cast<i64>(head) * D : nullptr,
                      lane);
    }
  }

  using Scores = float[kKeys / 8][4];
  using Output = float[D / 8][4];
  using Weights = u32[kStrips][4];

  VF_DEVICE void issue_scores(Scores& s, const Rows& rows, int buffer) const {
    const u32 keys = shared_address(shared_memory()) + buffer * kTileBytes;
#pragma unroll
    for (int d = 0; d < S::kSteps; ++d) {
      const u64 b = operand(keys + d / 4 * kPanelBytes + d % 4 * 32, 0);
      product<Act, kKeys, 0>(s, rows.query[0][d], b, d > 0);
    }
    products_commit();
  }

  VF_DEVICE void issue_output(Output& out, const Weights& weights, int buffer) const {
    const u32 values = shared_address(shared_memory()) + buffer * kTileBytes;
#pragma unroll
    for (int n = 0; n < kStrips; ++n) {
      product<Act, D, 1>(out, weights[n], operand(values + n * 2048, kPanelBytes), 1);
    }
    products_commit();
  }

  VF_DEVICE void consume() const {
    Rows rows;
    load_queries(rows);
    Output out;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i / 4][i % 4] = 0.f;
    const int mine = first_row + group * 64 < length ? tiles_before(first_row + group * 64 + 64) : 0;
    if (mine > 0) attend(rows, out, mine);
    // The producer fills for both groups: acknowledge what only the other one reads.
    for (int unit = 2 * mine; unit < 2 * tiles_before(first_row + kRows); ++unit) {
      wait_full(unit);
      barrier_arrive(&empty[unit % kBuffers]);
    }
    if (mine > 0) store(rows, out);
  }

  VF_DEVICE void wait_full(int unit) const {
    barrier_wait(&full[unit % kBuffers], unit / kBuffers & 1);
  }

  VF_DEVICE void attend(Rows& rows, Output& out, int tiles) const {
    typename Rows::Scores scores;
    Scores& s = scores[0];
    Weights weights;
    float shrink[2];
    wait_full(0);
    products_begin();
    issue_scores(s, rows, 0);
    products_wait<0>();
    products_done(s);
    barrier_arrive(&empty[0]);
    soften(rows, scores, shrink, 0);
    pack(weights, s);
#pragma unroll 1
    for (int i = 1; i < tiles; ++i) {
      const int keys = 2 * i, values = 2 * i - 1;  // the tile's scores, its predecessor's output
      wait_full(values);
      wait_full(keys);
      products_begin();
      issue_scores(s, rows, keys % kBuffers);
      issue_output(out, weights, values % kBuffers);
      products_wait<1>();
      products_done(s);
      barrier_arrive(&empty[keys % kBuffers]);
      soften(rows, scores, shrink, i);
      products_wait<0>();
      products_done(out);
      barrier_arrive(&empty[values % kBuffers]);
#pragma unroll
      for (int c = 0; c < D / 2; ++c) out[c / 4][c % 4] *= shrink[c % 4 / 2];
      pack(weights, s);
    }
    const int last = 2 * tiles - 1;
    wait_full(last);
    products_begin();
    issue_output(out, weights, last % kBuffers);
    products_wait<0>();
    products_done(out);
    barrier_arrive(&empty[last % kBuffers]);
    rows.finish();
  }

  VF_DEVICE void soften(Rows& rows, typename Rows::Scores& scores, float (&shrink)[2], int tile) const {
    if ((tile + 1) * kKeys - 1 > past + first_row + thread_index() / 32 * 16) {
#pragma unroll
      for (int h = 0; h < 2; ++h) rows.mask(scores, 0, h, tile * kKeys, past + row(h), lane);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) shrink[h] = rows.soften_row(scores, 0, h, p.scale_log2);
  }

  VF_DEVICE static void pack(Weights& weights, const Scores& s) {
#pragma unroll
    for (int n = 0; n < kStrips; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&tile)[4] = s[2 * n + i / 2];
        weights[n][i] = pack2<Act>(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
      }
    }
  }

  VF_DEVICE void store(const Rows& rows, const Output& out) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int s = row(h);
      if (s >= length) continue;
      Act* to = static_cast<Act*>(p.out) + b * p.out_batch + s * p.out_row +
                static_cast<i64>(head) * D + 2 * (lane % 4);
      const float factor = p.value_scale / rows.sum[0][h];
#pragma unroll
      for (int n = 0; n < D / 8; ++n) {
        *reinterpret_cast<u32*>(to + 8 * n) =
            pack2<Act>(out[n][2 * h] * factor, out[n][2 * h + 1] * factor);
      }
    }
  }
};

}  // namespace vf
