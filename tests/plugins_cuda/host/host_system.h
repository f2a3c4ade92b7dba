// Scalar versions of what system.cuh gives the kernels on a GPU.
#pragma once

#include <atomic>
#include <chrono>
#include <cmath>
#include <thread>

namespace vf_host {

// A word of which tests ask how often it was looked at.
inline const void* watched = nullptr;
inline int looks = 0;

}  // namespace vf_host

namespace vf {

VF_DEVICE void store_system_pair(u32x4* to, u64 low, u64 high) {
  auto* words = reinterpret_cast<u64*>(to);
  __atomic_store_n(words, low, __ATOMIC_RELAXED);
  __atomic_store_n(words + 1, high, __ATOMIC_RELAXED);
}
VF_DEVICE void load_system_pair(const u32x4* from, u64& low, u64& high) {
  static thread_local int looks = 0;
  // The other rank may want this processor, and so may others.
  if (++looks % 1024 == 0) {
    std::this_thread::sleep_for(std::chrono::microseconds(10));
  } else if (looks % 64 == 0) {
    std::this_thread::yield();
  }
  const auto* words = reinterpret_cast<const u64*>(from);
  low = __atomic_load_n(words, __ATOMIC_RELAXED);
  high = __atomic_load_n(words + 1, __ATOMIC_RELAXED);
}
VF_DEVICE void store_system(u32* to, u32 value) { __atomic_store_n(to, value, __ATOMIC_RELAXED); }
VF_DEVICE u32 load_system(const u32* from) {
  vf_host::looks += from == vf_host::watched;
  return __atomic_load_n(from, __ATOMIC_RELAXED);
}
VF_DEVICE u32 load_kept(const u32* from) { return *from; }
VF_DEVICE void store_kept(u32* to, u32 value) { *to = value; }
VF_DEVICE u64 nanoseconds() {
  return static_cast<u64>(std::chrono::steady_clock::now().time_since_epoch().count());
}
VF_DEVICE float inverse_root(float x) { return 1.0f / std::sqrt(x); }
VF_DEVICE void rest() {}  // see load_system_pair

}  // namespace vf
