// The gated activations as a shared library for the tests.
#include "gated_activation.cu"

#include <cstddef>
#include <string_view>

namespace {

template <void (*KERNEL)(const vf::Params&)>
void call(const void* params) { KERNEL(*static_cast<const vf::Params*>(params)); }

}  // namespace

// Returns 1 if a thread ended without waiting for the kernel in front.
extern "C" int vf_launch(const char* name, const vf::Params* params, int blocks, int threads) {
  auto& block = vf_host::block;
  const std::string_view kernel(name);
  block.kernel = kernel == "vf_silu_f16"         ? call<vf_silu_f16>
                 : kernel == "vf_silu_bf16"      ? call<vf_silu_bf16>
                 : kernel == "vf_gelu_f16"       ? call<vf_gelu_f16>
                 : kernel == "vf_gelu_bf16"      ? call<vf_gelu_bf16>
                 : kernel == "vf_gelu_tanh_f16"  ? call<vf_gelu_tanh_f16>
                 : kernel == "vf_gelu_tanh_bf16" ? call<vf_gelu_tanh_bf16>
                                                 : nullptr;
  if (block.kernel == nullptr) vf_host::die("no kernel of this name");
  block.params = params;
  block.threads = threads;
  block.grid_x = blocks;
  block.left_early = false;
  for (block.x = 0; block.x < blocks; ++block.x) {
    vf_host::run_block(1);
    if (block.left_early) return 1;
  }
  return 0;
}

// For the tests of what Python mirrors.
extern "C" int vf_params_size() { return sizeof(vf::Params); }
extern "C" int vf_params_offset(const char* field) {
  const std::string_view name(field);
#define VF_FIELD(f) if (name == #f) return static_cast<int>(offsetof(vf::Params, f));
  VF_FIELD(given) VF_FIELD(out) VF_FIELD(width) VF_FIELD(row_groups) VF_FIELD(groups)
  return -1;
}
extern "C" int vf_constant(const char* of) {
  const std::string_view name(of);
  return name == "THREADS"  ? vf::kThreads
         : name == "GROUPS" ? vf::kGroups
         : name == "ITEMS"  ? static_cast<int>(vf::kItems)
                            : -1;
}
