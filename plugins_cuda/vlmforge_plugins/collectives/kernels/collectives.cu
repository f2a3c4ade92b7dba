// Sums over the GPUs of one host, and what they have side by side, each by one launch on every GPU.
//
//   vf_sum_f16, vf_sum_bf16, vf_sum_f32   out = the sum, in fp32 and in the order of the ranks: the
//                                         same bits everywhere
//   vf_gather_16, vf_gather_32            out = the ranks' columns one after the other, of 16 or 32 bits
//   vf_norm_*                             out = a sum that is made and what is added to it; its RMS norm
//   vf_sum_norm_*                         the same, of the sum that is made here
// The last may be launched to start while the kernel in front of them ends, where the machine can.
#if defined(__CUDA_ARCH__)
#define VF_OVERLAP (__CUDA_ARCH__ >= 900)
#endif
#include "sum_norm.cuh"

namespace vf {

template <class T>
VF_DEVICE void sum(const Params& p) {
  constexpr int kCount = 8 / sizeof(T);
  Lanes lanes(p);
  for (u32 group = lanes.begin(); group < lanes.end(); group += kThreads) {
    lanes.give(group, load_group<sizeof(T)>(p, group));
  }
  for (u32 group = lanes.begin(); group < lanes.end(); group += kThreads) {
    u32x2 given[kMostRanks];
    lanes.take(group, given);
    const u32x2 own = load_group<sizeof(T)>(p, group);
    float total[kCount] = {};
#pragma unroll
    for (int rank = 0; rank < kMostRanks; ++rank) {
      if (rank >= p.size) break;
      float part[kCount];
      widen_group<T>(rank == p.rank ? own : given[rank], part);
#pragma unroll
      for (int i = 0; i < kCount; ++i) total[i] = rank == 0 ? part[i] : total[i] + part[i];
    }
    store_group<sizeof(T)>(p, group, narrow_group<T>(total));
  }
  lanes.done();
}

// One rank's group of rows of `width` to its place in rows of `kept`; what is padded falls away.
template <int BYTES>
VF_DEVICE void place_group(const Params& p, int rank, u32 group, u32x2 bits) {
  using Bits = typename Item<BYTES>::Bits;
  constexpr u32 kCount = 8 / BYTES;
  const u32 item = group * kCount, before = rank * p.width;
  u32 row = item / p.width, column = item % p.width;
  Bits* out = static_cast<Bits*>(p.out);
  if (p.width % kCount == 0 && p.kept % kCount == 0) {
    if (before + column >= p.kept) return;
    *reinterpret_cast<u32x2*>(out + u64{row} * p.kept + before + column) = bits;
    return;
  }
  Bits items[kCount];
  unpack_group<BYTES>(bits, items);
  for (u32 i = 0; i < kCount && item + i < p.items; ++i) {
    if (before + column < p.kept) out[u64{row} * p.kept + before + column] = items[i];
    if (++column == p.width) column = 0, ++row;
  }
}

template <int BYTES>
VF_DEVICE void gather(const Params& p) {
  Lanes lanes(p);
  for (u32 group = lanes.begin(); group < lanes.end(); group += kThreads) {
    lanes.give(group, load_group<BYTES>(p, group));
  }
  for (u32 group = lanes.begin(); group < lanes.end(); group += kThreads) {
    u32x2 given[kMostRanks];
    lanes.take(group, given);
    const u32x2 own = load_group<BYTES>(p, group);
#pragma unroll
    for (int rank = 0; rank < kMostRanks; ++rank) {
      if (rank >= p.size) break;
      place_group<BYTES>(p, rank, group, rank == p.rank ? own : given[rank]);
    }
  }
  lanes.done();
}

}  // namespace vf

VF_KERNEL(vf::kThreads, 1) vf_sum_f16(VF_PARAMS p) { vf::sum<vf::f16>(p); }
VF_KERNEL(vf::kThreads, 1) vf_sum_bf16(VF_PARAMS p) { vf::sum<vf::bf16>(p); }
VF_KERNEL(vf::kThreads, 1) vf_sum_f32(VF_PARAMS p) { vf::sum<float>(p); }
VF_KERNEL(vf::kThreads, 1) vf_gather_16(VF_PARAMS p) { vf::gather<2>(p); }
VF_KERNEL(vf::kThreads, 1) vf_gather_32(VF_PARAMS p) { vf::gather<4>(p); }
VF_KERNEL(vf::kThreads, 1) vf_sum_norm_f16(VF_PARAMS p) { vf::sum_norm<vf::f16>(p); }
VF_KERNEL(vf::kThreads, 1) vf_sum_norm_bf16(VF_PARAMS p) { vf::sum_norm<vf::bf16>(p); }
VF_KERNEL(vf::kThreads, 1) vf_sum_norm_f32(VF_PARAMS p) { vf::sum_norm<float>(p); }
VF_KERNEL(vf::kThreads, 1) vf_norm_f16(VF_PARAMS p) { vf::norm<vf::f16>(p); }
VF_KERNEL(vf::kThreads, 1) vf_norm_bf16(VF_PARAMS p) { vf::norm<vf::bf16>(p); }
VF_KERNEL(vf::kThreads, 1) vf_norm_f32(VF_PARAMS p) { vf::norm<float>(p); }
