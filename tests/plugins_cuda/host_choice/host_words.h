// Scalar versions of what words.cuh gives the kernel on a GPU.
#pragma once

namespace vf {

VF_DEVICE u64 double_bits(double x) {
  u64 bits;
  std::memcpy(&bits, &x, 8);
  return bits;
}
VF_DEVICE double double_from(u64 bits) {
  double x;
  std::memcpy(&x, &bits, 8);
  return x;
}

VF_DEVICE double exp_of(double x) { return std::exp(x); }
VF_DEVICE double log_of(double x) { return std::log(x); }

// `OF` of all words of a warp, that each of its threads gets.
template <u32 (*OF)(u32, u32)>
VF_DEVICE u32 of_warp(u32 value) {
  u32 word = value;
  vf_host::warp_collective([](void* const* lanes) {
    u32 found = *static_cast<u32*>(lanes[0]);
    for (int i = 1; i < 32; ++i) found = OF(found, *static_cast<u32*>(lanes[i]));
    for (int i = 0; i < 32; ++i) *static_cast<u32*>(lanes[i]) = found;
  }, &word);
  return word;
}
VF_DEVICE u32 sum_of_two(u32 a, u32 b) { return a + b; }
VF_DEVICE u32 less_of_two(u32 a, u32 b) { return a < b ? a : b; }
VF_DEVICE u32 more_of_two(u32 a, u32 b) { return a > b ? a : b; }
VF_DEVICE u32 warp_add(u32 value) { return of_warp<sum_of_two>(value); }
VF_DEVICE u32 warp_least(u32 value) { return of_warp<less_of_two>(value); }
VF_DEVICE u32 warp_most(u32 value) { return of_warp<more_of_two>(value); }
VF_DEVICE u32 shuffle_word(u32 value, u32 lane) {
  return vf_host::shuffle(value, static_cast<int>(lane));
}

VF_DEVICE u32 add_shared(u32* at, u32 value) {
  const u32 before = *at;
  *at = before + value;
  return before;
}
VF_DEVICE void or_shared(u32* at, u32 value) { *at |= value; }

}  // namespace vf
