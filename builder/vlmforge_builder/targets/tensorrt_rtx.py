"""TensorRT-RTX: see `targets.tensorrt`. It compiles on a machine without a GPU."""

from __future__ import annotations

from vlmforge_builder.targets.tensorrt import TensorRTTarget
from vlmforge_builder.tensorrt.flavours import TENSORRT_RTX

TARGET = TensorRTTarget(TENSORRT_RTX)
