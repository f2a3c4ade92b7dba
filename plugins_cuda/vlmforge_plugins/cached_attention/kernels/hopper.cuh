// Hopper's own instructions (sm_90a): warpgroup products from shared memory, and the barriers with
// which a producer of tiles and its consumers wait for each other. As device.cuh, a host compiler
// finds scalar versions of all this in host_hopper.h.
#pragma once

#include "params.h"

namespace vf {

// Where a 16-bit operand lies in shared memory: rows of 128 bytes whose 16-byte units are swizzled
// (unit ^= row % 8), eight rows to a group of 1024 bytes, at a multiple of 1024.
//   K-major (keys for the scores): rows are the operand's columns n; `leading` is not used.
//   MN-major (values for the output): rows are its k; `leading` bytes lead to the next 64 columns.
// https://docs.nvidia.com/cuda/parallel-thread-execution/#asynchronous-warpgroup-level-matrix-shared-memory-layout
VF_DEVICE u64 operand(u32 address, int leading) {
  constexpr u64 kSwizzle128 = u64{1} << 62;
  constexpr u64 kGroupBytes = u64{1024 >> 4} << 32;
  return kSwizzle128 | kGroupBytes | static_cast<u64>((leading >> 4) & 0x3fff) << 16 |
         ((address >> 4) & 0x3fff);
}

}  // namespace vf

#if defined(__CUDACC__)

namespace vf {

// c[64 x N] = a[64 x 16] b[16 x N] (+ c if `keep`); b by operand(), TRANSPOSED if it is MN-major.
// Asynchronous: neither c nor a may be touched until products_wait.
template <class T, int N, int TRANSPOSED>
VF_DEVICE void product(float (&c)[N / 8][4], const u32 (&a)[4], u64 b, int keep) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VF_TILE(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define VF_TILES8                                                                    \
  VF_TILE(0), VF_TILE(1), VF_TILE(2), VF_TILE(3), VF_TILE(4), VF_TILE(5), VF_TILE(6), VF_TILE(7)
#define VF_TILES10 VF_TILES8, VF_TILE(8), VF_TILE(9)
#define VF_TILES12 VF_TILES10, VF_TILE(10), VF_TILE(11)
#define VF_TILES13 VF_TILES12, VF_TILE(12)
#define VF_TILES16 VF_TILES13, VF_TILE(13), VF_TILE(14), VF_TILE(15)
#define VF_C32                                           \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define VF_C40 VF_C32 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define VF_C48 VF_C40 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define VF_C52 VF_C48 ",%48,%49,%50,%51"
#define VF_C64 VF_C52 ",%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
// The accumulators are the assembler's first operands; the numbers of the others follow from N.
#define VF_PRODUCT(WIDTH, TYPE, C, A, B, KEEP, MAJOR, ...)                                \
  asm volatile("{.reg .pred p; setp.ne.b32 p, " KEEP ", 0;"                               \
               "wgmma.mma_async.sync.aligned.m64n" #WIDTH "k16.f32." TYPE "." TYPE        \
               " {" C "}, {" A "}, " B ", p, 1, 1, " MAJOR ";}"                           \
               : __VA_ARGS__                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep), "n"(TRANSPOSED))
#define VF_WIDTH(WIDTH, ...)                                   \
  if constexpr (N == WIDTH && is_same<T, f16>::value) {        \
    VF_PRODUCT(WIDTH, "f16", __VA_ARGS__);                     \
  } else if constexpr (N == WIDTH) {                           \
    VF_PRODUCT(WIDTH, "bf16", __VA_ARGS__);                    \
  }
  VF_WIDTH(64, VF_C32, "%32,%33,%34,%35", "%36", "%37", "%38", VF_TILES8)
  VF_WIDTH(80, VF_C40, "%40,%41,%42,%43", "%44", "%45", "%46", VF_TILES10)
  VF_WIDTH(96, VF_C48, "%48,%49,%50,%51", "%52", "%53", "%54", VF_TILES12)
  VF_WIDTH(104, VF_C52, "%52,%53,%54,%55", "%56", "%57", "%58", VF_TILES13)
  VF_WIDTH(128, VF_C64, "%64,%65,%66,%67", "%68", "%69", "%70", VF_TILES16)
  static_assert(N == 64 || N == 80 || N == 96 || N == 104 || N == 128, "one of the widths above");
#undef VF_WIDTH
#undef VF_PRODUCT
#undef VF_TILE
#endif
}

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define VF_HOPPER(...) asm volatile(__VA_ARGS__)
#else
#define VF_HOPPER(...)
#endif
VF_DEVICE void products_begin() { VF_HOPPER("wgmma.fence.sync.aligned;" ::: "memory"); }
VF_DEVICE void products_commit() { VF_HOPPER("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
VF_DEVICE void products_wait() {
  VF_HOPPER("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Tells the compiler that a finished product has changed its accumulators.
template <int TILES>
VF_DEVICE void products_done(float (&c)[TILES][4]) {
#pragma unroll
  for (int i = 0; i < TILES; ++i) {
    asm volatile("" : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])::"memory");
  }
}
template <int REGISTERS>
VF_DEVICE void take_registers() {
  VF_HOPPER("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
template <int REGISTERS>
VF_DEVICE void give_registers() {
  VF_HOPPER("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}
VF_DEVICE int shuffle_from(int value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
// The first lane's value, so that the compiler knows it to be the same in the whole warp.
VF_DEVICE int uniform(int value) { return shuffle_from(value, 0); }
// True in one lane of a whole warp. Not `lane == 0`: of this the assembler knows that it is one, and
// issues a bulk copy once, not in a loop over lanes that might be there.
VF_DEVICE bool elect_one() {
  u32 chosen = 0;
  VF_HOPPER("{.reg .pred one; elect.sync _|one, 0xffffffff; @one mov.u32 %0, 1;}" : "+r"(chosen));
  return chosen != 0;
}
// Makes this thread's finished writes to shared memory visible to products.
VF_DEVICE void publish_shared() { VF_HOPPER("fence.proxy.async.shared::cta;" ::: "memory"); }

VF_DEVICE void barrier_init(u64* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals)
               : "memory");
}
// Makes fresh barriers known to bulk copies.
VF_DEVICE void publish_barriers() {
  VF_HOPPER("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and puts the phase's end off until `bytes` have come.
VF_DEVICE void barrier_expect(u64* barrier, int bytes) {
  VF_HOPPER("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
            "r"(bytes) : "memory");
}
// Copies a contiguous run to shared memory; both ends and `bytes` are multiples of 16. If it is read
// ONCE, the L2 cache need not keep it.
template <bool ONCE>
VF_DEVICE void copy_bulk(void* shared, const void* global, int bytes, u64* barrier) {
  if constexpr (!ONCE) {
    VF_HOPPER("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
              ::"r"(shared_address(shared)), "l"(global), "r"(bytes), "r"(shared_address(barrier))
              : "memory");
    return;
  }
  VF_HOPPER(
      "{.reg .b64 once; createpolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], once;}" ::"r"(shared_address(shared)), "l"(global), "r"(bytes),
      "r"(shared_address(barrier)) : "memory");
}
// Copies a box that starts at (column, row) to shared memory, at a multiple of 1024 bytes. What lies
// outside of the tensor becomes zeroes, and counts.
VF_DEVICE void copy_tile(void* shared, const TileMap* map, int column, int row, u64* barrier) {
  VF_HOPPER(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(shared)), "l"(map), "r"(column), "r"(row),
      "r"(shared_address(barrier)) : "memory");
}
VF_DEVICE void barrier_arrive(u64* barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Waits for the end of the phase of this parity. A fresh barrier is in phase 0: a wait for parity 1
// passes at once.
VF_DEVICE void barrier_wait(u64* barrier, int parity) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;}" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
#endif
}

}  // namespace vf

#else
#include "host_hopper.h"
#endif
