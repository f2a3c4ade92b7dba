// What gated activations need of the hardware beside device.cuh.
#pragma once

#include "device.cuh"

#if defined(__CUDACC__)

namespace vf {

VF_DEVICE float erfc_of(float x) { return erfcf(x); }

}  // namespace vf

#else
#include "host_math.h"
#endif
