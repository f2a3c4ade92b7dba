// The choice of tokens as a shared library for the tests.
#include "token_choice.cu"

#include <cstddef>
#include <string_view>

namespace {

void call(const void* params) { vf_choose(*static_cast<const vf::Params*>(params)); }

constexpr char kNotYet = static_cast<char>(0xff);  // a NaN in every type

}  // namespace

// Returns 0 or what `run_grid` found wrong.
extern "C" int vf_launch(const vf::Params* params, int blocks, int threads, int shared_bytes,
                         int direction) {
  vf_host::block.kernel = call;
  return vf_host::run_grid(params, {blocks}, threads, shared_bytes, direction, true);
}

// What the kernel in front writes, or one that starts before it ends: see Late. None: `at` is null.
extern "C" void vf_late(char* at, long bytes) {
  vf_host::show(true);
  if (at == nullptr) vf_host::late.clear();
  const std::vector<char> before(static_cast<size_t>(bytes), kNotYet);
  if (at != nullptr) vf_host::late.push_back({at, before, {at, at + bytes}});
}

// For the tests of what Python mirrors.
extern "C" int vf_params_size() { return sizeof(vf::Params); }
extern "C" int vf_params_offset(const char* field) {
  const std::string_view name(field);
#define VF_FIELD(f) if (name == #f) return static_cast<int>(offsetof(vf::Params, f));
  VF_FIELD(logits) VF_FIELD(choices) VF_FIELD(edit_ids) VF_FIELD(edit_factors) VF_FIELD(edit_minus)
  VF_FIELD(chosen) VF_FIELD(chosen_logit) VF_FIELD(normaliser) VF_FIELD(best_ids)
  VF_FIELD(best_logits) VF_FIELD(scratch) VF_FIELD(vocab) VF_FIELD(edits) VF_FIELD(reported)
  VF_FIELD(told)
  return -1;
}
extern "C" int vf_constant(const char* of) {
  const std::string_view name(of);
  return name == "THREADS"        ? static_cast<int>(vf::kThreads)
         : name == "CANDIDATES"   ? static_cast<int>(vf::kCandidates)
         : name == "MOST_VOCAB"   ? static_cast<int>(vf::kMostVocab)
         : name == "SHARED_BYTES" ? static_cast<int>(sizeof(vf::Shared))
                                  : -1;
}
