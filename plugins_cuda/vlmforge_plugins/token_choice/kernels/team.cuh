// What all threads of a block find together: one barrier each, and the same bits whatever the batch.
#pragma once

#include "words.cuh"

namespace vf {

constexpr u32 kThreads = 1024;  // one for each candidate
constexpr u32 kWarps = kThreads / 32;
constexpr u32 kListed = 2048;       // candidates that are sorted, at most
constexpr u32 kBlock = 256;         // ids whose weights are added up apart
constexpr u32 kMostVocab = 1 << 19;
constexpr u32 kBlocksOfWarp = kMostVocab / kBlock / kWarps;
constexpr u32 kNone = ~0u;

// Behind it lie `marks`, a bit for each four logits.
struct Shared {
  u64 listed[kListed];
  double parts[kWarps], blocks[kBlocksOfWarp], totals[2][kWarps], before;
  u32 words[2][kWarps];
  u32 count, bin, above, inside;
};

// Every other call has other words, so that nobody writes what others still read.
struct Team {
  Shared& shared;
  u32 thread, lane, warp;
  u32 turn = 0;

  VF_DEVICE explicit Team(Shared& all)
      : shared(all), thread(static_cast<u32>(thread_index())), lane(thread % 32), warp(thread / 32) {}

  VF_DEVICE u32 gathered(u32 of_warp) {  // of the warp with the number of the thread's lane
    u32* words = shared.words[turn];
    turn ^= 1;
    if (lane == 0) words[warp] = of_warp;
    sync_threads();
    return words[lane];
  }
  VF_DEVICE u32 sum(u32 value) { return warp_add(gathered(warp_add(value))); }
  VF_DEVICE u32 least(u32 value) { return warp_least(gathered(warp_least(value))); }
  VF_DEVICE u32 most(u32 value) { return warp_most(gathered(warp_most(value))); }

  VF_DEVICE static double shuffled(double value, u32 from) {
    const u64 bits = double_bits(value);
    const u32 low = shuffle_word(static_cast<u32>(bits), from);
    const u32 high = shuffle_word(static_cast<u32>(bits >> 32), from);
    return double_from(u64{high} << 32 | low);
  }
  // Of the lanes up to this one.
  VF_DEVICE double sum_in_warp(double value) const {
#pragma unroll 1
    for (u32 step = 1; step < 32; step *= 2) {
      const double other = shuffled(value, (lane - step) % 32);
      if (lane >= step) value += other;
    }
    return value;
  }
  // Of the threads up to this one, and of all.
  struct Sums { double here, all; };
  VF_DEVICE Sums sums(double value) {
    double* totals = shared.totals[turn];
    turn ^= 1;
    const double inside = sum_in_warp(value);
    if (lane == 31) totals[warp] = inside;
    sync_threads();
    const double until = sum_in_warp(totals[lane]);
    const double before = shuffled(until, (warp - 1) % 32);
    return {warp == 0 ? inside : before + inside, shuffled(until, 31)};
  }

  // The thread at whose weight `target` of the sum of weights ends, and the sum before it. Never one
  // without a weight, however sums are rounded, unless all are.
  struct End { u32 thread; double before; };
  VF_DEVICE End end(double weight, double sum, double target) {
    const u32 first = least(weight > 0 && sum > target ? thread : kNone);
    const u32 last = most(weight > 0 ? thread : 0);
    const u32 at = first == kNone ? last : first;
    if (thread == at) shared.before = sum - weight;
    sync_threads();
    return {at, shared.before};
  }
};

}  // namespace vf
