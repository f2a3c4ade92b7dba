// Rotary embedding of one head: its halves rotate against each other (rotate-half).
#pragma once

#include "params.h"

namespace vf {

// A thread's item: four dimensions d..d+3 of the first half of a head and their partners in the second
// half, so D need only be a multiple of 8.
template <class Act, int D>
struct HeadPair {
  float x[4], y[4];

  VF_DEVICE HeadPair(const Act* head, int d) {
    const u32x2 first = *reinterpret_cast<const u32x2*>(head + d);
    const u32x2 second = *reinterpret_cast<const u32x2*>(head + D / 2 + d);
    unpack2<Act>(first.x, x[0], x[1]);
    unpack2<Act>(first.y, x[2], x[3]);
    unpack2<Act>(second.x, y[0], y[1]);
    unpack2<Act>(second.y, y[2], y[3]);
  }

  VF_DEVICE void rotate(const Params& p, int position, int d) {
    const f32x4 c = *reinterpret_cast<const f32x4*>(p.cos + static_cast<i64>(position) * (D / 2) + d);
    const f32x4 s = *reinterpret_cast<const f32x4*>(p.sin + static_cast<i64>(position) * (D / 2) + d);
    const float cosine[4] = {c.x, c.y, c.z, c.w};
    const float sine[4] = {s.x, s.y, s.z, s.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float turned = x[i] * cosine[i] - y[i] * sine[i];
      y[i] = y[i] * cosine[i] + x[i] * sine[i];
      x[i] = turned;
    }
  }

  template <class T>
  VF_DEVICE void store(T* head, int d, float inverse_scale) const {
    put(head + d, x, inverse_scale);
    put(head + D / 2 + d, y, inverse_scale);
  }

 private:
  template <class T>
  VF_DEVICE static void put(T* to, const float (&v)[4], float f) {
    if constexpr (is_same<T, e4m3>::value) {
      *reinterpret_cast<u32*>(to) = pack4_e4m3(v[0] * f, v[1] * f, v[2] * f, v[3] * f);
    } else {
      *reinterpret_cast<u32x2*>(to) = u32x2{pack2<T>(v[0], v[1]), pack2<T>(v[2], v[3])};
    }
  }
};

}  // namespace vf
