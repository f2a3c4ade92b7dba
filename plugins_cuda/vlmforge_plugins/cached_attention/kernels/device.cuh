// The only door from the kernels to the hardware.
//
// Kernels call the functions below and nothing else: no toolkit header, no intrinsic, no built-in
// variable. So the same lines compile with nvcc, with NVRTC (which then needs no include folder of a
// toolkit), and with a host compiler, for which the including build supplies `host_device.h` with
// scalar versions of everything behind the `#else`.
#pragma once

namespace vf {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

// Storage types: bits without arithmetic. Arithmetic is in fp32, after unpack2.
struct f16 { u16 bits; };
struct bf16 { u16 bits; };
struct e4m3 { u8 bits; };

struct alignas(8) u32x2 { u32 x, y; };
struct alignas(16) u32x4 { u32 x, y, z, w; };
struct alignas(8) f32x2 { float x, y; };
struct alignas(16) f32x4 { float x, y, z, w; };

template <class A, class B> struct is_same { static constexpr bool value = false; };
template <class A> struct is_same<A, A> { static constexpr bool value = true; };

}  // namespace vf

#if defined(__CUDACC__)

#define VF_DEVICE __device__ __forceinline__
#define VF_KERNEL(THREADS, BLOCKS) extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
#define VF_PARAMS const __grid_constant__ vf::Params

namespace vf {

VF_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
VF_DEVICE int block_x() { return static_cast<int>(blockIdx.x); }
VF_DEVICE int block_y() { return static_cast<int>(blockIdx.y); }
VF_DEVICE int block_z() { return static_cast<int>(blockIdx.z); }
VF_DEVICE int grid_x() { return static_cast<int>(gridDim.x); }
VF_DEVICE int grid_y() { return static_cast<int>(gridDim.y); }

VF_DEVICE char* shared_memory() {
  extern __shared__ __align__(1024) char vf_dynamic_shared[];
  return vf_dynamic_shared;
}

VF_DEVICE void sync_threads() { __syncthreads(); }
VF_DEVICE void sync_warp() { __syncwarp(); }
VF_DEVICE float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

VF_DEVICE u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Asynchronous copy of BYTES (8 or 16) from global to shared memory; zeroes if not `valid`.
template <int BYTES>
VF_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  const u32 size = valid ? BYTES : 0;
  if constexpr (BYTES == 16) {  // .cg: past L1, for nobody else on this SM reads these lines
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                     shared_address(shared)), "l"(global), "r"(size) : "memory");
  } else {
    static_assert(BYTES == 8, "copies of 8 or 16 bytes");
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(shared)),
                 "l"(global), "r"(size) : "memory");
  }
}
VF_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most PENDING of this thread's newest groups are still on their way.
template <int PENDING>
VF_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four (two) 8x8 matrices of 16-bit elements; lane i gives the address of row i.
VF_DEVICE void load_matrix_x4(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row))
               : "memory");
}
VF_DEVICE void load_matrix_x4_transposed(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row))
               : "memory");
}
VF_DEVICE void load_matrix_x2(u32 (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}
VF_DEVICE void load_matrix_x2_transposed(u32 (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}

// c[16x8] += a[16x16] b[16x8], accumulated in fp32.
template <class T>
VF_DEVICE void mma_16816(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  if constexpr (is_same<T, f16>::value) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Reads past L1, which does not see what other multiprocessors write.
VF_DEVICE float load_l2(const float* from) {
  float x;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(x) : "l"(from) : "memory");
  return x;
}
VF_DEVICE f32x2 load_l2_pair(const float* from) {
  f32x2 pair;
  asm volatile("ld.global.cg.v2.f32 {%0,%1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "l"(from)
               : "memory");
  return pair;
}
VF_DEVICE f32x4 load_l2_quad(const float* from) {
  f32x4 quad;
  asm volatile("ld.global.cg.v4.f32 {%0,%1,%2,%3}, [%4];"
               : "=f"(quad.x), "=f"(quad.y), "=f"(quad.z), "=f"(quad.w) : "l"(from) : "memory");
  return quad;
}
VF_DEVICE void prefetch_l2(const void* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}
// Adds one and returns what was there before. Who sees that sees what came before it, on any
// multiprocessor.
VF_DEVICE int arrive_device(int* at) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(at) : "memory");
  return before;
}

// The same without the order.
VF_DEVICE int count_device(int* at) {
  int before;
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(at) : "memory");
  return before;
}

// Programmatic dependent launch (sm_90): a kernel that was launched to overlap starts when all blocks
// of the one in front of it have said so (or ended), and runs ahead until it waits: for that kernel's
// end and for all that it wrote. Every block waits, so that its own end implies theirs.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#parallel-synchronization-and-communication-instructions-griddepcontrol
VF_DEVICE void start_next_kernel() {
#if VF_OVERLAP
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
VF_DEVICE void wait_for_previous_kernel() {
#if VF_OVERLAP
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

VF_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VF_DEVICE float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
VF_DEVICE float max_of(float a, float b) { return fmaxf(a, b); }
VF_DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

// Two floats as two 16-bit elements, `low` in the lower half; and back.
template <class T>
VF_DEVICE u32 pack2(float low, float high) {
  u32 packed;
  if constexpr (is_same<T, f16>::value) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}
template <class T>
VF_DEVICE void unpack2(u32 packed, float& low, float& high) {
  if constexpr (is_same<T, f16>::value) {
    asm("{.reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b;}"
        : "=f"(low), "=f"(high) : "r"(packed));
  } else {  // bf16 is the upper half of an fp32
    low = __uint_as_float(packed << 16);
    high = __uint_as_float(packed & 0xffff0000u);
  }
}

// fp8 E4M3 (needs sm_89): four floats to four bytes, rounded to nearest and saturated at 448.
VF_DEVICE u32 pack4_e4m3(float a, float b, float c, float d) {
  u16 low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
  return static_cast<u32>(low) | (static_cast<u32>(high) << 16);
}
// Bytes `i` and `j` of `packed` as two 16-bit elements. Exact: E4M3 is a subset of both types.
template <class T, int I, int J>
VF_DEVICE u32 e4m3_pair(u32 packed) {
  const u16 bytes = static_cast<u16>(__byte_perm(packed, 0, 0x4400 | (J << 4) | I));
  u32 halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(bytes));
  if constexpr (is_same<T, f16>::value) {
    return halves;
  } else {
    float low, high;
    unpack2<f16>(halves, low, high);
    return pack2<bf16>(low, high);
  }
}

}  // namespace vf

#else
#include "host_device.h"
#endif
