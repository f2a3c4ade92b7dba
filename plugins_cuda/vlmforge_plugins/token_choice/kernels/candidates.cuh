// The likeliest tokens of a row, sorted.
//
// A bound below as many as are wanted, and mostly above nearly all others, is known from the largest
// logits of 4096 parts of the row. What is not below it is gathered, in whatever order, and sorted. Where
// that is too much, for many are equal or lie as they seldom do, the bound is made exact by its digits.
#pragma once

#include "row.cuh"

namespace vf {

constexpr u32 kIdBits = 20;
constexpr u32 kBins = 2048;  // of a digit, at most
static_assert(kMostVocab <= 1u << kIdBits, "ids have these bits");
static_assert(kBins * sizeof(u32) <= sizeof(Shared::listed), "bins lie where candidates will");

// Larger logits first, of equal ones lower ids: no two are the same.
VF_DEVICE u64 ranked(float x, u32 id) {
  return u64{key_of(x)} << kIdBits | ((1u << kIdBits) - 1 - id);
}
VF_DEVICE u32 id_of(u64 candidate) {
  return (1u << kIdBits) - 1 - (static_cast<u32>(candidate) & ((1u << kIdBits) - 1));
}
VF_DEVICE float logit_of(u64 candidate) { return value_of(static_cast<u32>(candidate >> kIdBits)); }

// Calls `take` with all candidates that are `least` or more.
template <class TAKE>
VF_DEVICE void visit_candidates(const Team& team, const Row& row, u64 least, const TAKE& take) {
  const float none = minus_infinity();  // what is below it as a key is no number
  const float bound = least >> kIdBits > key_of(none) ? logit_of(least) : none;
  row.visit(team, [&](const f32x4& quad, u32 place) {
    const float here = max_of(max_of(quad.x, quad.y), max_of(quad.z, quad.w));
    if (here < bound) return;
    f32x4 rest = quad;
#pragma unroll 1
    for (u32 id = 4 * place; id < 4 * place + 4 && id < row.vocab; ++id) {
      if (rest.x >= bound) {
        const u64 candidate = ranked(rest.x, id);
        if (candidate >= least) take(candidate);
      }
      rest = {rest.y, rest.z, rest.w, rest.x};
    }
  });
}

// The largest key that so many of the block's, four of each thread, are not below.
VF_DEVICE u32 bound_of(Team& team, const u32 (&keys)[4], u32 wanted) {
  u32 bound = 0;
#pragma unroll 1
  for (u32 bit = 1u << 31; bit != 0; bit >>= 1) {
    const u32 higher = bound | bit;
    u32 above = 0;
#pragma unroll
    for (u32 key : keys) above += key >= higher ? 1u : 0u;
    above = team.sum(above);
    if (above >= wanted) bound = higher;
    if (above == wanted) break;
  }
  return bound;
}

// A bound that is not above so many candidates, and no more than fit: digit by digit, by counting the
// candidates that have the same digits before.
VF_DEVICE u64 exact_bound(Team& team, const Row& row, u64 least, u32 wanted) {
  auto* bins = reinterpret_cast<u32*>(team.shared.listed);
  u64 found = 0;
  u32 above = 0, shift = 32 + kIdBits;
#pragma unroll 1
  while (shift > 0) {
    const u32 bits = shift > 32 ? 11 : 10;  // 11, 11, 10 of a key; 10, 10 of an id
    const u32 before = shift, last = (1u << bits) - 1;
    shift -= bits;
    for (u32 i = team.thread; i < kBins; i += kThreads) bins[i] = 0;
    sync_threads();
    visit_candidates(team, row, least, [&](u64 candidate) {
      if (candidate >> before == found) add_shared(bins + (candidate >> shift & last), 1);
    });
    sync_threads();
    // Two bins of each thread, the highest ones first. Whole numbers are exact as doubles.
    const bool some = 2 * team.thread <= last;
    const u32 high = some ? last - 2 * team.thread : 1;
    const u32 of_high = some ? bins[high] : 0, of_low = some ? bins[high - 1] : 0;
    const double until = team.sums(static_cast<double>(of_high + of_low)).here;
    const u32 sum = above + static_cast<u32>(until);
    if (team.least(sum >= wanted ? team.thread : kNone) == team.thread) {
      const bool low = sum - of_low < wanted;
      team.shared.bin = low ? high - 1 : high;
      team.shared.inside = low ? of_low : of_high;
      team.shared.above = sum - of_low - (low ? 0 : of_high);
    }
    sync_threads();
    found = found << bits | team.shared.bin;
    above = team.shared.above;
    least = found << shift;
    const bool fit = above + team.shared.inside <= kListed;
    sync_threads();
    if (fit) break;
  }
  return least;
}

// Those that are not below the bound; returns how many, which may be more than are listed.
VF_DEVICE u32 gather(Team& team, const Row& row, u64 least) {
  Shared& shared = team.shared;
  if (team.thread == 0) shared.count = 0;
  sync_threads();
  visit_candidates(team, row, least, [&](u64 candidate) {
    const u32 place = add_shared(&shared.count, 1);
    if (place < kListed) shared.listed[place] = candidate;
  });
  sync_threads();
  const u32 count = shared.count;
  sync_threads();
  return count;
}

// Largest first: a bitonic sort. Threads of a warp have 64 places of their own while steps are short.
VF_DEVICE void sort(Team& team, u32 count) {
  u64* listed = team.shared.listed;
  u32 size = 2;
  while (size < count) size *= 2;
  for (u32 i = count + team.thread; i < size; i += kThreads) listed[i] = 0;
  sync_threads();
#pragma unroll 1
  for (u32 run = 2; run <= size; run *= 2) {
#pragma unroll 1
    for (u32 step = run / 2; step > 0; step /= 2) {
      const u32 one = 2 * team.thread - (team.thread & (step - 1)), other = one + step;
      if (2 * team.thread < size) {
        const u64 a = listed[one], b = listed[other];
        if ((a < b) == ((one & run) == 0)) {
          listed[one] = b;
          listed[other] = a;
        }
      }
      const u32 next = step > 1 ? step / 2 : run;
      if (step > 32 || next > 32) sync_threads();
      else sync_warp();
    }
  }
  sync_threads();
}

// The first `wanted` of `listed` are the likeliest tokens then, likeliest first.
VF_DEVICE void find_candidates(Team& team, const Row& row, const Peak& peak, u32 wanted) {
  u64 least = u64{bound_of(team, peak.keys, wanted)} << kIdBits;
  for (;;) {
    const u32 count = gather(team, row, least);
    if (count <= kListed) return sort(team, count);
    least = exact_bound(team, row, least, wanted);
  }
}

}  // namespace vf
