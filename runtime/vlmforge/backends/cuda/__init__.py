"""NVIDIA GPUs: chains of ONNX Runtime's CUDA provider and our attention kernels.

What the GPU does is behind `Device`; all else is the same on the stand-in of `backends.fake`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from typing_extensions import override

from vlmforge.backends import (
    Backend,
    Communicator,
    DecoderSession,
    LoadOptions,
    VisionSession,
)
from vlmforge.backends.cuda import machine
from vlmforge.backends.cuda.chain import ChainProgram
from vlmforge.backends.cuda.choice_kernel import load_choice
from vlmforge.backends.cuda.choosing import TokenSampler
from vlmforge.backends.cuda.decoder import PagedDecoder
from vlmforge.backends.cuda.device import Device, MeetingPlace
from vlmforge.backends.cuda.vision import DeviceVision, HostVision, PatchVision
from vlmforge.backends.features import device_features
from vlmforge.engine.manifest import Manifest, Part, decoder_name
from vlmforge.limits import Room
from vlmforge.ort import ort


@dataclass(frozen=True, slots=True)
class CudaBackend(Backend):
    """See the module: the first GPU, or one for each rank."""

    @override
    def load_vision(self, folder: Path, manifest: Manifest, options: LoadOptions) -> VisionSession:
        device = self.device(options.device(0))
        return HostVision(device.session(folder / manifest.part("vision").file))

    @override
    def load_decoder(
        self, folder: Path, manifest: Manifest, options: LoadOptions
    ) -> DecoderSession:
        return self._load_decoder(self.device(options.device(0)), folder, manifest, options)

    def load_parts(
        self, folder: Path, manifest: Manifest, options: LoadOptions
    ) -> tuple[VisionSession, DecoderSession]:
        """See `WholeBackend`."""
        sizes = device_features(manifest, options.features)
        if sizes is None:
            return (
                self.load_vision(folder, manifest, options),
                self.load_decoder(folder, manifest, options),
            )
        device, part = self.device(options.device(0)), manifest.part("vision")
        kind = DeviceVision if manifest.image.patch_inputs is None else PatchVision
        vision = kind(device, folder / part.file, part, sizes)
        return vision, self._load_decoder(device, folder, manifest, options)

    def _load_decoder(
        self, device: Device, folder: Path, manifest: Manifest, options: LoadOptions
    ) -> DecoderSession:
        part = manifest.part("decoder")
        program = ChainProgram(device, folder, part, manifest.kv, options)
        return _decoder(device, folder, manifest, part, program, options)

    @override
    def load_rank(
        self, folder: Path, manifest: Manifest, options: LoadOptions, ranks: Communicator
    ) -> DecoderSession:
        """One GPU a rank. They do what takes long first: on a GPU none waits for long."""
        part, kv = manifest.part(decoder_name(ranks.rank)), manifest.rank_kv
        assert part.chain is not None
        device = self.device(options.device(ranks.rank))
        kernels = {name: folder / file for name, file in part.chain.meetings.items()}
        place = device.meeting_place(ranks, kernels)
        program = ChainProgram(device, folder, part, kv, options, place)
        ranks.meet(np.zeros(1, np.float32))
        return _decoder(device, folder, manifest, part, program, options, place)

    @override
    def memory(self, devices: Sequence[int] = (0,)) -> Room | None:
        """What is free now, on the one of these GPUs that has least."""
        gpu = min((_check(number) for number in devices), key=lambda found: found.free)
        return Room(gpu.free, f"the free memory of {gpu.name}")

    @override
    def check(self) -> None:
        _check()

    @override
    def versions(self) -> Sequence[tuple[str, str]]:
        return (("onnxruntime", ort.__version__),)

    def device(self, number: int = 0) -> Device:
        """A device for a part of an engine (BackendUnavailableError: see `check`)."""
        _check(number)
        machine.preload()
        from vlmforge.backends.cuda.gpu import Gpu  # not before the bindings are known to be there

        return Gpu(number)


def _decoder(
    device: Device,
    folder: Path,
    manifest: Manifest,
    part: Part,
    program: ChainProgram,
    options: LoadOptions,
    place: MeetingPlace | None = None,
) -> PagedDecoder:
    """Tokens are chosen by the first rank alone."""
    assert part.chain is not None
    graph = part.chain.sampler if part.name == decoder_name(0) else None
    sampler = None
    if graph is not None:
        kernel = load_choice(device, folder, part.chain, options.slots)
        loaded = kernel or device.segment(folder / graph.file)
        sampler = TokenSampler(device, loaded, graph, options.slots)
    vocab_size = manifest.decode.vocab_size
    return PagedDecoder(device, program, manifest.rank_kv, vocab_size, options, sampler, place)


def _check(number: int = 0) -> machine.FoundGpu:
    def find() -> machine.FoundGpu:
        return machine.find_gpu(number) if number else machine.find_gpu()

    return machine.check_machine(find, ort.get_available_providers())


BACKEND: CudaBackend = CudaBackend()
