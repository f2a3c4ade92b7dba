"""Engines of TensorRT and TensorRT-RTX: plans, over the pool, buckets and steps of `cuda`.

Never run on a GPU: what the libraries do is tested with a stand-in (`backends.fake_plans`).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import override

from vlmforge.backends import (
    Backend,
    Communicator,
    DecoderSession,
    LoadOptions,
    VisionSession,
    one_rank_only,
)
from vlmforge.backends.cuda import machine
from vlmforge.engine.manifest import Manifest, decoder_name
from vlmforge.errors import BackendUnavailableError
from vlmforge.limits import Room

if TYPE_CHECKING:
    from vlmforge.backends.cuda.device import Device
    from vlmforge.backends.cuda.program import Program
    from vlmforge.backends.plans import Library

_ELSEWHERE = "vlmforge inspect and vlmforge verify --static work here; to run the model on this "
_ELSEWHERE += "machine, build it with --target onnxruntime"


@dataclass(frozen=True, slots=True)
class PlanBackend(Backend):
    """A library that runs plans.

    Attributes:
        name: Of the backend.
        module: What is imported.
        requirement: What pip installs it by.
        gpus: What it runs on.
        refused: The library's reason, by compute capability, major times 10 plus minor.
    """

    name: str
    module: str
    requirement: str
    gpus: str
    refused: Mapping[int, str] = field(default_factory=dict)

    @override
    def load_vision(self, folder: Path, manifest: Manifest, options: LoadOptions) -> VisionSession:
        from vlmforge.backends.plans import PlanVision

        device = self.device(options.device(0))
        return PlanVision(device, self.library(), folder, manifest.part("vision"))

    @override
    def load_decoder(
        self, folder: Path, manifest: Manifest, options: LoadOptions
    ) -> DecoderSession:
        from vlmforge.backends.plan_program import PlanProgram

        _check_paged(manifest)
        part, kv, device = manifest.part("decoder"), manifest.kv, self.device(options.device(0))
        program = PlanProgram(device, self.library(), folder, part, kv, options)
        return _decoder(device, program, manifest, options)

    @override
    def load_rank(
        self, folder: Path, manifest: Manifest, options: LoadOptions, ranks: Communicator
    ) -> DecoderSession:
        """One GPU a rank. They do what takes long first: on a GPU none waits for long."""
        from vlmforge.backends.plan_program import PlanProgram

        _check_paged(manifest)
        part, kv = manifest.part(decoder_name(ranks.rank)), manifest.rank_kv
        if part.chain is None:  # ranks would meet inside it
            raise one_rank_only(manifest)
        device = self.device(options.device(ranks.rank))
        kernels = {name: folder / file for name, file in part.chain.meetings.items()}
        place = device.meeting_place(ranks, kernels)
        program = PlanProgram(device, self.library(), folder, part, kv, options, place)
        ranks.meet(np.zeros(1, np.float32))
        return _decoder(device, program, manifest, options)

    @override
    def memory(self, devices: Sequence[int] = (0,)) -> Room | None:
        """What is free now, on the one of these GPUs that has least."""
        gpu = min((self._checked(number) for number in devices), key=lambda found: found.free)
        return Room(gpu.free, f"the free memory of {gpu.name}")

    @override
    def versions(self) -> Sequence[tuple[str, str]]:
        """BackendUnavailableError: not installed"""
        self._check_installed()
        return ((self.module, importlib.metadata.version(self.requirement)),)

    @override
    def check(self) -> None:
        self._checked()

    def device(self, number: int = 0) -> Device:
        """A device for a part of an engine (BackendUnavailableError: see `check`)."""
        self._checked(number)
        from vlmforge.backends.cuda.gpu import Gpu  # not before the bindings are known to be there

        return Gpu(number)

    def library(self) -> Library:
        """What runs the plans (BackendUnavailableError: it cannot be loaded)."""
        from vlmforge.backends.plans import load_library

        return load_library(self.module)

    def _check_installed(self) -> None:
        if importlib.util.find_spec(self.module) is None:
            raise BackendUnavailableError(
                f"The engine's library, {self.requirement}, is not installed here.",
                found=f"no module {self.module}",
                expected=self.requirement,
                fix=f"pip install 'vlmforge[{self.requirement}]'; {_ELSEWHERE}",
            )

    def _checked(self, number: int = 0) -> machine.FoundGpu:
        self._check_installed()

        def find() -> machine.FoundGpu:
            return machine.find_gpu(number) if number else machine.find_gpu()

        gpu = machine.check_gpu(find, self.name, self.gpus, _ELSEWHERE)
        if (reason := self.refused.get(gpu.capability)) is not None:
            raise BackendUnavailableError(
                f"{self.requirement} refuses this GPU: {reason}",
                found=f"{gpu.name}, compute capability {gpu.capability / 10:.1f}",
                expected=self.gpus,
                fix="build the checkpoint with --target cuda, whose attention is the same, and "
                "which runs there",
            )
        return gpu


def _check_paged(manifest: Manifest) -> None:
    if manifest.kv.page_size is None:
        raise BackendUnavailableError(
            "Plans with the library's own attention are built, but not run.",
            found="an engine of --attention native, whose cache is not in pages",
            expected="an engine with the attention plugin",
            fix="build-engine CHECKPOINT -o ENGINE --attention plugin",
        )


def _decoder(
    device: Device, program: Program, manifest: Manifest, options: LoadOptions
) -> DecoderSession:
    from vlmforge.backends.cuda.decoder import PagedDecoder

    vocab_size = manifest.decode.vocab_size
    return PagedDecoder(device, program, manifest.rank_kv, vocab_size, options)


BACKEND: PlanBackend = PlanBackend(
    "tensorrt", "tensorrt", "tensorrt", "the kind of GPU that the engine was built on"
)
