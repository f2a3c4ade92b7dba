// Scalar versions of what math.cuh gives the kernels on a GPU.
#pragma once

namespace vf {

VF_DEVICE float erfc_of(float x) { return std::erfc(x); }

}  // namespace vf
