"""Plans of TensorRT-RTX; see `backends.tensorrt`."""

from __future__ import annotations

from vlmforge.backends.tensorrt import PlanBackend

BACKEND: PlanBackend = PlanBackend(
    "tensorrt_rtx",
    "tensorrt_rtx",
    "tensorrt-rtx",
    "a GeForce RTX or RTX PRO GPU of compute capability 8.0 or later (9.0 is not supported)",
    # What version 1.7.1 said on an H100.
    {
        90: "TensorRT-RTX does not support this compute capability, so the engine cannot be "
        "rebuilt for it"
    },
)
