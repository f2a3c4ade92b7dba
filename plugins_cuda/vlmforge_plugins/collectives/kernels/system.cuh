// What the collectives need of the hardware beside device.cuh: words that other GPUs and the host see.
//
// Every access below is of 64 bits or less, relaxed, and of system scope: by PTX's memory model it is
// whole, and the two words of a pair are two such accesses.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#memory-consistency-model
#pragma once

#include "device.cuh"

#if defined(__CUDACC__)

namespace vf {

VF_DEVICE void store_system_pair(u32x4* to, u64 low, u64 high) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(to), "l"(low), "l"(high)
               : "memory");
}
VF_DEVICE void load_system_pair(const u32x4* from, u64& low, u64& high) {
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(low), "=l"(high) : "l"(from)
               : "memory");
}
VF_DEVICE void store_system(u32* to, u32 value) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
VF_DEVICE u32 load_system(const u32* from) {
  u32 value;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
  return value;
}
// A word that is needed again at the next meeting: it stays in the L2 cache, through which a decoder's
// weights run in between.
VF_DEVICE u64 kept_in_cache() {
  u64 policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
VF_DEVICE u32 load_kept(const u32* from) {
  u32 value;
  asm volatile("ld.global.L2::cache_hint.u32 %0, [%1], %2;" : "=r"(value)
               : "l"(from), "l"(kept_in_cache()) : "memory");
  return value;
}
VF_DEVICE void store_kept(u32* to, u32 value) {
  asm volatile("st.global.L2::cache_hint.u32 [%0], %1, %2;" ::"l"(to), "r"(value),
               "l"(kept_in_cache()) : "memory");
}
VF_DEVICE u64 nanoseconds() {
  u64 now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}
VF_DEVICE void rest() { __nanosleep(64); }
VF_DEVICE float inverse_root(float x) { return rsqrtf(x); }
VF_DEVICE float from_bits(u32 bits) { return __uint_as_float(bits); }
VF_DEVICE u32 to_bits(float x) { return __float_as_uint(x); }

}  // namespace vf

#else
#include "host_system.h"
#endif
