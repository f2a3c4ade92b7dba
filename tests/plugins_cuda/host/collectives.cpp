// The collectives as a shared library for the tests: a copy of it is a rank.
#include "collectives.cu"

#include <cstddef>
#include <string_view>

namespace {

template <void (*KERNEL)(const vf::Params&)>
void call(const void* params) { KERNEL(*static_cast<const vf::Params*>(params)); }

}  // namespace

extern "C" int vf_launch(const char* name, const vf::Params* params, int blocks, int threads,
                         int shared_bytes) {
  auto& block = vf_host::block;
  std::vector<float> shared(shared_bytes / sizeof(float) + 1, NAN);
  block.shared = reinterpret_cast<char*>(shared.data());
  const std::string_view kernel(name);
  block.kernel = kernel == "vf_sum_f16"     ? call<vf_sum_f16>
                 : kernel == "vf_sum_bf16"  ? call<vf_sum_bf16>
                 : kernel == "vf_sum_f32"   ? call<vf_sum_f32>
                 : kernel == "vf_gather_16" ? call<vf_gather_16>
                 : kernel == "vf_gather_32" ? call<vf_gather_32>
                 : kernel == "vf_sum_norm_f16"  ? call<vf_sum_norm_f16>
                 : kernel == "vf_sum_norm_bf16" ? call<vf_sum_norm_bf16>
                 : kernel == "vf_sum_norm_f32"  ? call<vf_sum_norm_f32>
                 : kernel == "vf_norm_f16"      ? call<vf_norm_f16>
                 : kernel == "vf_norm_bf16"     ? call<vf_norm_bf16>
                 : kernel == "vf_norm_f32"      ? call<vf_norm_f32>
                                            : nullptr;
  if (block.kernel == nullptr) vf_host::die("no kernel of this name");
  block.params = params;
  block.threads = threads;
  block.grid_x = blocks;
  for (block.x = 0; block.x < blocks; ++block.x) vf_host::run_block(1);
  return 0;
}

extern "C" void vf_watch(const void* word) { vf_host::watched = word, vf_host::looks = 0; }
extern "C" int vf_looks() { return vf_host::looks; }

// For the tests of what Python mirrors.
extern "C" int vf_params_size() { return sizeof(vf::Params); }
extern "C" int vf_params_offset(const char* field) {
  const std::string_view name(field);
#define VF_FIELD(f) if (name == #f) return static_cast<int>(offsetof(vf::Params, f));
  VF_FIELD(lanes) VF_FIELD(counts) VF_FIELD(stop) VF_FIELD(failed) VF_FIELD(given) VF_FIELD(out)
  VF_FIELD(patience) VF_FIELD(items) VF_FIELD(width) VF_FIELD(kept) VF_FIELD(first) VF_FIELD(last)
  VF_FIELD(share) VF_FIELD(rank) VF_FIELD(size) VF_FIELD(added) VF_FIELD(scale) VF_FIELD(normed)
  VF_FIELD(epsilon)
  return -1;
}
extern "C" int vf_constant(const char* of) {
  const std::string_view name(of);
  return name == "MOST_RANKS" ? vf::kMostRanks : name == "THREADS" ? vf::kThreads
         : name == "BLOCKS"   ? vf::kBlocks    : name == "REGION"  ? static_cast<int>(vf::kRegion)
                                               : -1;
}
