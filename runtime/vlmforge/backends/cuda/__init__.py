"""NVIDIA GPUs: chains of ONNX Runtime's CUDA provider and our attention kernels.

What the GPU does is behind `Device`; all else is the same on the stand-in of `backends.fake`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from typing_extensions import override

from vlmforge.backends import Backend, DecoderSession, FloatArray, LoadOptions, VisionSession
from vlmforge.backends.cuda import machine
from vlmforge.backends.cuda.chain import ChainProgram
from vlmforge.backends.cuda.choosing import TokenSampler
from vlmforge.backends.cuda.decoder import PagedDecoder
from vlmforge.backends.cuda.device import Device
from vlmforge.engine.images.patch_inputs import NO_ARRAYS, Arrays
from vlmforge.engine.interface import PIXEL_VALUES
from vlmforge.engine.manifest import Manifest
from vlmforge.limits import Room
from vlmforge.ort import ort


@dataclass(frozen=True, slots=True)
class _Vision(VisionSession):
    session: ort.InferenceSession

    @override
    def encode(self, pixel_values: FloatArray, arrays: Arrays = NO_ARRAYS) -> FloatArray:
        (features,) = self.session.run(None, {PIXEL_VALUES: pixel_values, **arrays})
        return np.asarray(features, np.float32)


@dataclass(frozen=True, slots=True)
class CudaBackend(Backend):
    """See the module: the first GPU."""

    @override
    def load_vision(self, folder: Path, manifest: Manifest, options: LoadOptions) -> VisionSession:
        del options
        return _Vision(self.device().session(folder / manifest.part("vision").file))

    @override
    def load_decoder(
        self, folder: Path, manifest: Manifest, options: LoadOptions
    ) -> DecoderSession:
        device, kv, part = self.device(), manifest.kv, manifest.part("decoder")
        assert part.chain is not None
        program, graph = ChainProgram(device, folder, part, kv, options), part.chain.sampler
        sampler = None if graph is None else TokenSampler(device, folder, graph, options.slots)
        return PagedDecoder(device, program, kv, manifest.decode.vocab_size, options, sampler)

    @override
    def memory(self) -> Room | None:
        """What is free on the GPU now."""
        gpu = _check()
        return Room(gpu.free, f"the free memory of {gpu.name}")

    @override
    def check(self) -> None:
        _check()

    @override
    def versions(self) -> Sequence[tuple[str, str]]:
        return (("onnxruntime", ort.__version__),)

    def device(self) -> Device:
        """A device for a part of an engine (BackendUnavailableError: see `check`)."""
        _check()
        machine.preload()
        from vlmforge.backends.cuda.gpu import Gpu  # not before the bindings are known to be there

        return Gpu()


def _check() -> machine.FoundGpu:
    return machine.check_machine(machine.find_gpu, ort.get_available_providers())


BACKEND: CudaBackend = CudaBackend()
