// A strip of keys or values as one bulk copy leaves it in shared memory: contiguous, rows not padded.
//
// For Hopper's decode: one instruction copies a strip, which reads memory some 5 % faster than copies
// of 16 bytes do.
#pragma once

#include "hopper.cuh"
#include "strip.cuh"

namespace vf {

struct alignas(16) Unit { u32 word[4]; };

template <class Act, int D, bool UNITS = D % 64 == 0>
struct BulkStrip : Strip<Act, Act, D, 2 * D> {
  static constexpr bool kBulk = true;
  static_assert(D % 16 == 0, "rows are whole steps");

  // Values of keys from `rows` on become zeroes: 0 x NaN would reach the output. By one warp.
  VF_DEVICE static void clear_rows(char* shared, int rows, int lane) {
    for (int i = rows * 2 * D + lane * 16; i < kStripKeys * 2 * D; i += 32 * 16) {
      *reinterpret_cast<Unit*>(shared + i) = Unit{};
    }
  }
};

// Rows of 128 or 256 bytes all begin in the same bank, where ldmatrix takes eight turns. So lanes read
// 16 bytes each and make operands of what they got; the products do not care in which order they meet
// the dimensions, as long as query and output follow it.
template <class Act, int D>
struct BulkStrip<Act, D, true> : BulkStrip<Act, D, false> {
  static constexpr int kPitch = 2 * D;

  VF_DEVICE static const Unit& unit(const char* shared, int row, int index) {
    return *reinterpret_cast<const Unit*>(shared + row * kPitch + index * 16);
  }

  // A lane's quad = lane % 4 reads unit quad of every four; two steps share it.
  VF_DEVICE static int pair_dim(int step, int i, int quad) {
    return (step / 2 * 4 + quad) * 8 + step % 2 * 4 + 2 * i;
  }

  VF_DEVICE static void key_fragment(u32 (&b)[4], const char* shared, int step, int lane) {
    const int index = step / 2 * 4 + lane % 4, first = step % 2 * 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Unit& from = unit(shared, half * 8 + lane / 4, index);
      b[2 * half] = from.word[first];
      b[2 * half + 1] = from.word[first + 1];
    }
  }

  // Column n of an output tile is a dimension of unit n of every eight; four steps share a unit, and
  // the tiles of a step are its lower and its upper halves of 32 bits. A lane's pair of outputs starts
  // at (step / 4 * 8 + 2 * quad + i) * 8 + step % 4 * 2; in a row of sums, pairs of a step lie together
  // so that lanes write to different banks.
  VF_DEVICE static int pair_slot(int step, int i, int quad) { return (step * 2 + i) * 8 + 2 * quad; }
  VF_DEVICE static int slot(int d) {
    const int unit = d / 8 % 8;
    return pair_slot(d / 64 * 4 + d % 8 / 2, unit % 2, unit / 2);
  }

  VF_DEVICE static void value_fragment(u32 (&b)[4], const char* shared, int step, int lane) {
    const int index = step / 4 * 8 + lane / 4, at = step % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = half * 8 + lane % 4 * 2;
      const u32 first = unit(shared, key, index).word[at];
      const u32 second = unit(shared, key + 1, index).word[at];
      b[half] = (first & 0xffffu) | second << 16;
      b[2 + half] = first >> 16 | (second & 0xffff0000u);
    }
  }

  VF_DEVICE static void output_pair(const float (&tiles)[2][4], int i, int half, float& x, float& y) {
    x = tiles[0][2 * half + i];
    y = tiles[1][2 * half + i];
  }
};

}  // namespace vf
