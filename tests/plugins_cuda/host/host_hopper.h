// Scalar versions of what hopper.cuh gives the kernels on a GPU. A product is made when it is issued;
// its operand in shared memory is found by the same descriptor, swizzle included.
#pragma once

#include "host_device.h"

#include <vector>

namespace vf {

struct ProductLane { float* c; const u32* a; u64 b; int keep; };

#pragma GCC push_options
#pragma GCC optimize("O3")

// Elements of the operand that `descriptor` describes, eight that lie side by side: of (k, n) and those
// behind it along n, or along k if it is not transposed.
template <bool TRANSPOSED>
VF_DEVICE const char* operand_eight(u64 descriptor, int k, int n) {
  const u32 start = static_cast<u32>(descriptor & 0x3fff) << 4;
  const u32 leading = static_cast<u32>(descriptor >> 16 & 0x3fff) << 4;
  const u32 stride = static_cast<u32>(descriptor >> 32 & 0x3fff) << 4;
  if (descriptor >> 62 != 1) vf_host::die("product: not the 128-byte swizzle");
  const auto un = static_cast<u32>(n), uk = static_cast<u32>(k);
  u32 address = start;
  if (TRANSPOSED) {
    address += un % 64 * 2 + un / 64 * leading + uk % 8 * 128 + uk / 8 * stride;
  } else {
    address += un % 8 * 128 + un / 8 * stride + uk * 2;
  }
  address ^= (address >> 7 & 7) << 4;
  if (static_cast<int>(address) + 16 > vf_host::block.shared_bytes) {
    vf_host::die("product: operand outside of shared memory");
  }
  return vf_host::block.shared + address;
}

template <class T, int N, int TRANSPOSED>
VF_DEVICE void multiply_group(void* const* lanes) {
  const auto& first = *static_cast<ProductLane*>(lanes[0]);
  u16 a16[64][16], b16[16][N];
  for (int k = 0; k < 16; k += TRANSPOSED ? 1 : 8) {
    for (int n = 0; n < N; n += TRANSPOSED ? 8 : 1) {
      u16 eight[8];
      std::memcpy(eight, operand_eight<TRANSPOSED>(first.b, k, n), sizeof(eight));
      for (int i = 0; i < 8; ++i) b16[TRANSPOSED ? k : k + i][TRANSPOSED ? n + i : n] = eight[i];
    }
  }
  for (int thread = 0; thread < 128; ++thread) {
    const auto& from = *static_cast<ProductLane*>(lanes[thread]);
    if (from.b != first.b) vf_host::die("product: threads differ in their operand");
    const int g = thread / 32 * 16 + thread % 32 / 4, t = thread % 4 * 2;
    for (int i = 0; i < 4; ++i) std::memcpy(&a16[g + i % 2 * 8][t + i / 2 * 8], &from.a[i], 4);
  }
  static float a[64][16], b[16][N], c[64][N];
  widen_all<T>(a16[0], a[0], 64 * 16);
  widen_all<T>(b16[0], b[0], 16 * N);
  std::memset(c, 0, sizeof(c));
  for (int i = 0; i < 64; ++i) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < N; ++n) c[i][n] += a[i][k] * b[k][n];
    }
  }
  for (int thread = 0; thread < 128; ++thread) {
    const auto& to = *static_cast<ProductLane*>(lanes[thread]);
    const int g = thread / 32 * 16 + thread % 32 / 4, t = thread % 4 * 2;
    for (int i = 0; i < N / 2; ++i) {
      const float made = c[g + i % 4 / 2 * 8][i / 4 * 8 + t + i % 2];
      to.c[i] = made + (to.keep ? to.c[i] : 0.f);
    }
  }
}

#pragma GCC pop_options

template <class T, int N, int TRANSPOSED>
VF_DEVICE void product(float (&c)[N / 8][4], const u32 (&a)[4], u64 b, int keep) {
  ProductLane lane{c[0], a, b, keep};
  vf_host::collective<128>(multiply_group<T, N, TRANSPOSED>, &lane);
}
VF_DEVICE void products_begin() {}
VF_DEVICE void products_commit() {}
template <int PENDING> VF_DEVICE void products_wait() {}
template <int TILES> VF_DEVICE void products_done(float (&)[TILES][4]) {}
template <int REGISTERS> VF_DEVICE void take_registers() {}
template <int REGISTERS> VF_DEVICE void give_registers() {}
VF_DEVICE int shuffle_from(int value, int lane) { return vf_host::shuffle(value, lane); }
VF_DEVICE int uniform(int value) { return value; }
VF_DEVICE bool elect_one() {
  sync_warp();
  return thread_index() % 32 == 7;
}
VF_DEVICE void publish_shared() {}

struct HostBarrier { unsigned char arrivals, pending; u16 phase; int bytes; };  // still to come
static_assert(sizeof(HostBarrier) == sizeof(u64));

// What HostKernels puts in place of a tensor map.
struct HostMap { const char* pool; i64 rows, columns, box_rows; };

// Bulk copies not yet made: they are made when somebody waits for their barrier, and no sooner; but
// what they find is what there was when they were asked for. Of a box (`map` has rows) or of bytes.
struct BulkCopy {
  char* to;
  const void* from;
  HostMap map;
  int row, column, bytes;
  u64* barrier;
  bool waited;

  void make() const {
    if (map.box_rows == 0) {
      std::memcpy(to, from, static_cast<size_t>(bytes));
      return;
    }
    const u32 start = shared_address(to);
    for (u32 i = 0; i < static_cast<u32>(bytes); i += 16) {
      const i64 at = row + i / 128, first = column + i % 128 / 2;
      char* place = vf_host::block.shared + ((start + i) ^ (i >> 7 & 7) << 4);
      const bool there = at < map.rows && first < map.columns;
      if (there) std::memcpy(place, map.pool + (at * map.columns + first) * 2, 16);
      else std::memset(place, 0, 16);
    }
  }
};
inline std::vector<BulkCopy> bulk_copies;

VF_DEVICE void end_phase_if_done(HostBarrier* state) {
  if (state->pending == 0 && state->bytes == 0) {
    state->pending = state->arrivals;
    ++state->phase;
  }
}

VF_DEVICE void barrier_init(u64* barrier, int arrivals) {
  const auto count = static_cast<unsigned char>(arrivals);
  *reinterpret_cast<HostBarrier*>(barrier) = {count, count, 0, 0};
}
VF_DEVICE void barrier_arrive(u64* barrier) {
  auto* state = reinterpret_cast<HostBarrier*>(barrier);
  --state->pending;
  end_phase_if_done(state);
}
VF_DEVICE void publish_barriers() {}
VF_DEVICE void barrier_expect(u64* barrier, int bytes) {
  reinterpret_cast<HostBarrier*>(barrier)->bytes += bytes;
  barrier_arrive(barrier);
}
template <bool ONCE>
VF_DEVICE void copy_bulk(void* shared, const void* global, int bytes, u64* barrier) {
  const auto ends = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global);
  if ((ends | static_cast<uintptr_t>(bytes)) % 16 != 0) vf_host::die("bulk copy: not aligned");
  auto* to = static_cast<char*>(shared);
  bulk_copies.push_back({to, global, {}, 0, 0, bytes, barrier, vf_host::self->waited});
}

VF_DEVICE void copy_tile(void* shared, const TileMap* map, int column, int row, u64* barrier) {
  HostMap host;
  std::memcpy(&host, map, sizeof(host));
  if (shared_address(shared) % 1024 != 0) vf_host::die("box: not aligned to the swizzle");
  const int bytes = static_cast<int>(host.box_rows) * 128;
  auto* to = static_cast<char*>(shared);
  bulk_copies.push_back({to, nullptr, host, row, column, bytes, barrier, vf_host::self->waited});
}
VF_DEVICE void make_bulk_copies(u64* barrier) {
  for (size_t i = 0; i < bulk_copies.size();) {
    const BulkCopy copy = bulk_copies[i];
    if (copy.barrier != barrier) {
      ++i;
      continue;
    }
    auto* state = reinterpret_cast<HostBarrier*>(copy.barrier);
    vf_host::show(copy.waited);
    copy.make();
    vf_host::show(vf_host::self->waited);
    state->bytes -= copy.bytes;
    bulk_copies.erase(bulk_copies.begin() + static_cast<long>(i));
    end_phase_if_done(state);
  }
}
VF_DEVICE void barrier_wait(u64* barrier, int parity) {
  const auto* state = reinterpret_cast<const HostBarrier*>(barrier);
  make_bulk_copies(barrier);
  for (long turns = 0; (state->phase & 1) == static_cast<u32>(parity); ++turns) {
    if (turns > 1000000) vf_host::die("a phase of a barrier never ends");
    vf_host::pause();
    make_bulk_copies(barrier);
  }
}

}  // namespace vf
