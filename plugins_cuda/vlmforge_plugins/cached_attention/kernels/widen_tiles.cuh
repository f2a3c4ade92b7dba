// Tiles of fp8, as they lie in the pool, to the tiles of 16 bits that warpgroup products read.
#pragma once

#include "strip.cuh"

namespace vf {

// Rows from `keys` on become zeroes: what lies in a pool behind the last token is arbitrary, and 0 x NaN
// would reach the output. By one warp.
template <int D, int KEYS>
VF_DEVICE void clear_rows(char* tile, int keys, int lane) {
  for (int panel = 0; panel < (D + 63) / 64; ++panel) {
    for (int i = keys * 128 + lane * 16; i < KEYS * 128; i += 32 * 16) {
      *reinterpret_cast<u32x4*>(tile + panel * (KEYS * 128) + i) = u32x4{0, 0, 0, 0};
    }
  }
}

// One warp turns KEYS rows of D bytes into panels of 64 dimensions, rows of 128 bytes whose 16-byte units
// are swizzled (see operand() in hopper.cuh). Dimensions that pad D to whole steps become zeroes. Whoever
// waits for the tile must be told after publish_shared().
template <class S, int KEYS>
VF_DEVICE void widen_tile(char* tile, const char* raw, int lane) {
  using Act = typename S::Act;
  constexpr int kUnits = 2 * S::kSteps;  // of a row: eight dimensions each
  constexpr int kRows = 32 / kUnits;     // at the same time
  constexpr int kBatch = 8;              // of a lane, on their way together
  const int unit = lane % kUnits, first = lane / kUnits;
  if (first >= kRows) return;
  raw += first * S::D + 8 * unit;
  tile += unit / 8 * (KEYS * 128) + first * 128;
#pragma unroll 1
  for (int start = 0; start < KEYS; start += kBatch * kRows) {
    u32x2 narrow[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      narrow[i] = u32x2{0, 0};
      if (8 * unit >= S::D || (KEYS % (kBatch * kRows) != 0 && start + first + i * kRows >= KEYS)) continue;
      narrow[i] = *reinterpret_cast<const u32x2*>(raw + i * kRows * S::D);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (KEYS % (kBatch * kRows) != 0 && start + first + i * kRows >= KEYS) continue;
      const int swizzled = unit % 8 ^ (first + i * kRows) % 8;  // start is a multiple of eight
      *reinterpret_cast<u32x4*>(tile + i * kRows * 128 + swizzled * 16) = {
          e4m3_pair<Act, 0, 1>(narrow[i].x), e4m3_pair<Act, 2, 3>(narrow[i].x),
          e4m3_pair<Act, 0, 1>(narrow[i].y), e4m3_pair<Act, 2, 3>(narrow[i].y)};
    }
    raw += kBatch * kRows * S::D;
    tile += kBatch * kRows * 128;
  }
}

}  // namespace vf
