// Attention with a running softmax on tensor cores, as one warp sees it (the scheme of
// FlashAttention-2, https://arxiv.org/abs/2307.08691): 16 x TILES query rows against STRIPS strips of
// keys at a time. Lane l holds, of every 16-row tile, rows g = l / 4 and g + 8, "halves" 0 and 1.
#pragma once

#include "strip.cuh"

namespace vf {

template <class S, int TILES, int STRIPS>
struct Flash {
  using Act = typename S::Act;
  u32 query[TILES][S::kSteps][4];
  float out[TILES][S::kSteps][2][4];
  float maximum[TILES][2];  // of the raw scores so far
  float sum[TILES][2];      // of this lane's exp2; lanes of a row are added up in finish()

  VF_DEVICE Flash() {
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        maximum[m][h] = minus_infinity();
        sum[m][h] = 0.f;
      }
#pragma unroll
      for (int d = 0; d < S::kSteps; ++d) {
#pragma unroll
        for (int c = 0; c < 8; ++c) out[m][d][c / 4][c % 4] = 0.f;
      }
    }
  }

  // Row `half` of tile m from memory, straight into operand registers; null is a row of zeroes.
  VF_DEVICE void load_query(int m, int half, const Act* row, int lane) {
#pragma unroll
    for (int d = 0; d < S::kSteps; ++d) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int dim = S::pair_dim(d, i, lane % 4);
        const bool there = row != nullptr && (S::D % 16 == 0 || dim < S::D);
        query[m][d][2 * i + half] = there ? *reinterpret_cast<const u32*>(row + dim) : 0u;
      }
    }
  }

  using Scores = float[TILES][2 * STRIPS][4];

  VF_DEVICE void score(Scores& s, const char* keys, int lane) const {
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
      for (int n = 0; n < 8 * STRIPS; ++n) s[m][n / 4][n % 4] = 0.f;
    }
#pragma unroll
    for (int d = 0; d < S::kSteps; ++d) {
#pragma unroll
      for (int n = 0; n < STRIPS; ++n) {
        u32 b[4];
        S::key_fragment(b, keys + n * S::kBytes, d, lane);
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
          mma_16816<Act>(s[m][2 * n], query[m][d], b[0], b[1]);
          mma_16816<Act>(s[m][2 * n + 1], query[m][d], b[2], b[3]);
        }
      }
    }
  }

  // Hides keys after `last` (a token's index, by half) when the first key of `s` is token `first`.
  VF_DEVICE static void mask(Scores& s, int m, int half, int first, int last, int lane) {
#pragma unroll
    for (int n = 0; n < 2 * STRIPS; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        if (first + 8 * n + 2 * (lane % 4) + c > last) s[m][n][2 * half + c] = minus_infinity();
      }
    }
  }

  // One row's scores to probabilities (relative to its running maximum). Returns the factor by which
  // what was summed up with the old maximum shrinks.
  VF_DEVICE float soften_row(Scores& s, int m, int h, float scale_log2) {
    float top = maximum[m][h];
#pragma unroll
    for (int n = 0; n < 2 * STRIPS; ++n) {
      top = max_of(top, max_of(s[m][n][2 * h], s[m][n][2 * h + 1]));
    }
    top = max_of(top, shuffle_xor(top, 1));
    top = max_of(top, shuffle_xor(top, 2));
    // A row that has met no visible key yet: keep inf - inf out of it.
    const float base = top == minus_infinity() ? 0.f : top * scale_log2;
    const float shrink = exp2_approx(maximum[m][h] * scale_log2 - base);
    maximum[m][h] = top;
    float added = 0.f;
#pragma unroll
    for (int n = 0; n < 2 * STRIPS; ++n) {
#pragma unroll
      for (int c = 2 * h; c < 2 * h + 2; ++c) {
        s[m][n][c] = exp2_approx(s[m][n][c] * scale_log2 - base);
        added += s[m][n][c];
      }
    }
    sum[m][h] = sum[m][h] * shrink + added;
    return shrink;
  }

  VF_DEVICE void soften(Scores& s, float scale_log2) {
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float shrink = soften_row(s, m, h, scale_log2);
#pragma unroll
        for (int d = 0; d < S::kSteps; ++d) {
#pragma unroll
          for (int c = 0; c < 4; ++c) out[m][d][c / 2][2 * h + c % 2] *= shrink;
        }
      }
    }
  }

  VF_DEVICE void accumulate(const Scores& s, const char* values, int lane) {
#pragma unroll
    for (int n = 0; n < STRIPS; ++n) {
      // The accumulators of two score tiles are, rounded, the A operand of the second product.
      u32 a[TILES][4];
#pragma unroll
      for (int m = 0; m < TILES; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float(&tile)[4] = s[m][2 * n + i / 2];
          a[m][i] = pack2<Act>(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int d = 0; d < S::kSteps; ++d) {
        u32 b[4];
        S::value_fragment(b, values + n * S::kBytes, d, lane);
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
          mma_16816<Act>(out[m][d][0], a[m], b[0], b[1]);
          mma_16816<Act>(out[m][d][1], a[m], b[2], b[3]);
        }
      }
    }
  }

  // Adds the lanes' shares of the rows' sums.
  VF_DEVICE void finish() {
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum[m][h] += shuffle_xor(sum[m][h], 1);
        sum[m][h] += shuffle_xor(sum[m][h], 2);
      }
    }
  }
};

}  // namespace vf
