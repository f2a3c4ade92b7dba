"""NVIDIA GPUs: chains of ONNX Runtime's CUDA provider and our attention kernels.

What the GPU does is behind `Device`; all else is the same on the stand-in of `backends.fake`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmforge.backends import DecoderSession, FloatArray, LoadOptions, VisionSession
from vlmforge.backends.cuda.decoder import ChainDecoder
from vlmforge.backends.cuda.device import Device
from vlmforge.engine.manifest import Manifest
from vlmforge.limits import Room
from vlmforge.ort import ort


@dataclass(frozen=True, slots=True)
class _Vision:
    session: ort.InferenceSession

    def encode(self, pixel_values: FloatArray) -> FloatArray:
        """See `VisionSession.encode`."""
        (features,) = self.session.run(None, {"pixel_values": pixel_values})
        return np.asarray(features, np.float32)


@dataclass(frozen=True, slots=True)
class CudaBackend:
    """See the module. `device` makes one for each engine; None: the first GPU."""

    device: Callable[[], Device] | None = None

    def load_vision(self, folder: Path, manifest: Manifest, options: LoadOptions) -> VisionSession:
        """See `Backend.load_vision`."""
        del options
        return _Vision(self._device().session(folder / manifest.part("vision").file))

    def load_decoder(
        self, folder: Path, manifest: Manifest, options: LoadOptions
    ) -> DecoderSession:
        """See `Backend.load_decoder`."""
        return ChainDecoder(self._device(), folder, manifest.part("decoder"), manifest.kv, options)

    def memory(self) -> Room:
        """See `Backend.memory`: what is free on the GPU now."""
        from vlmforge.backends.cuda import machine

        machine.check_libraries()
        gpu = machine.check_gpu(machine.find_gpu)
        return Room(gpu.free, f"the free memory of {gpu.name}")

    def check(self) -> None:
        """See `Backend.check`."""
        from vlmforge.backends.cuda import machine

        machine.check_libraries()
        machine.check_gpu(machine.find_gpu)

    def versions(self) -> Sequence[tuple[str, str]]:
        """See `Backend.versions`."""
        from vlmforge.backends.cuda import machine

        return ((machine.installed_onnxruntime(), ""),)

    def _device(self) -> Device:
        if self.device is not None:
            return self.device()
        from vlmforge.backends.cuda import machine

        self.check()
        machine.preload()
        from vlmforge.backends.cuda.gpu import Gpu

        return Gpu()


BACKEND = CudaBackend()
