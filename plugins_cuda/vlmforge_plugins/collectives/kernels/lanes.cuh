// Lanes: memory of each rank into which every other rank writes what it gives.
//
// Each 32 bits of a message travel in one word of 64, with the number of the meeting beside them. A
// word is written and read whole, so that whoever finds the number has the bits: no fence, and no flag
// to wait for after the data. It is the protocol "LL" of NCCL
// (https://arxiv.org/abs/2507.04786, section "LL"), with relaxed 64-bit accesses of system scope.
//
// Each block meets the same block of the other ranks, whatever the rest of the grid does, in a region
// of its own, and counts its meetings in memory, so that a captured launch may be replayed. There are
// two lanes, taken in turns: a rank writes to a lane again two meetings later, when it has had from
// everybody what they gave at the one between, and so all of them had read this one.
#pragma once

#include "system.cuh"

namespace vf {

constexpr int kMostRanks = 8;
constexpr int kThreads = 512;
constexpr int kBlocks = 64;         // of a launch, at most
constexpr u32 kRegion = 2048;       // groups of 8 bytes that a block can give
constexpr u32 kLooks = 1024;        // before it is asked whether to look on
constexpr u32 kHasty = 64;          // looks before there are pauses between them
constexpr u32 kWarps = kThreads / 32;

// What a launch is told. Mirrored field by field in launcher.py; a test compares the offsets.
struct Params {
  u32x4* lanes[kMostRanks];  // [2, size, kBlocks, kRegion] of each rank, as this GPU sees them
  u32* counts;               // [kBlocks + 1]: meetings of each block so far; not 0: all is lost
  const u32* stop;           // the host's: not 0: wait no more
  u32* failed;               // the host's: set to 1 where something was waited for in vain
  const void* given;
  void* out;
  u64 patience;              // nanoseconds
  u32 items, width, kept;    // items of `given`; of a gather the columns given, and of `out`
  u32 first, last, share;    // groups of this launch, and of each block
  int rank, size;
  // Kernels of engines that were built before there were norms end here: what is new goes behind it.
  const void* added;         // of a norm: as `given`; and the numbers of a row
  const void* scale;
  void* normed;              // as `given`
  float epsilon;
};

template <int BYTES> struct Item;
template <> struct Item<2> { using Bits = u16; };
template <> struct Item<4> { using Bits = u32; };

// 8 bytes of a tensor as its items, and back.
template <int BYTES>
VF_DEVICE void unpack_group(u32x2 bits, typename Item<BYTES>::Bits (&items)[8 / BYTES]) {
  if constexpr (BYTES == 4) {
    items[0] = bits.x;
    items[1] = bits.y;
  } else {
    items[0] = static_cast<u16>(bits.x);
    items[1] = static_cast<u16>(bits.x >> 16);
    items[2] = static_cast<u16>(bits.y);
    items[3] = static_cast<u16>(bits.y >> 16);
  }
}
template <int BYTES>
VF_DEVICE u32x2 pack_group(const typename Item<BYTES>::Bits (&items)[8 / BYTES]) {
  if constexpr (BYTES == 4) {
    return {items[0], items[1]};
  } else {
    return {items[0] | u32{items[1]} << 16, items[2] | u32{items[3]} << 16};
  }
}

// 8 bytes of a tensor as fp32, and rounded back.
template <class T>
VF_DEVICE void widen_group(u32x2 bits, float (&to)[8 / sizeof(T)]) {
  if constexpr (sizeof(T) == 4) {
    to[0] = from_bits(bits.x);
    to[1] = from_bits(bits.y);
  } else {
    unpack2<T>(bits.x, to[0], to[1]);
    unpack2<T>(bits.y, to[2], to[3]);
  }
}

template <class T>
VF_DEVICE u32x2 narrow_group(const float (&from)[8 / sizeof(T)]) {
  if constexpr (sizeof(T) == 4) {
    return {to_bits(from[0]), to_bits(from[1])};
  } else {
    return {pack2<T>(from[0], from[1]), pack2<T>(from[2], from[3])};
  }
}

// 8 bytes of what a rank gives, zeroes behind its end.
template <int BYTES>
VF_DEVICE u32x2 load_group(const Params& p, u32 group) {
  using Bits = typename Item<BYTES>::Bits;
  constexpr u32 kCount = 8 / BYTES;
  const Bits* from = static_cast<const Bits*>(p.given) + u64{group} * kCount;
  if ((group + 1) * kCount <= p.items) return *reinterpret_cast<const u32x2*>(from);
  Bits items[kCount] = {};
  for (u32 i = 0; group * kCount + i < p.items; ++i) items[i] = from[i];
  return pack_group<BYTES>(items);
}

template <int BYTES>
VF_DEVICE void store_group(const Params& p, u32 group, u32x2 bits) {
  using Bits = typename Item<BYTES>::Bits;
  constexpr u32 kCount = 8 / BYTES;
  Bits* to = static_cast<Bits*>(p.out) + u64{group} * kCount;
  if ((group + 1) * kCount <= p.items) {
    *reinterpret_cast<u32x2*>(to) = bits;
    return;
  }
  Bits items[kCount];
  unpack_group<BYTES>(bits, items);
  for (u32 i = 0; group * kCount + i < p.items; ++i) to[i] = items[i];
}

// One block's meeting.
struct Lanes {
  const Params& p;
  u32 first, last, count;
  u64 begun = 0;
  bool lost = false;

  VF_DEVICE explicit Lanes(const Params& params) : p(params) {
    first = p.first + block_x() * p.share;
    last = first + p.share < p.last ? first + p.share : p.last;
    count = load_kept(p.counts + block_x()) + 1;
    if (count == 0) count = 2;  // 0 is what was never written; lanes go on in turns
  }

  VF_DEVICE u32 begin() const { return first + thread_index(); }
  VF_DEVICE u32 end() const { return last; }

  // Where `from` puts a group in a rank's lanes.
  VF_DEVICE u32 place(int from, u32 group) const {
    return (((count & 1) * p.size + from) * kBlocks + block_x()) * kRegion + group - first;
  }

  VF_DEVICE void give(u32 group, u32x2 bits) const {
    const u64 number = u64{count} << 32;
#pragma unroll
    for (int rank = 0; rank < kMostRanks; ++rank) {
      if (rank >= p.size) break;
      if (rank == p.rank) continue;
      store_system_pair(p.lanes[rank] + place(p.rank, group), number | bits.x, number | bits.y);
    }
  }

  // What the other ranks give; anything where one does not.
  VF_DEVICE void take(u32 group, u32x2 (&given)[kMostRanks]) {
    for (u32 looks = 1;; ++looks) {
      bool here = true;
#pragma unroll
      for (int rank = 0; rank < kMostRanks; ++rank) {
        if (rank >= p.size) break;
        if (rank == p.rank) continue;
        u64 low, high;
        load_system_pair(p.lanes[p.rank] + place(rank, group), low, high);
        given[rank] = {static_cast<u32>(low), static_cast<u32>(high)};
        here = here && static_cast<u32>(low >> 32) == count && static_cast<u32>(high >> 32) == count;
      }
      if (!go_on(here, looks)) return;
    }
  }

  // Whether to look again, after so many looks.
  VF_DEVICE bool go_on(bool here, u32 looks) {
    if (here || lost) return false;
    if (looks % kLooks == 0) lost = in_vain(looks / kLooks);
    if (looks >= kHasty) rest();
    return true;
  }

  // The host's memory is far: if all threads looked there, a rank would be late by that for the next
  // meeting, the other one would look meanwhile, and so on, a millisecond at each. One warp does at a
  // time, each in its turn: those of others may have what they waited for.
  VF_DEVICE bool in_vain(u32 turn) {
    u32* all_lost = p.counts + kBlocks;
    if (load_system(all_lost) != 0) return true;
    if (turn % kWarps != static_cast<u32>(thread_index()) / 32) return false;
    const u64 now = nanoseconds();
    if (begun == 0) begun = now;
    const bool over = load_system(p.stop) != 0;
    if (!over && now - begun < p.patience) return false;
    store_system(p.failed, 1);
    store_system(all_lost, 1);
    return true;
  }

  VF_DEVICE void done() const {
    sync_threads();
    if (thread_index() == 0) store_kept(p.counts + block_x(), count);
  }
};

}  // namespace vf
