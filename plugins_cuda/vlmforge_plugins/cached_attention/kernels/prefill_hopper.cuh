// Prefill for sm_90a: the function of prefill.cuh with warpgroup products.
//
// Grid as there; a block has two consumer warpgroups of 64 queries each and one producer warpgroup.
// Keys and values arrive in turn, K0 V0 K1 V1 ..., in tiles of 128 through a ring of BUFFERS with a
// "full" and an "empty" barrier each. The producer gathers pages with asynchronous copies, so any
// page size will do, and writes the swizzle that the products read. A consumer keeps its queries and
// probabilities in registers; while the tensor cores multiply the probabilities of one tile with its
// values, it takes the softmax of the next; and the consumers take turns, so that one's softmax meets
// the other's products (both as FlashAttention-3, https://arxiv.org/abs/2407.08608).
#pragma once

#include "flash.cuh"
#include "hopper.cuh"

namespace vf {

template <class S, int BUFFERS, bool TURNS>
struct HopperPrefill {
  using Act = typename S::Act;
  static constexpr int D = S::D;
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kKeys = 128;
  static constexpr int kStrips = kKeys / kStripKeys;
  static constexpr int kBuffers = BUFFERS;
  static constexpr int kPanelBytes = kKeys * 128;  // all keys of a tile, 64 dimensions of them
  static constexpr int kTileBytes = (D + 63) / 64 * kPanelBytes;
  static constexpr int kSharedBytes = kBuffers * kTileBytes + (2 * kBuffers + kConsumers) * 8;
  static_assert(!S::kFp8, "products of 16-bit elements");
  using Rows = Flash<S, 1, kStrips>;

  const Params& p;
  const int group, lane, b, past, length, head, first_row;
  u64* const full;
  u64* const empty;
  u64* const turn;

  VF_DEVICE HopperPrefill(const Params& params, const PrefillBlock& block)
      : p(params), group(uniform(thread_index() / 128)), lane(thread_index() % 32), b(block_z()),
        past(p.past_lengths[b]), length(query_length(p, b)), head(block.head),
        first_row(block.queries * kRows),
        full(reinterpret_cast<u64*>(shared_memory() + kBuffers * kTileBytes)),
        empty(full + kBuffers), turn(empty + kBuffers) {}

  VF_DEVICE static void run(const Params& p) {
    HopperPrefill block(p, PrefillBlock(p, kRows));
    if (block.first_row >= block.length) return;
    if (thread_index() == 0) {
      for (int i = 0; i < kBuffers; ++i) {
        barrier_init(&block.full[i], 128);
        barrier_init(&block.empty[i], kConsumers * 4);
      }
      for (int i = 0; i < kConsumers; ++i) barrier_init(&block.turn[i], 4);
    }
    clear_padding();
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
    const int tiles = tiles_before(first_row + kRows);
    const int kv_head = head / (p.heads / p.kv_heads);
    int pending = 0;  // of the newest units, still to be announced
    for (int tile = 0; tile < tiles; ++tile) {
      const int place = find(kv_head, tile * kKeys);
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        const int unit = 2 * tile + half, buffer = unit % kBuffers;
        const int parity = (unit / kBuffers & 1) ^ 1;
        if (!barrier_passed(&empty[buffer], parity)) {  // rather than wait with news
          if (pending == 2) announce<1>(unit - 2);
          if (pending > 0) announce<0>(unit - 1);
          pending = 0;
        }
        barrier_wait(&empty[buffer], parity);
        copy(half == 0 ? p.key_pool : p.value_pool, place, tile * kKeys,
             shared_memory() + buffer * kTileBytes);
        copy_commit();
        if (pending == 2) announce<2>(unit - 2);
        pending = pending < 2 ? pending + 1 : 2;
      }
    }
    if (pending == 2) announce<1>(2 * tiles - 2);
    announce<0>(2 * tiles - 1);
  }

  // Once all but PENDING copies are there: products may read the unit.
  template <int PENDING>
  VF_DEVICE void announce(int unit) const {
    copy_wait<PENDING>();
    publish_shared();
    barrier_arrive(&full[unit % kBuffers]);
  }

  // Where strip lane % 8 of a tile is: counted in strips from the start of a pool, the same in both.
  VF_DEVICE int find(int kv_head, int first) const {
    const int key = first + lane % kStrips * kStripKeys;
    const int* pages = p.block_table + static_cast<i64>(b) * p.max_pages;
    const int page = key < past + length ? pages[key >> p.page_shift] : 0;  // else: zeroes
    return ((page * p.kv_heads + kv_head) << (p.page_shift - 4)) |
           ((key & ((1 << p.page_shift) - 1)) / kStripKeys);
  }

  VF_DEVICE void copy(const void* pool, int place, int first, char* to) const {
    constexpr int kLanes = D <= 64 ? 8 : 16;  // threads that share a row, 16 bytes each
    constexpr int kStep = 128 / kLanes;       // rows that the warpgroup copies at once
    // There are 24 registers, and rows that are no power of two long take more of them.
    [[maybe_unused]] constexpr int kUnrolled = D % 64 == 0 ? kStrips : 2;
    const int unit = thread_index() % kLanes, row = thread_index() % 128 / kLanes;
    const int missing = past + length - first - row;
    const char* from = static_cast<const char*>(pool) + (row * D + unit * 8) * 2;
    to += unit / 8 * kPanelBytes + row * 128 + ((unit ^ row) & 7) * 16;
#pragma unroll kUnrolled
    for (int n = 0; n < kStrips; ++n) {
      const char* strip = from + static_cast<i64>(shuffle_from(place, n)) * (kStripKeys * D * 2);
#pragma unroll
      for (int i = 0; i < kStripKeys; i += kStep) {
        if (unit < D / 8) {
          copy_async<16>(to + (n * kStripKeys + i) * 128, strip + i * D * 2,
                         n * kStripKeys + i < missing);
        }
      }
    }
  }

  // Zeroes for half a step of dimensions if D is no multiple of 16; copies never touch them.
  VF_DEVICE static void clear_padding() {
    if constexpr (D % 16 != 0) {
      constexpr int kUnit = D / 8;
      for (int i = thread_index(); i < kBuffers * kKeys; i += kThreads) {
        char* tile = shared_memory() + i / kKeys * kTileBytes + kUnit / 8 * kPanelBytes;
        const int row = i % kKeys;
        *reinterpret_cast<u32x4*>(tile + row * 128 + ((kUnit ^ row) & 7) * 16) = {0, 0, 0, 0};
      }
      publish_shared();
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
    // What only the other group reads: the producer and the turns wait for both.
    for (int tile = mine; tile < tiles_before(first_row + kRows); ++tile) {
      for (int unit = 2 * tile; unit < 2 * tile + 2; ++unit) {
        wait_full(unit);
        release(unit);
      }
      if (tile > 0) {
        take_turn(tile);
        pass_turn();
      }
    }
    if (mine > 0) store(rows, out);
  }

  VF_DEVICE void wait_full(int unit) const {
    barrier_wait(&full[unit % kBuffers], unit / kBuffers & 1);
  }
  VF_DEVICE void release(int unit) const {
    if (lane == 0) barrier_arrive(&empty[unit % kBuffers]);
  }

  // From tile 1 on, group 0 issues its products for a tile before group 1 does, and group 1 before
  // group 0 does for the next. The first turn of group 0 waits for nobody.
  VF_DEVICE void take_turn(int tile) const {
    if constexpr (TURNS) barrier_wait(&turn[group], (tile & 1) ^ (group == 0 ? 0 : 1));
  }
  VF_DEVICE void pass_turn() const {
    if (TURNS && lane == 0) barrier_arrive(&turn[1 - group]);
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
    release(0);
    soften(rows, scores, shrink, 0);
    wait_full(1);
    pack(weights, s);
#pragma unroll 1
    for (int i = 1; i < tiles; ++i) {
      const int keys = 2 * i, values = 2 * i - 1;  // the tile's scores, its predecessor's output
      wait_full(keys);
      take_turn(i);
      products_begin();
      issue_scores(s, rows, keys % kBuffers);
      issue_output(out, weights, values % kBuffers);
      pass_turn();
      products_wait<1>();
      products_done(s);
      release(keys);
      soften(rows, scores, shrink, i);
      // The next values are waited for here, not where they are needed, for the sake of the branch:
      // without one the assembler moves the wait for the output before the softmax, and nothing
      // overlaps.
      wait_full(values + 2);
      products_wait<0>();
      products_done(out);
      release(values);
#pragma unroll
      for (int c = 0; c < D / 2; ++c) out[c / 4][c % 4] *= shrink[c % 4 / 2];
      pack(weights, s);
    }
    const int last = 2 * tiles - 1;
    products_begin();
    issue_output(out, weights, last % kBuffers);
    products_wait<0>();
    products_done(out);
    release(last);
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
