// What the choice of tokens needs of the hardware beside device.cuh.
#pragma once

#include "device.cuh"

#if defined(__CUDACC__)

namespace vf {

VF_DEVICE float from_bits(u32 bits) { return __uint_as_float(bits); }
VF_DEVICE u32 to_bits(float x) { return __float_as_uint(x); }
VF_DEVICE u64 double_bits(double x) { return static_cast<u64>(__double_as_longlong(x)); }
VF_DEVICE double double_from(u64 bits) { return __longlong_as_double(static_cast<i64>(bits)); }

VF_DEVICE double exp_of(double x) { return exp(x); }
VF_DEVICE double log_of(double x) { return log(x); }

// Of all threads of a warp.
VF_DEVICE u32 warp_add(u32 value) { return __reduce_add_sync(0xffffffffu, value); }
VF_DEVICE u32 warp_least(u32 value) { return __reduce_min_sync(0xffffffffu, value); }
VF_DEVICE u32 warp_most(u32 value) { return __reduce_max_sync(0xffffffffu, value); }
VF_DEVICE u32 shuffle_word(u32 value, u32 lane) {
  return __shfl_sync(0xffffffffu, value, static_cast<int>(lane));
}

// On words in shared memory.
VF_DEVICE u32 add_shared(u32* at, u32 value) { return atomicAdd(at, value); }
VF_DEVICE void or_shared(u32* at, u32 value) { atomicOr(at, value); }

}  // namespace vf

#else
#include "host_words.h"
#endif
