"""Plans of TensorRT and TensorRT-RTX. This version builds them and looks into them.

Running them is not there yet, so that loading one always refuses: with what this machine lacks, or
else with that.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from typing_extensions import override

from vlmforge.backends import Backend, DecoderSession, LoadOptions, VisionSession
from vlmforge.engine.manifest import Manifest
from vlmforge.errors import BackendUnavailableError

_DRIVER = "libcuda.so.1"
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
        del folder, manifest, options
        self.check()

    @override
    def load_decoder(
        self, folder: Path, manifest: Manifest, options: LoadOptions
    ) -> DecoderSession:
        del folder, manifest, options
        self.check()

    @override
    def memory(self) -> NoReturn:
        self.check()

    @override
    def versions(self) -> Sequence[tuple[str, str]]:
        """BackendUnavailableError: not installed"""
        self._check_installed()
        return ((self.module, importlib.metadata.version(self.requirement)),)

    def _check_installed(self) -> None:
        if importlib.util.find_spec(self.module) is None:
            raise BackendUnavailableError(
                f"The engine's library, {self.requirement}, is not installed here.",
                found=f"no module {self.module}",
                expected=self.requirement,
                fix=f"pip install 'vlmforge[{self.requirement}]'; {_ELSEWHERE}",
            )

    @override
    def check(self) -> NoReturn:
        self._check_installed()
        try:
            ctypes.CDLL(_DRIVER)
        except OSError as error:
            raise BackendUnavailableError(
                f"An engine of the backend {self.name} needs an NVIDIA GPU.",
                found=f"no driver: {error}",
                expected=f"{self.gpus}, and its driver",
                fix=_ELSEWHERE,
            ) from None
        self._check_gpu()
        raise BackendUnavailableError(
            f"This version of vlmforge builds engines of {self.name}, but does not run them.",
            found=f"backend {self.name!r}",
            expected="an engine of the backend onnxruntime",
            fix=_ELSEWHERE,
        )

    def _check_gpu(self) -> None:
        """BackendUnavailableError: the library itself refuses the GPU that is here."""
        from vlmforge.backends.cuda import machine  # not where there is no driver

        try:
            gpu = machine.find_gpu()
        except (ImportError, OSError, RuntimeError):
            return  # nothing is known of it
        if (reason := self.refused.get(gpu.capability)) is not None:
            raise BackendUnavailableError(
                f"{self.requirement} refuses this GPU: {reason}",
                found=f"{gpu.name}, compute capability {gpu.capability / 10:.1f}",
                expected=self.gpus,
                fix="build the checkpoint with --target cuda, whose attention is the same, and "
                "which runs there",
            )


BACKEND = PlanBackend(
    "tensorrt", "tensorrt", "tensorrt", "the kind of GPU that the engine was built on"
)
