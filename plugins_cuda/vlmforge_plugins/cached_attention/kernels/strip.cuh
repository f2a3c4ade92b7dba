// A strip: 16 consecutive keys (or values) of one head, the unit in which the pool is read.
//
// Pages hold a multiple of 16 tokens, so a strip never straddles two pages and is one contiguous run
// of 16 x D elements in global memory: one block-table entry and fully coalesced copies per strip.
// In shared memory its rows are padded to an odd number of 16-byte units, which makes the eight rows
// of an ldmatrix fall into different banks.
#pragma once

#include "params.h"

namespace vf {

constexpr int kStripKeys = 16;

// Act: f16 or bf16, the type of the mma operands. Kv: Act, or e4m3, converted as fragments are made.
template <class Act_, class Kv_, int D_, int PITCH = 0>
struct Strip {
  using Act = Act_;
  using Kv = Kv_;
  static constexpr int D = D_;
  static constexpr bool kBulk = false;  // whether bulk copies bring it, see bulk_strip.cuh
  static constexpr bool kFp8 = is_same<Kv, e4m3>::value;
  static constexpr int kSteps = (D + 15) / 16;  // groups of 16 head dimensions, the last may be half
  static constexpr int kRowBytes = D * static_cast<int>(sizeof(Kv));
  static constexpr int kCopy = kRowBytes % 16 == 0 ? 16 : 8;
  static constexpr int kCopies = kRowBytes / kCopy;  // per row
  static constexpr int kPitch =
      PITCH > 0 ? PITCH : ((kSteps * static_cast<int>(sizeof(Kv))) | 1) * 16;
  static constexpr int kBytes = kStripKeys * kPitch;
  static_assert(D % 8 == 0, "rows are copied in units of 8 elements");

  // One warp copies a strip; rows from `rows` on become zeroes: what lies there in the pool is
  // arbitrary (0 x NaN would reach the output through the second product).
  VF_DEVICE static void load(char* shared, const Kv* strip, int rows, int lane) {
    const char* source = reinterpret_cast<const char*>(strip);
#pragma unroll
    for (int i = 0; i < (kStripKeys * kCopies + 31) / 32; ++i) {
      const int unit = lane + 32 * i;
      if (kStripKeys * kCopies % 32 != 0 && unit >= kStripKeys * kCopies) break;
      const int row = unit / kCopies;
      copy_async<kCopy>(shared + row * kPitch + unit % kCopies * kCopy, source + unit * kCopy,
                        row < rows);
    }
  }

  // Zeroes for the dimensions that pad D to whole steps; copies never touch them. By one warp.
  VF_DEVICE static void clear_padding(char* shared, int lane) {
    if constexpr (kRowBytes < kPitch) {
      constexpr int kWords = (kPitch - kRowBytes) / 4;
      for (int i = lane; i < kStripKeys * kWords; i += 32) {
        *reinterpret_cast<u32*>(shared + i / kWords * kPitch + kRowBytes + i % kWords * 4) = 0;
      }
    }
  }

  // First of the two head dimensions in operand register pair `i` of a step, for a lane's
  // `quad` = lane % 4. A product does not care in which order it meets the dimensions, and bytes
  // come out of ldmatrix in another order than 16-bit elements; query and output follow it.
  VF_DEVICE static int pair_dim(int step, int i, int quad) {
    return step * 16 + (kFp8 ? 4 * quad + 2 * i : 8 * i + 2 * quad);
  }

  // Where the pair of outputs that output_pair gives lies in a row of sums, and where dimension d does.
  VF_DEVICE static int pair_slot(int step, int i, int quad) { return pair_dim(step, i, quad); }
  VF_DEVICE static int slot(int d) { return d; }

  // B operands of scores += Q K^T: b[0..1] for keys 0-7, b[2..3] for keys 8-15.
  VF_DEVICE static void key_fragment(u32 (&b)[4], const char* shared, int step, int lane) {
    if constexpr (kFp8) {
      u32 r[2];
      load_matrix_x2(r, shared + lane % 16 * kPitch + step * 16);
      b[0] = e4m3_pair<Act, 0, 1>(r[0]);
      b[1] = e4m3_pair<Act, 2, 3>(r[0]);
      b[2] = e4m3_pair<Act, 0, 1>(r[1]);
      b[3] = e4m3_pair<Act, 2, 3>(r[1]);
    } else {
      const int row = lane / 16 * 8 + lane % 8;
      load_matrix_x4(b, shared + row * kPitch + step * 32 + lane / 8 % 2 * 16);
    }
  }

  // B operands of out += P V: b[0..1] and b[2..3] for the two output tiles of a step.
  VF_DEVICE static void value_fragment(u32 (&b)[4], const char* shared, int step, int lane) {
    if constexpr (kFp8) {  // a transposed unit of 16 bits holds two dimensions of one key
      u32 r[2];
      load_matrix_x2_transposed(r, shared + lane % 16 * kPitch + step * 16);
      b[0] = e4m3_pair<Act, 0, 2>(r[0]);
      b[1] = e4m3_pair<Act, 0, 2>(r[1]);
      b[2] = e4m3_pair<Act, 1, 3>(r[0]);
      b[3] = e4m3_pair<Act, 1, 3>(r[1]);
    } else {
      load_matrix_x4_transposed(b, shared + lane % 16 * kPitch + step * 32 + lane / 16 * 16);
    }
  }

  // The two neighbouring outputs that start at pair_dim(step, i, quad), from the step's two tiles.
  VF_DEVICE static void output_pair(const float (&tiles)[2][4], int i, int half, float& x, float& y) {
    x = kFp8 ? tiles[0][2 * half + i] : tiles[i][2 * half];
    y = kFp8 ? tiles[1][2 * half + i] : tiles[i][2 * half + 1];
  }

  // Start of the strip of `head` that holds token `key` of a sequence whose pages are `pages`.
  VF_DEVICE static const Kv* find(const void* pool, const Params& p, int page, int head, int key) {
    const i64 row = ((static_cast<i64>(page) * p.kv_heads + head) << p.page_shift) +
                    (key & ((1 << p.page_shift) - 1));
    return static_cast<const Kv*>(pool) + row * D;
  }
};

}  // namespace vf
