// A row's logits after penalties and bans, and the largest of them.
//
// Rows are read by quads, four ids that lie side by side. What is edited is a copy, of the quads in
// which something changes; a bit says which these are. So the logits stay as they were given, and a row
// of which little changes costs no more than another one.
#pragma once

#include "team.cuh"

namespace vf {

constexpr int kAhead = 4;  // loads of 16 bytes that a thread has on their way

// What a launch is told. Mirrored field by field in launcher.py; a test compares the offsets.
struct Params {
  const float* logits;       // [rows, vocab]
  const double* choices;     // [rows, 5]: temperature, top-k, top-p, min-p, draw
  const i64* edit_ids;       // [rows, edits], as both that follow
  const float* edit_factors;
  const double* edit_minus;
  i64* chosen;               // [rows]
  double* chosen_logit;      // [rows]; of no use unless `told`, as all that follow
  double* normaliser;        // [rows]
  i64* best_ids;             // [rows, reported]
  double* best_logits;       // [rows, reported]
  float* scratch;            // [rows, vocab, in whole quads]
  u32 vocab, edits, reported, told;
};

// 0, unless one is no number or not finite.
VF_DEVICE float nothing_of(const f32x4& quad) {
  return quad.x * 0.f + quad.y * 0.f + (quad.z * 0.f + quad.w * 0.f);
}
// Floats in their order as whole numbers; both zeros are one.
VF_DEVICE u32 key_of(float x) {
  const u32 bits = to_bits(x + 0.f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
VF_DEVICE float value_of(u32 key) { return from_bits(key >> 31 ? key ^ 0x80000000u : ~key); }

struct Row {
  const float* given;
  float* kept;        // copies of quads in which something changed
  const u32* marks;   // which these are
  u32 vocab, quads;
  bool edited;

  VF_DEVICE bool marked(u32 quad) const { return edited && (marks[quad / 32] >> quad % 32 & 1); }
  // -inf behind the row's end.
  VF_DEVICE f32x4 quad_of(const float* from, u32 at) const {
    from += 4 * at;
    if (vocab % 4 == 0) return *reinterpret_cast<const f32x4*>(from);
    const u32 left = vocab - 4 * at;
    const float none = minus_infinity();
    return {from[0], left > 1 ? from[1] : none, left > 2 ? from[2] : none, left > 3 ? from[3] : none};
  }
  VF_DEVICE f32x4 quad(u32 at) const { return quad_of(marked(at) ? kept : given, at); }
  VF_DEVICE float at(u32 id) const { return marked(id / 4) ? kept[id] : given[id]; }
  // Not 0 if a quad as it was given is not finite.
  VF_DEVICE float broken(const f32x4& quad, u32 at) const {
    const u32 left = vocab - 4 * at;
    if (left > 3) return nothing_of(quad);
    return nothing_of({quad.x, left > 1 ? quad.y : 0.f, left > 2 ? quad.z : 0.f, 0.f});
  }

  // All quads of the row, each by one thread, in order.
  template <class VISIT>
  VF_DEVICE void visit(const Team& team, const VISIT& see) const {
#pragma unroll 1
    for (u32 first = team.thread; first < quads; first += kAhead * kThreads) {
      f32x4 ahead[kAhead];
#pragma unroll
      for (u32 i = 0; i < kAhead; ++i) {
        if (first + i * kThreads < quads) ahead[i] = quad(first + i * kThreads);
      }
#pragma unroll
      for (u32 i = 0; i < kAhead; ++i) {
        if (first + i * kThreads < quads) see(ahead[i], first + i * kThreads);
      }
    }
  }
};

struct Edits {
  const i64* ids;
  const float* factors;
  const double* minus;
  u32 count, vocab;

  VF_DEVICE Edits(const Params& p, u64 row)
      : ids(p.edit_ids + row * p.edits), factors(p.edit_factors + row * p.edits),
        minus(p.edit_minus + row * p.edits), count(p.edits), vocab(p.vocab) {}

  // Whether it is an edit: most rows have none, and what fills them up changes nothing. Ids from a
  // token that was not decided are none.
  VF_DEVICE bool changes(u32 edit, u32& id) const {
    const i64 wide = ids[edit];
    id = static_cast<u32>(wide);
    return wide >= 0 && wide < vocab && !(factors[edit] == 1.f && minus[edit] == 0.);
  }
  VF_DEVICE float of(float before, u32 edit) const {
    const float penalised = before < 0.f ? before * factors[edit] : before / factors[edit];
    return static_cast<float>(static_cast<double>(penalised) - minus[edit]);
  }
};

// Sets `row.edited`. Returns what is not 0 if a logit that is edited was not finite before.
VF_DEVICE float edit(Team& team, const Edits& edits, Row& row, u32* marks) {
  u32 some = 0, id;
#pragma unroll 1
  for (u32 i = team.thread; i < edits.count; i += kThreads) some |= edits.changes(i, id) ? 1u : 0u;
  row.edited = team.most(some) != 0;
  if (!row.edited) return 0.f;
#pragma unroll 1
  for (u32 i = team.thread; i * 32 < row.quads; i += kThreads) marks[i] = 0;
  sync_threads();
  float nothing = 0.f;
#pragma unroll 1
  for (u32 i = team.thread; i < edits.count; i += kThreads) {
    if (!edits.changes(i, id)) continue;
    const u32 quad = id / 4;
    const f32x4 before = row.quad_of(row.given, quad);
    nothing += row.broken(before, quad);
    or_shared(marks + quad / 32, 1u << quad % 32);
    *reinterpret_cast<f32x4*>(row.kept + 4 * quad) = before;
  }
  sync_threads();
  // Who has the same id writes the same.
#pragma unroll 1
  for (u32 i = team.thread; i < edits.count; i += kThreads) {
    if (edits.changes(i, id)) row.kept[id] = edits.of(row.given[id], i);
  }
  sync_threads();
  return nothing;
}

// Of the largest logit.
struct Peak {
  float value;
  u32 id;       // the lowest
  bool finite;  // it is, and so are all logits that were given; none that is edited is +inf or NaN
  u32 keys[4];  // of the largest of the thread's in each place of a quad
};

VF_DEVICE Peak peak_of(Team& team, const Row& row, float nothing) {
  float largest[4], value = minus_infinity();
  for (float& one : largest) one = minus_infinity();
  u32 at = 0;
  row.visit(team, [&](const f32x4& quad, u32 place) {
    if (row.marked(place)) {  // the raw ones have been seen, and bans are -inf
      const float most = -minus_infinity();
      const bool less = quad.x < most && quad.y < most && quad.z < most && quad.w < most;
      nothing += less ? 0.f : 1.f;
    } else {
      nothing += row.broken(quad, place);
    }
    largest[0] = max_of(largest[0], quad.x);
    largest[1] = max_of(largest[1], quad.y);
    largest[2] = max_of(largest[2], quad.z);
    largest[3] = max_of(largest[3], quad.w);
    const float here = max_of(max_of(quad.x, quad.y), max_of(quad.z, quad.w));
    if (here > value) {
      value = here;
      at = place;
    }
  });
  Peak peak;
  for (int i = 0; i < 4; ++i) peak.keys[i] = key_of(largest[i]);
  const u32 key = key_of(value), most = team.most(key);
  at = team.least(key == most ? at : kNone);
  peak.value = value_of(most);
  const f32x4 there = row.quad(at);
  const u32 behind = there.y == peak.value ? 1 : there.z == peak.value ? 2 : 3;
  peak.id = 4 * at + (there.x == peak.value ? 0 : behind);
  const bool broken = !(nothing == 0.f) || !(peak.value > minus_infinity());
  peak.finite = team.most(broken ? 1u : 0u) == 0;
  return peak;
}

}  // namespace vf
