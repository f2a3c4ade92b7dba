// vf_choose: the token of each row, one block of 1024 threads a row.
//
// Edited values are float32; weights, sums and comparisons float64. What is added up is added up in an
// order that only the row's size decides: the same row has the same answer in any batch.
//
//   penalties and bans -> the largest logit -> if needed: the weight of all, the likeliest tokens sorted
//                      -> temperature, top-k, top-p, min-p -> where a random part of the weight ends
#include "candidates.cuh"

namespace vf {

constexpr u32 kCandidates = 1024;  // that choices by rank are made from
constexpr i64 kUndecided = -2;
constexpr u32 kQuadsOfBlock = kBlock / 4;

// Of logits: 1 of the largest, less of others, 0 of those that are less than `floor`.
struct Weights {
  double largest, inverse, floor;

  VF_DEVICE double of(float x) const {
    const double behind = static_cast<double>(x) - largest;
    const double weight = behind == 0 ? 1. : exp_of(behind * inverse);
    return weight >= floor ? weight : 0.;
  }
};

// What is asked for of a row.
struct Asked {
  double temperature, top_p, min_p, draw;
  bool greedy, limited, by_rank, too_many;
  u32 candidates;  // that may be drawn, at most; of choices by rank

  VF_DEVICE Asked(const double* from, u32 vocab) {
    temperature = from[0], top_p = from[2], min_p = from[3], draw = from[4];
    const double top_k = from[1];
    greedy = draw < 0;
    limited = top_k < vocab;
    by_rank = !greedy && (limited || top_p < 1);
    too_many = by_rank && limited && top_k > kCandidates;
    const u32 all = vocab < kCandidates ? vocab : kCandidates;
    candidates = limited && top_k < all ? (top_k < 1 ? 1 : static_cast<u32>(top_k)) : all;
  }
  VF_DEVICE u32 wanted() const { return by_rank && !too_many ? candidates : 0; }
  VF_DEVICE bool weighs_all() const { return !greedy && !(by_rank && limited); }
  VF_DEVICE Weights weights(double largest) const {
    return {largest, 1. / temperature, by_rank ? 0. : min_p};
  }
};

struct Chooser {
  Team team;
  Row row;
  Peak peak;

  // The blocks of a warp are [first, end).
  VF_DEVICE u32 blocks() const { return (row.quads + kQuadsOfBlock - 1) / kQuadsOfBlock; }
  VF_DEVICE u32 blocks_of_warp() const { return (blocks() + kWarps - 1) / kWarps; }

  // A thread's part of a block's weights.
  VF_DEVICE double in_block(const Weights& weights, u32 block) const {
    const u32 quad = block * kQuadsOfBlock + team.lane;
    const float none = minus_infinity();
    f32x4 one{none, none, none, none}, other = one;
    if (quad < row.quads) one = row.quad(quad);
    if (quad + 32 < row.quads) other = row.quad(quad + 32);
    double sum = 0;
#pragma unroll 1
    for (u32 part = 0; part < 4; ++part) {
      sum += weights.of(one.x) + weights.of(other.x);
      one = {one.y, one.z, one.w, none};
      other = {other.y, other.z, other.w, none};
    }
    return sum;
  }

  // The weight of all, and in `parts` that of each warp's blocks.
  VF_DEVICE double whole(const Weights& weights) {
    const u32 most = blocks(), first = team.warp * blocks_of_warp();
    double sum = 0;
#pragma unroll 1
    for (u32 i = 0; i < blocks_of_warp() && first + i < most; ++i) sum += in_block(weights, first + i);
    sum = team.sum_in_warp(sum);
    if (team.lane == 31) team.shared.parts[team.warp] = sum;
    sync_threads();
    return team.sums(team.thread < kWarps ? team.shared.parts[team.thread] : 0).all;
  }

  // Where a part `draw` of all weight ends in the order of ids; `parts` is known.
  VF_DEVICE u32 drawn_from_all(const Weights& weights, double draw) {
    Shared& shared = team.shared;
    double weight = team.thread < kWarps ? shared.parts[team.thread] : 0;
    Team::Sums sums = team.sums(weight);
    const double target = draw * sums.all;
    const Team::End part = team.end(weight, sums.here, target);
    const u32 each = blocks_of_warp(), first = part.thread * each;
    const u32 count = first + each < blocks() ? each : blocks() - first;
#pragma unroll 1
    for (u32 i = team.warp; i < count; i += kWarps) {
      const double sum = team.sum_in_warp(in_block(weights, first + i));
      if (team.lane == 31) shared.blocks[i] = sum;
    }
    sync_threads();
    weight = team.thread < count ? shared.blocks[team.thread] : 0;
    sums = team.sums(weight);
    const Team::End block = team.end(weight, sums.here, target - part.before);
    const u32 begin = (first + block.thread) * kBlock, id = begin + team.thread;
    weight = team.thread < kBlock && id < row.vocab ? weights.of(row.at(id)) : 0;
    sums = team.sums(weight);
    // Sums that are made in another order differ in their last digits.
    double rest = target - part.before - block.before;
    const double end = sums.all - sums.all * 0x1p-40;
    rest = rest < end ? rest : end;
    return begin + team.end(weight, sums.here, rest > 0 ? rest : 0).thread;
  }

  // From the candidates, if these are enough; `all` is the weight of all tokens.
  VF_DEVICE i64 drawn_by_rank(const Asked& asked, const Weights& weights, double all) {
    const bool there = team.thread < asked.candidates;
    const double full = there ? weights.of(logit_of(team.shared.listed[team.thread])) : 0;
    Team::Sums sums = team.sums(full);
    const double enough = asked.top_p * (asked.limited ? sums.all : all);
    const bool needed = asked.top_p >= 1 || sums.here - full < enough || team.thread == 0;
    const bool known = asked.limited || row.vocab <= kCandidates || sums.all >= enough;
    const double kept = needed && full >= asked.min_p ? full : 0;
    sums = team.sums(kept);
    const u32 rank = team.end(kept, sums.here, asked.draw * sums.all).thread;
    return known ? static_cast<i64>(id_of(team.shared.listed[rank])) : kUndecided;
  }
};

// Numbers that are asked for are read where they are needed: registers are scarce meanwhile.
VF_DEVICE void choose(const Params& p) {
  wait_for_previous_kernel();
  const auto index = static_cast<u64>(block_x());
  auto& shared = *reinterpret_cast<Shared*>(shared_memory());
  auto* marks = reinterpret_cast<u32*>(&shared + 1);
  const u32 quads = (p.vocab + 3) / 4;
  const double* choices = p.choices + index * 5;
  float* kept = p.scratch + index * quads * 4;
  Chooser chooser{Team(shared), {p.logits + index * p.vocab, kept, marks, p.vocab, quads, false}, {}};
  Team& team = chooser.team;
  const float nothing = edit(team, Edits(p, index), chooser.row, marks);
  const Peak& peak = chooser.peak = peak_of(team, chooser.row, nothing);
  const bool first = team.thread == 0, told = p.told != 0, tells = told && team.thread < p.reported;
  const u64 best = index * p.reported + team.thread;
  if (!peak.finite) {
    const double none = double_from(0x7ff8000000000000ull);
    if (first) p.chosen[index] = kUndecided;
    if (first && told) p.chosen_logit[index] = p.normaliser[index] = none;
    if (tells) p.best_ids[best] = -1, p.best_logits[best] = none;
    return;
  }
  u32 wanted = Asked(choices, p.vocab).wanted();
  if (told && wanted < p.reported) wanted = p.reported;
  if (wanted > 0) find_candidates(team, chooser.row, peak, wanted);
  if (tells) {
    p.best_ids[best] = static_cast<i64>(id_of(shared.listed[team.thread]));
    p.best_logits[best] = static_cast<double>(logit_of(shared.listed[team.thread]));
  }
  const Weights weights = Asked(choices, p.vocab).weights(peak.value);
  double all = 0;
  if (told) {
    all = chooser.whole({weights.largest, 1., 0.});
    if (first) p.normaliser[index] = weights.largest + log_of(all);
  }
  const bool alike = told && weights.inverse == 1 && weights.floor == 0;
  if (Asked(choices, p.vocab).weighs_all() && !alike) all = chooser.whole(weights);
  const Asked asked(choices, p.vocab);
  i64 token = kUndecided;
  if (asked.greedy) {
    token = peak.id;
  } else if (!asked.by_rank) {
    token = chooser.drawn_from_all(weights, asked.draw);
  } else if (!asked.too_many) {
    token = chooser.drawn_by_rank(asked, weights, all);
  }
  if (!first) return;
  p.chosen[index] = token;
  if (told) p.chosen_logit[index] = chooser.row.at(token < 0 ? peak.id : static_cast<u32>(token));
}

}  // namespace vf

VF_KERNEL(vf::kThreads, 1) vf_choose(VF_PARAMS p) { vf::choose(p); }
