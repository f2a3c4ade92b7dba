// Scalar versions of what device.cuh gives the kernels on a GPU.
#pragma once

#include <cmath>

#include "fibres.h"

#define VF_DEVICE inline
#define VF_KERNEL(THREADS, BLOCKS) extern "C" void
#define VF_PARAMS const vf::Params&

namespace vf {

VF_DEVICE int thread_index() { return vf_host::self->index; }
VF_DEVICE int block_x() { return vf_host::block.x; }
VF_DEVICE int block_y() { return vf_host::block.y; }
VF_DEVICE int block_z() { return vf_host::block.z; }
VF_DEVICE int grid_x() { return vf_host::block.grid_x; }
VF_DEVICE int grid_y() { return vf_host::block.grid_y; }
VF_DEVICE char* shared_memory() { return vf_host::block.shared; }
VF_DEVICE u32 shared_address(const void* pointer) {
  return static_cast<u32>(static_cast<const char*>(pointer) - vf_host::block.shared);
}
VF_DEVICE void sync_threads() { vf_host::block_barrier(); }
VF_DEVICE void sync_warp() {
  vf_host::warp_collective([](void* const*) {}, nullptr);
}

VF_DEVICE float shuffle_xor(float value, int mask) {
  struct Lane { float value; int mask; float got; } lane{value, mask, 0.f};
  vf_host::warp_collective([](void* const* lanes) {
    for (int i = 0; i < 32; ++i) {
      auto* to = static_cast<Lane*>(lanes[i]);
      to->got = static_cast<Lane*>(lanes[i ^ to->mask])->value;
    }
  }, &lane);
  return lane.got;
}

template <int BYTES>
VF_DEVICE void copy_async(void* shared, const void* global, bool valid) {
  if (reinterpret_cast<uintptr_t>(shared) % BYTES || reinterpret_cast<uintptr_t>(global) % BYTES) {
    vf_host::die("an asynchronous copy is not aligned to its size");
  }
  vf_host::self->copies.push_back({shared, global, BYTES, valid});
}
VF_DEVICE void copy_commit() { vf_host::self->groups.push_back(vf_host::self->copies.size()); }
template <int PENDING>
VF_DEVICE void copy_wait() { vf_host::complete_copies(PENDING); }

struct MatrixLane { const u16* row; u32* to; };

template <int COUNT, bool TRANSPOSED>
VF_DEVICE void load_matrices(void* const* lanes) {
  for (int matrix = 0; matrix < COUNT; ++matrix) {
    const u16* rows[8];
    for (int i = 0; i < 8; ++i) {
      rows[i] = static_cast<MatrixLane*>(lanes[8 * matrix + i])->row;
      if (reinterpret_cast<uintptr_t>(rows[i]) % 16) vf_host::die("ldmatrix: row not aligned to 16");
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4 * 2;
      const u32 low = TRANSPOSED ? rows[t][g] : rows[g][t];
      const u32 high = TRANSPOSED ? rows[t + 1][g] : rows[g][t + 1];
      static_cast<MatrixLane*>(lanes[lane])->to[matrix] = low | high << 16;
    }
  }
}
VF_DEVICE void load_matrix_x4(u32 (&r)[4], const void* row) {
  MatrixLane lane{static_cast<const u16*>(row), r};
  vf_host::warp_collective(load_matrices<4, false>, &lane);
}
VF_DEVICE void load_matrix_x4_transposed(u32 (&r)[4], const void* row) {
  MatrixLane lane{static_cast<const u16*>(row), r};
  vf_host::warp_collective(load_matrices<4, true>, &lane);
}
VF_DEVICE void load_matrix_x2(u32 (&r)[2], const void* row) {
  MatrixLane lane{static_cast<const u16*>(row), r};
  vf_host::warp_collective(load_matrices<2, false>, &lane);
}
VF_DEVICE void load_matrix_x2_transposed(u32 (&r)[2], const void* row) {
  MatrixLane lane{static_cast<const u16*>(row), r};
  vf_host::warp_collective(load_matrices<2, true>, &lane);
}

VF_DEVICE float from_bits(u32 bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
VF_DEVICE u32 to_bits(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

template <class T> VF_DEVICE float widen(u16 bits);
template <> VF_DEVICE float widen<bf16>(u16 bits) { return from_bits(static_cast<u32>(bits) << 16); }
template <> VF_DEVICE float widen<f16>(u16 bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}
template <class T> VF_DEVICE u16 narrow(float x);
template <> VF_DEVICE u16 narrow<bf16>(float x) {
  if (x != x) return 0x7fff;
  const u32 bits = to_bits(x);
  return static_cast<u16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <> VF_DEVICE u16 narrow<f16>(float x) {
  const auto half = static_cast<_Float16>(x);
  u16 bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}

// What is done for every product is optimised well, all else so that it is compiled soon.
#pragma GCC push_options
#pragma GCC optimize("O3")

template <class T>
VF_DEVICE void widen_all(const u16* from, float* to, int count) {
#if defined(__F16C__) && defined(__AVX2__)
  if constexpr (is_same<T, f16>::value) {
    for (int i = 0; i < count; i += 8) {
      using Halves = short __attribute__((vector_size(16)));
      Halves halves;
      std::memcpy(&halves, from + i, sizeof(halves));
      const auto floats = __builtin_ia32_vcvtph2ps256(halves);
      std::memcpy(to + i, &floats, sizeof(floats));
    }
    return;
  }
#endif
  for (int i = 0; i < count; ++i) to[i] = widen<T>(from[i]);
}

struct MmaLane { float* c; const u32* a; u32 b[2]; };

template <class T>
VF_DEVICE void multiply(void* const* lanes) {
  u16 a16[16][16], b16[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto& from = *static_cast<MmaLane*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) std::memcpy(&a16[g + i % 2 * 8][t + i / 2 * 8], &from.a[i], 4);
    for (int i = 0; i < 2; ++i) {
      b16[t + 8 * i][g] = static_cast<u16>(from.b[i]);
      b16[t + 8 * i + 1][g] = static_cast<u16>(from.b[i] >> 16);
    }
  }
  float a[16][16], b[16][8];
  widen_all<T>(a16[0], a[0], 256);
  widen_all<T>(b16[0], b[0], 128);
  float c[16][8] = {};
  for (int i = 0; i < 16; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][k] * b[k][j];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* to = static_cast<MmaLane*>(lanes[lane])->c;
    const int g = lane / 4, t = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) to[i] += c[g + i / 2 * 8][t + i % 2];
  }
}

#pragma GCC pop_options

template <class T>
VF_DEVICE void mma_16816(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  MmaLane lane{c, a, {b0, b1}};
  vf_host::warp_collective(multiply<T>, &lane);
}

VF_DEVICE float load_l2(const float* from) { return *from; }
VF_DEVICE f32x2 load_l2_pair(const float* from) {
  if (reinterpret_cast<uintptr_t>(from) % 8) vf_host::die("a pair is not aligned to 8");
  return {from[0], from[1]};
}
VF_DEVICE f32x4 load_l2_quad(const float* from) {
  if (reinterpret_cast<uintptr_t>(from) % 16) vf_host::die("four floats are not aligned to 16");
  return {from[0], from[1], from[2], from[3]};
}
VF_DEVICE void prefetch_l2(const void*) {}
VF_DEVICE int arrive_device(int* at) { return (*at)++; }
VF_DEVICE int count_device(int* at) { return (*at)++; }

VF_DEVICE void start_next_kernel() {}
VF_DEVICE void wait_for_previous_kernel() { vf_host::wait_for_previous(); }

VF_DEVICE float exp2_approx(float x) { return std::exp2(x); }
VF_DEVICE float log2_approx(float x) { return std::log2(x); }
VF_DEVICE float max_of(float a, float b) { return std::fmax(a, b); }
VF_DEVICE float minus_infinity() { return -INFINITY; }

template <class T>
VF_DEVICE u32 pack2(float low, float high) {
  return narrow<T>(low) | static_cast<u32>(narrow<T>(high)) << 16;
}
template <class T>
VF_DEVICE void unpack2(u32 packed, float& low, float& high) {
  low = widen<T>(static_cast<u16>(packed));
  high = widen<T>(static_cast<u16>(packed >> 16));
}

VF_DEVICE float e4m3_value(u8 bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if ((bits & 0x7f) == 0x7f) return NAN;
  const float size = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                   : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return bits & 0x80 ? -size : size;
}
VF_DEVICE u8 e4m3_bits(float x) {
  if (x != x) return 0x7f;
  const u8 sign = std::signbit(x) ? 0x80 : 0;
  const float size = std::fmin(std::fabs(x), 448.f);
  const int exponent = size < 0x1p-6f ? -6 : std::ilogb(size);
  // In units of the last place; rounding up to 16 units carries into the exponent by itself.
  const int units = static_cast<int>(std::nearbyint(std::ldexp(size, 3 - exponent)));
  return static_cast<u8>(sign | (units < 8 ? units : ((exponent + 6) << 3) + units));
}
VF_DEVICE u32 pack4_e4m3(float a, float b, float c, float d) {
  return e4m3_bits(a) | static_cast<u32>(e4m3_bits(b)) << 8 | static_cast<u32>(e4m3_bits(c)) << 16 |
         static_cast<u32>(e4m3_bits(d)) << 24;
}
template <class T, int I, int J>
VF_DEVICE u32 e4m3_pair(u32 packed) {
  return pack2<T>(e4m3_value(static_cast<u8>(packed >> 8 * I)),
                  e4m3_value(static_cast<u8>(packed >> 8 * J)));
}

}  // namespace vf
