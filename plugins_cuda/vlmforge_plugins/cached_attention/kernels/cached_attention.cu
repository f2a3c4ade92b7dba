// One translation unit per configuration; compile.py passes it as macros.
//
//   VF_BF16                activations are bf16 (1) or f16 (0)
//   VF_FP8_KV              pools hold e4m3 (1) or the activations' type (0)
//   VF_HEAD_SIZE           D, a multiple of 8
//   VF_DECODE_WARPS        of a block of decode
//   VF_NARROW_WARPS        of a block of decode for many short rows
//   VF_DECODE_STAGES       depth of decode's ring of copies
//   VF_DECODE_FUSED        the last block of decode adds up the splits
//   VF_DECODE_BULK         decode reads by bulk copies (sm_90a only)
//   VF_DECODE_BLOCKS       of decode that a multiprocessor must have registers for
//   VF_OVERLAP             decode starts while the kernel in front of it ends (sm_90 and later)
//   VF_PREFILL_TILES       16-row query tiles of a prefill warp
//   VF_HOPPER_PREFILL      prefill by warpgroup products (sm_90a only)
//   VF_HOPPER_BUFFERS      for its tiles of keys or values
#include "combine.cuh"
#include "decode.cuh"
#include "prefill.cuh"
#if VF_HOPPER_PREFILL
#include "prefill_hopper.cuh"
#endif
#include "write.cuh"

namespace vf {
#if VF_BF16
using Activation = bf16;
#else
using Activation = f16;
#endif
#if VF_FP8_KV
using Stored = e4m3;
#else
using Stored = Activation;
#endif
using ConfiguredStrip = Strip<Activation, Stored, VF_HEAD_SIZE>;
#if VF_DECODE_BULK
using DecodeStrip = BulkStrip<Activation, VF_HEAD_SIZE>;
#else
using DecodeStrip = ConfiguredStrip;
#endif
using ConfiguredDecode =
    Decode<DecodeStrip, VF_DECODE_WARPS, VF_DECODE_STAGES, VF_DECODE_FUSED>;
using NarrowDecode = Decode<DecodeStrip, VF_NARROW_WARPS, VF_DECODE_STAGES, VF_DECODE_FUSED>;
#if VF_HOPPER_PREFILL
using ConfiguredPrefill = HopperPrefill<Strip<Activation, Activation, VF_HEAD_SIZE>, Stored,
                                        VF_HOPPER_BUFFERS>;
#else
using ConfiguredPrefill = Prefill<ConfiguredStrip, 4, VF_PREFILL_TILES, 4>;
#endif
}  // namespace vf

VF_KERNEL(vf::kWriteThreads, 1) vf_write(VF_PARAMS p) {
  vf::write_token<vf::Activation, vf::Stored, VF_HEAD_SIZE>(p);
}

VF_KERNEL(vf::ConfiguredDecode::kThreads, VF_DECODE_BLOCKS) vf_decode(VF_PARAMS p) {
  vf::ConfiguredDecode::run(p);
}

VF_KERNEL(vf::NarrowDecode::kThreads, 1) vf_decode_narrow(VF_PARAMS p) {
  vf::NarrowDecode::run(p);
}

VF_KERNEL(vf::kCombineThreads, 1) vf_combine(VF_PARAMS p) {
  vf::combine_splits<vf::Activation, VF_HEAD_SIZE>(p);
}

VF_KERNEL(vf::ConfiguredPrefill::kThreads, 1) vf_prefill(VF_PARAMS p) {
  vf::ConfiguredPrefill::run(p);
}
