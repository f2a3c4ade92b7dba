// Prefill for sm_90a: the function of prefill.cuh with warpgroup products.
//
// A block stays on its multiprocessor and takes one block of queries after the other, in the order of
// PrefillBlock, from a counter in device memory. It has two consumer warpgroups of 64 queries each and
// a producer, one warp. Keys and values arrive in turn, K0 V0 K1 V1 ..., in tiles of 128 through a ring
// of BUFFERS with a "full" and an "empty" barrier each; the ring goes on from block to block of queries,
// so that one's end meets the next one's start. The producer asks for tiles by the page, through a
// tensor map whose swizzle is the one that the products read. A consumer keeps its queries and
// probabilities in registers; while the tensor cores multiply the probabilities of one tile with its
// values, it takes the softmax of the next (as FlashAttention-3, https://arxiv.org/abs/2407.08608).
//
// Pools of fp8: tiles come as they lie there, and three more warps widen them, each every third.
#pragma once

#include "flash.cuh"
#include "hopper.cuh"
#include "widen_tiles.cuh"

namespace vf {

// S: of 16-bit elements; Kv: what the pools hold.
template <class S, class Kv, int BUFFERS>
struct HopperPrefill {
  using Act = typename S::Act;
  static constexpr int D = S::D;
  static constexpr int kConsumers = 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kRows = 64 * kConsumers;
  static constexpr int kKeys = 128;
  static constexpr int kStrips = kKeys / kStripKeys;
  static constexpr int kBuffers = BUFFERS;
  static constexpr int kPanels = (D + 63) / 64;
  static constexpr int kPanelBytes = kKeys * 128;  // all keys of a tile, 64 dimensions of them
  static constexpr int kTileBytes = kPanels * kPanelBytes;
  static constexpr bool kWidens = !is_same<Kv, Act>::value;
  static constexpr int kStages = kWidens ? 4 : 0;  // of tiles as they lie in the pool
  static constexpr int kStageBytes = kKeys * D;
  static constexpr int kWideners = kWidens ? 3 : 0;  // warps
  static constexpr int kBarriers = kBuffers * kTileBytes + kStages * kStageBytes;  // where
  static constexpr int kSharedBytes = kBarriers + (2 * kBuffers + 2 * kStages + 10) * 8;
  static_assert(!S::kFp8, "products of 16-bit elements");
  using Rows = Flash<S, 1, kStrips>;

  // Queries that a block takes. `b` is negative behind the last.
  struct Queries { int b, past, length, head, first_row; };

  const Params& p;
  const int group, lane;
  Queries at;      // those at hand
  int before = 0;  // units of the ring that came before theirs

  VF_DEVICE HopperPrefill(const Params& params)
      : p(params), group(uniform(thread_index() / 128)), lane(thread_index() % 32) {}

  // Behind the rings. A pointer each would take the producer's registers.
  VF_DEVICE static u64* barrier(int i) {
    return reinterpret_cast<u64*>(shared_memory() + kBarriers) + i;
  }
  VF_DEVICE static u64* full(int buffer) { return barrier(buffer); }
  VF_DEVICE static u64* empty(int buffer) { return barrier(kBuffers + buffer); }
  VF_DEVICE static u64* handed(int slot) { return barrier(2 * kBuffers + slot); }
  VF_DEVICE static u64* taken(int slot) { return barrier(2 * kBuffers + 2 + slot); }
  // The last values, before those of no token are cleared.
  VF_DEVICE static u64* landed() { return barrier(2 * kBuffers + 4); }
  // Which queries are next.
  VF_DEVICE static Queries* work(int slot) {
    return reinterpret_cast<Queries*>(barrier(2 * kBuffers + 5)) + slot;
  }
  // Of the stages of fp8.
  VF_DEVICE static u64* come(int stage) { return barrier(2 * kBuffers + 10 + stage); }
  VF_DEVICE static u64* widened(int stage) { return barrier(2 * kBuffers + 10 + kStages + stage); }
  VF_DEVICE static char* tile(int buffer) { return shared_memory() + buffer * kTileBytes; }
  VF_DEVICE static char* stage(int i) { return tile(kBuffers) + i * kStageBytes; }

  VF_DEVICE static void run(const Params& p) {
    start_next_kernel();
    HopperPrefill block(p);
    if (thread_index() == 0) {
      for (int i = 0; i < kBuffers; ++i) {
        barrier_init(full(i), 1);
        barrier_init(empty(i), kConsumers * 4);
      }
      for (int i = 0; i < kStages; ++i) {
        barrier_init(come(i), 1);
        barrier_init(widened(i), 1);
      }
      for (int i = 0; i < 2; ++i) {
        barrier_init(handed(i), 1);
        barrier_init(taken(i), kConsumers * 4 + kWideners);
      }
      barrier_init(landed(), 1);
      publish_barriers();
    }
    sync_threads();
    wait_for_previous_kernel();
    if (block.group == kConsumers) {
      give_registers<56>();
      if (thread_index() / 32 == kConsumers * 4) block.produce_all();
      else if constexpr (kWidens) block.follow([&] { block.widen(); });
    } else {
      take_registers<224>();
      block.follow([&] { block.consume(); });
    }
  }

  VF_DEVICE Queries find_queries(int index) const {
    const int blocks = ceil_div(p.max_query, kRows) * p.heads, b = index / blocks;
    if (b >= p.batch) return {-1, 0, 0, 0, 0};
    const PrefillBlock block(p, kRows, index - b * blocks);
    return {b, p.past_lengths[b], query_length(p, b), block.head, block.queries * kRows};
  }

  // The next queries that nobody has. Whoever asks last of all leaves the counter as it was. A grid of
  // as many blocks as there are of queries needs none.
  VF_DEVICE int claim(int round) const {
    const int all = p.batch * ceil_div(p.max_query, kRows) * p.heads;
    if (grid_x() == all) return round == 0 ? block_x() : all;
    const int index = count_device(p.arrivals);
    if (index == all + grid_x() - 1) *p.arrivals = 0;
    return index;
  }

  VF_DEVICE void produce_all() {
    int cuts = 0;
    for (int round = 0;; ++round) {
      at = find_queries(shuffle_from(lane == 0 ? claim(round) : 0, 0));
      const int slot = round % 2;
      barrier_wait(taken(slot), (round / 2 & 1) ^ 1);
      if (lane == 0) {
        *work(slot) = at;
        barrier_arrive(handed(slot));
      }
      if (at.b < 0) return;
      if (at.first_row < at.length) produce(cuts);
    }
  }

  // Does its part for all queries that the producer hands over.
  template <class Part>
  VF_DEVICE void follow(const Part& part) {
    for (int round = 0;; ++round) {
      const int slot = round % 2;
      barrier_wait(handed(slot), round / 2 & 1);
      at = *work(slot);
      sync_warp();  // all have read
      if (lane == 0) barrier_arrive(taken(slot));
      if (at.b < 0) return;
      if (at.first_row < at.length) part();
    }
  }

  // Tiles of keys that the queries before `row` of this chunk can see.
  VF_DEVICE int tiles_before(int row) const {
    return ceil_div(at.past + (row < at.length ? row : at.length), kKeys);
  }

  VF_DEVICE void produce(int& cuts) {
    const int tiles = tiles_before(at.first_row + kRows), total = at.past + at.length;
    const int kv_head = at.head / (p.heads / p.kv_heads), page_size = 1 << p.page_shift;
    const int* pages = p.block_table + static_cast<i64>(at.b) * p.max_pages;
    const auto find = [&](int tile) {  // lane i looks up the tile's page i
      const int first = lane << p.page_shift, key = tile * kKeys + first;
      return first < kKeys && key < total ? pages[key >> p.page_shift] : 0;
    };
    int page = find(0);
    for (int tile = 0; tile < tiles; ++tile) {
      const int keys = total - tile * kKeys < kKeys ? total - tile * kKeys : kKeys;
      const int boxes = ceil_div(keys, page_size);
      const int row = (page * p.kv_heads + kv_head) << p.page_shift;
      page = find(tile + 1);
      int from[kStrips];  // of the boxes, for whoever will ask; not after the wait, where it takes time
#pragma unroll
      for (int i = 0; i < kStrips; ++i) from[i] = shuffle_from(row, i);
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        const int unit = before + 2 * tile + half;
        if constexpr (kWidens) ask_narrow(unit, half, boxes, from);
        else ask(unit, half, boxes, from, keys, cuts);
      }
    }
    before += 2 * tiles;
  }

  // For the boxes of a tile that start at these rows of the pool.
  VF_DEVICE void ask(int unit, int half, int boxes, const int (&from)[kStrips], int keys, int& cuts) {
    const int buffer = unit % kBuffers, page_size = 1 << p.page_shift;
    const bool cut = half == 1 && keys < kKeys;
    char* to = tile(buffer);
    u64* there = cut ? landed() : full(buffer);
    barrier_wait(empty(buffer), (unit / kBuffers & 1) ^ 1);
    if (elect_one()) {
      const TileMap* map = half == 0 ? &p.key_map : &p.value_map;
      barrier_expect(there, boxes * page_size * 128 * kPanels);
#pragma unroll
      for (int i = 0; i < kStrips; ++i) {
        if (i >= boxes) break;
        char* box = to + i * page_size * 128;
#pragma unroll
        for (int panel = 0; panel < kPanels; ++panel) {
          copy_tile(box + panel * kPanelBytes, map, panel * 64, from[i], there);
        }
      }
    }
    if (cut) {
      barrier_wait(landed(), cuts++ & 1);
      announce(buffer, keys);
    }
  }

  // A tile that this warp wrote, or of whose `keys` it clears what is none.
  VF_DEVICE void announce(int buffer, int keys) const {
    sync_warp();
    if (keys < kKeys) clear_rows<D, kKeys>(tile(buffer), keys, lane);
    publish_shared();
    sync_warp();
    if (lane == 0) barrier_arrive(full(buffer));
  }

  // The same, as they lie in the pool.
  VF_DEVICE void ask_narrow(int unit, int half, int boxes, const int (&from)[kStrips]) {
    const int at = unit % kStages, bytes = D << p.page_shift;
    barrier_wait(widened(at), (unit / kStages & 1) ^ 1);
    if (elect_one()) {
      const char* pool = static_cast<const char*>(half == 0 ? p.key_pool : p.value_pool);
      barrier_expect(come(at), boxes * bytes);
#pragma unroll
      for (int i = 0; i < kStrips; ++i) {
        if (i >= boxes) break;
        copy_bulk<false>(stage(at) + i * bytes, pool + static_cast<i64>(from[i]) * D, bytes, come(at));
      }
    }
  }

  // Makes tiles of what comes: each warp of every third.
  VF_DEVICE void widen() {
    const int end = before + 2 * tiles_before(at.first_row + kRows), total = at.past + at.length;
    const int warp = uniform(thread_index() / 32) - (kConsumers * 4 + 1);
#pragma unroll 1
    for (int unit = before; unit < end; ++unit) {
      if (unit % kWideners != warp) continue;
      const int buffer = unit % kBuffers, from = unit % kStages;
      barrier_wait(come(from), unit / kStages & 1);
      barrier_wait(empty(buffer), (unit / kBuffers & 1) ^ 1);
      widen_tile<S, kKeys>(tile(buffer), stage(from), lane);
      announce(buffer, total - (unit - before) / 2 * kKeys);
      if (lane == 0) barrier_arrive(widened(from));
    }
    before = end;
  }

  VF_DEVICE int row(int half) const {
    return at.first_row + thread_index() / 32 * 16 + half * 8 + lane / 4;
  }

  VF_DEVICE void load_queries(Rows& rows) const {
    const bool rotated = p.cos != nullptr;
    const i64 stride = rotated ? static_cast<i64>(p.heads) * D : p.query_row;
    const Act* query = rotated
        ? static_cast<const Act*>(p.rotated) + static_cast<i64>(at.b) * p.max_query * stride
        : static_cast<const Act*>(p.query) + at.b * p.query_batch;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int s = row(h);
      const Act* from = query + s * stride + static_cast<i64>(at.head) * D;
      rows.load_query(0, h, s < at.length ? from : nullptr, lane);
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

  VF_DEVICE void consume() {
    Rows rows;
    load_queries(rows);
    Output out;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i / 4][i % 4] = 0.f;
    const int all = tiles_before(at.first_row + kRows);
    const int first = at.first_row + group * 64, mine = first < at.length ? tiles_before(first + 64) : 0;
    if (mine > 0) attend(rows, out, mine);
    for (int unit = 2 * mine; unit < 2 * all; ++unit) {  // what only the other group reads
      wait_full(unit);
      release(unit);
    }
    before += 2 * all;
    if (mine > 0) store(rows, out);
  }

  // Units are counted from the first of these queries.
  VF_DEVICE int buffer(int unit) const { return (before + unit) % kBuffers; }
  VF_DEVICE void wait_full(int unit) const {
    barrier_wait(full(buffer(unit)), (before + unit) / kBuffers & 1);
  }
  VF_DEVICE void release(int unit) const {
    if (lane == 0) barrier_arrive(empty(buffer(unit)));
  }

  VF_DEVICE void attend(Rows& rows, Output& out, int tiles) const {
    typename Rows::Scores scores;
    Scores& s = scores[0];
    Weights weights;
    float shrink[2];
    wait_full(0);
    products_begin();
    issue_scores(s, rows, buffer(0));
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
      products_begin();
      issue_scores(s, rows, buffer(keys));
      issue_output(out, weights, buffer(values));
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
    issue_output(out, weights, buffer(last));
    products_wait<0>();
    products_done(out);
    release(last);
    rows.finish();
  }

  VF_DEVICE void soften(Rows& rows, typename Rows::Scores& scores, float (&shrink)[2], int tile) const {
    if ((tile + 1) * kKeys - 1 > at.past + at.first_row + thread_index() / 32 * 16) {
#pragma unroll
      for (int h = 0; h < 2; ++h) rows.mask(scores, 0, h, tile * kKeys, at.past + row(h), lane);
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
      if (s >= at.length) continue;
      Act* to = static_cast<Act*>(p.out) + at.b * p.out_batch + s * p.out_row +
                static_cast<i64>(at.head) * D + 2 * (lane % 4);
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
