// The kernels of one configuration as a shared library for the tests.
#include "cached_attention.cu"

#include <cstddef>
#include <string_view>

namespace {

template <void (*KERNEL)(const vf::Params&)>
void call(const void* params) { KERNEL(*static_cast<const vf::Params*>(params)); }

}  // namespace

// Runs a kernel over its grid. Returns 0 or what `run_grid` found wrong.
extern "C" int vf_launch(const char* name, const vf::Params* params, int grid_x, int grid_y,
                         int grid_z, int threads, int shared_bytes, int direction) {
  auto& block = vf_host::block;
  const std::string_view kernel(name);
  block.kernel = kernel == "vf_write"     ? call<vf_write>
                 : kernel == "vf_decode"  ? call<vf_decode>
                 : kernel == "vf_decode_narrow" ? call<vf_decode_narrow>
                 : kernel == "vf_combine" ? call<vf_combine>
                 : kernel == "vf_prefill" ? call<vf_prefill>
                                          : nullptr;
  if (block.kernel == nullptr) vf_host::die("no kernel of this name");
  return vf_host::run_grid(params, {grid_x, grid_y, grid_z}, threads, shared_bytes, direction,
                           !vf_host::late.empty());
}

// What the next launch and the kernel in front of it may write, see Late; `before` is what was there
// before both. Of large arrays, that the launch only reads, the lines that differ are enough. None: `at`
// is null.
extern "C" void vf_late(char* at, const char* before, long bytes, bool only_read) {
  vf_host::show(true);
  if (at == nullptr) vf_host::late.clear();
  const long line = only_read ? 64 : bytes;
  for (long i = 0; i < bytes; i += line) {
    const long size = bytes - i < line ? bytes - i : line;
    if (only_read && std::memcmp(before + i, at + i, static_cast<size_t>(size)) == 0) continue;
    vf_host::late.push_back({at + i, {before + i, before + i + size}, {at + i, at + i + size}});
  }
}

// For the tests of what Python mirrors.
extern "C" int vf_params_size() { return sizeof(vf::Params); }
extern "C" int vf_params_offset(const char* field) {
  const std::string_view name(field);
#define VF_FIELD(f) if (name == #f) return static_cast<int>(offsetof(vf::Params, f));
  VF_FIELD(key_map) VF_FIELD(value_map) VF_FIELD(query) VF_FIELD(key) VF_FIELD(value) VF_FIELD(key_pool) VF_FIELD(value_pool)
  VF_FIELD(cos) VF_FIELD(sin) VF_FIELD(past_lengths) VF_FIELD(query_lengths) VF_FIELD(block_table)
  VF_FIELD(out) VF_FIELD(rotated) VF_FIELD(partial_out) VF_FIELD(partial_lse) VF_FIELD(arrivals)
  VF_FIELD(query_batch) VF_FIELD(query_row) VF_FIELD(key_batch) VF_FIELD(key_row)
  VF_FIELD(value_batch) VF_FIELD(value_row) VF_FIELD(out_batch) VF_FIELD(out_row)
  VF_FIELD(batch) VF_FIELD(max_query) VF_FIELD(heads) VF_FIELD(kv_heads) VF_FIELD(max_pages)
  VF_FIELD(page_shift) VF_FIELD(splits) VF_FIELD(heads_together) VF_FIELD(counters)
  VF_FIELD(scale_log2) VF_FIELD(key_inverse_scale)
  VF_FIELD(value_inverse_scale) VF_FIELD(value_scale)
#undef VF_FIELD
  return -1;
}
extern "C" int vf_split_keys(int total, int splits) { return vf::Splits(total, splits).keys; }
extern "C" int vf_split_count(int total, int splits) { return vf::Splits(total, splits).count; }
extern "C" int vf_shared_bytes(const char* name) {
  const std::string_view kernel(name);
  if (kernel == "vf_decode") return vf::ConfiguredDecode::kSharedBytes;
  if (kernel == "vf_decode_narrow") return vf::NarrowDecode::kSharedBytes;
  if (kernel == "vf_prefill") return vf::ConfiguredPrefill::kSharedBytes;
  return 0;
}
extern "C" int vf_threads(const char* name) {
  const std::string_view kernel(name);
  if (kernel == "vf_decode") return vf::ConfiguredDecode::kThreads;
  if (kernel == "vf_decode_narrow") return vf::NarrowDecode::kThreads;
  if (kernel == "vf_prefill") return vf::ConfiguredPrefill::kThreads;
  return 0;
}
extern "C" int vf_prefill_rows() { return vf::ConfiguredPrefill::kRows; }
