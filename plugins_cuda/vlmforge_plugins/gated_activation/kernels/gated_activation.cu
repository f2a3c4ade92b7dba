// out[r, i] = act(given[r, i]) * given[r, width + i], in fp32 and rounded once: SwiGLU and GEGLU
// (https://arxiv.org/abs/2002.05202).
//
//   vf_silu_f16, vf_silu_bf16             act(x) = x * sigmoid(x)
//   vf_gelu_f16, vf_gelu_bf16             act(x) = x * Phi(x)
//   vf_gelu_tanh_f16, vf_gelu_tanh_bf16   its approximation by tanh (https://arxiv.org/abs/1606.08415)
//
// Memory sets the pace: each thread has four loads of 16 bytes on their way.
#include "math.cuh"

namespace vf {

constexpr int kThreads = 128;
constexpr int kGroups = 2;  // of a thread
constexpr u32 kItems = 8;   // of a group: 16 bytes

// What a launch is told. Mirrored field by field in launcher.py; a test compares the offsets.
struct Params {
  const u16* given;       // [rows, 2 * width]
  u16* out;               // [rows, width]
  u32 width, row_groups;  // of a row of `out`: its items, and its groups of kItems, the last one cut
  u32 groups;             // of all rows
};

constexpr float kLog2E = 1.4426950408889634f;

struct Silu {
  VF_DEVICE static float of(float x) { return x / (1.f + exp2_approx(-kLog2E * x)); }
};
struct Gelu {
  // By erfc, which is exact where 1 + erf would be a difference of two that are nearly equal.
  VF_DEVICE static float of(float x) { return 0.5f * x * erfc_of(-0.7071067811865476f * x); }
};
struct GeluTanh {  // 1 + tanh(u) = 2 * sigmoid(2 * u)
  VF_DEVICE static float of(float x) {
    const float u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    return x / (1.f + exp2_approx(-2.f * kLog2E * u));
  }
};

template <class T, class ACT>
VF_DEVICE u32 gate2(u32 gate, u32 up) {
  float low, high, up_low, up_high;
  unpack2<T>(gate, low, high);
  unpack2<T>(up, up_low, up_high);
  return pack2<T>(ACT::of(low) * up_low, ACT::of(high) * up_high);
}

VF_DEVICE u32x4 load(const u16* from) { return *reinterpret_cast<const u32x4*>(from); }

// Groups of rows that are whole numbers of groups: all are aligned to 16 bytes.
template <class T, class ACT>
VF_DEVICE void gate_groups(const Params& p, u32 first) {
  u32x4 gate[kGroups], up[kGroups];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const u32 group = first + i * kThreads;
    if (group >= p.groups) break;
    const u32 row = group / p.row_groups, column = (group - row * p.row_groups) * kItems;
    const u16* from = p.given + u64{row} * 2 * p.width + column;
    gate[i] = load(from);
    up[i] = load(from + p.width);
  }
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const u32 group = first + i * kThreads;
    if (group >= p.groups) break;
    *reinterpret_cast<u32x4*>(p.out + u64{group} * kItems) = {
        gate2<T, ACT>(gate[i].x, up[i].x), gate2<T, ACT>(gate[i].y, up[i].y),
        gate2<T, ACT>(gate[i].z, up[i].z), gate2<T, ACT>(gate[i].w, up[i].w)};
  }
}

// Groups of other rows, item by item.
template <class T, class ACT>
VF_DEVICE void gate_items(const Params& p, u32 first) {
  for (int i = 0; i < kGroups; ++i) {
    const u32 group = first + i * kThreads;
    if (group >= p.groups) return;
    const u32 row = group / p.row_groups, column = (group - row * p.row_groups) * kItems;
    const u16* from = p.given + u64{row} * 2 * p.width;
    u16* to = p.out + u64{row} * p.width;
    for (u32 at = column; at < column + kItems && at < p.width; ++at) {
      to[at] = static_cast<u16>(gate2<T, ACT>(from[at], from[p.width + at]));
    }
  }
}

template <class T, class ACT>
VF_DEVICE void gate(const Params& p) {
  wait_for_previous_kernel();
  const u32 first = static_cast<u32>(block_x()) * kGroups * kThreads + thread_index();
  if (p.width % kItems == 0) {
    gate_groups<T, ACT>(p, first);
  } else {
    gate_items<T, ACT>(p, first);
  }
}

}  // namespace vf

#if defined(VF_NAME)  // this one only
VF_KERNEL(vf::kThreads, 1) VF_NAME(VF_PARAMS p) { vf::gate<vf::VF_TYPE, vf::VF_ACTIVATION>(p); }
#else
VF_KERNEL(vf::kThreads, 1) vf_silu_f16(VF_PARAMS p) { vf::gate<vf::f16, vf::Silu>(p); }
VF_KERNEL(vf::kThreads, 1) vf_silu_bf16(VF_PARAMS p) { vf::gate<vf::bf16, vf::Silu>(p); }
VF_KERNEL(vf::kThreads, 1) vf_gelu_f16(VF_PARAMS p) { vf::gate<vf::f16, vf::Gelu>(p); }
VF_KERNEL(vf::kThreads, 1) vf_gelu_bf16(VF_PARAMS p) { vf::gate<vf::bf16, vf::Gelu>(p); }
VF_KERNEL(vf::kThreads, 1) vf_gelu_tanh_f16(VF_PARAMS p) { vf::gate<vf::f16, vf::GeluTanh>(p); }
VF_KERNEL(vf::kThreads, 1) vf_gelu_tanh_bf16(VF_PARAMS p) { vf::gate<vf::bf16, vf::GeluTanh>(p); }
#endif
