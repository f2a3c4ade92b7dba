"""Plans of TensorRT and TensorRT-RTX on a `Device`: deserialised, bound by address, enqueued.

Both libraries have one interface under two names. Everything of a decoder but what runs its steps
is that of the backend `cuda` (`backends.cuda.decoder`).
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct
from typing_extensions import override

from vlmforge.backends import FloatArray, VisionSession
from vlmforge.backends.cuda.device import Device, Memory, Work
from vlmforge.backends.cuda.frames import Arrangement, in_a_row, shape_of
from vlmforge.backends.number_formats import DTYPES, decode
from vlmforge.engine.images.patch_inputs import NO_ARRAYS, Arrays
from vlmforge.engine.interface import (
    IMAGE_FEATURES,
    IMAGES,
    PIXEL_VALUES,
)
from vlmforge.engine.manifest import Part
from vlmforge.errors import BackendUnavailableError, EngineError
from vlmforge_plugins.cached_attention.plugin import register

logger = logging.getLogger("vlmforge")
_KEPT_WORDS = 3
Shapes = Mapping[str, tuple[int, ...]]


class Library(Struct, frozen=True):
    """A library that runs plans, ready for them: our plugin is registered, without kernels.

    Each plan brings its own.

    Attributes:
        trt: The module.
        runtime: Of the library.
        said: Its latest errors, newest last.
        creators: Of the plugin, which the library does not keep.
    """

    trt: Any
    runtime: Any
    said: list[str]
    creators: tuple[object, ...]

    def words(self) -> str:
        """The reason that the library gave for what it has just refused."""
        found = "; ".join(self.said[-_KEPT_WORDS:]) or "no reason given"
        self.said.clear()
        return found


@cache
def load_library(module: str) -> Library:
    """The library, once in a process (BackendUnavailableError: it cannot be loaded)."""
    try:
        trt = importlib.import_module(module)
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(
            f"The library {module} is installed, but cannot be loaded.",
            found=str(error)[:300],
            expected="the package and the libraries that it depends on",
            fix="install it again, in one version with its libraries; vlmforge doctor",
        ) from error
    return open_library(trt)


def open_library(trt: Any) -> Library:
    """An imported module `tensorrt` or `tensorrt_rtx` as a `Library`."""
    said: list[str] = []
    creators = register(trt, {})
    return Library(trt, trt.Runtime(_logger(trt, said)), said, creators)


def _logger(trt: Any, said: list[str]) -> Any:
    severity = trt.ILogger.Severity

    class Logger(trt.ILogger):  # type: ignore[misc]
        """Errors are kept, to be told with what they are the reason of; warnings are passed on."""

        def __init__(self) -> None:
            super().__init__()

        def log(self, level: Any, message: str) -> None:
            if level in (severity.ERROR, severity.INTERNAL_ERROR):
                said.append(message)
            elif level == severity.WARNING:
                logger.debug("%s", message)

    return Logger()


class _Context:
    """One profile of a plan. Shapes and addresses are told when they change, and only then.

    So that nothing is enqueued but the plan's own work while a stream is captured.
    """

    def __init__(self, library: Library, context: Any, stream: int, what: str) -> None:
        self._library, self._context, self._stream = library, context, stream
        self._what = what
        self._latest: object = None

    def run(self, shapes: Shapes, addresses: Mapping[str, int]) -> None:
        """Enqueue a run (EngineError: the library refuses it)."""
        context = self._context
        if self._latest is not addresses:
            self._latest = None
            for name, shape in shapes.items():
                self._need(context.set_input_shape(name, shape), f"{name} of {shape}")
            for name, address in addresses.items():
                self._need(context.set_tensor_address(name, address), f"the address of {name}")
            self._latest = addresses
        self._need(context.execute_async_v3(self._stream), f"a run of {dict(shapes)}")

    def _need(self, done: bool, what: str) -> None:
        if not done:
            raise EngineError(
                f"{self._library.trt.__name__} failed to run {self._what}.",
                found=self._library.words(),
                expected=what[:300],
                fix="vlmforge doctor; if all is well there, rebuild the engine on this machine",
            )


class Scratch(Struct, frozen=True):
    """Where plans calculate what is in between, one after the other. `size` in bytes."""

    memory: Memory
    size: int


class Plan:
    """A deserialised plan, with a context for each of its profiles, which share their scratch.

    See `load_plans`.
    """

    def __init__(
        self,
        library: Library,
        engine: Any,
        file: Path,
        part: Part,
        device: Device,
        scratch: Scratch,
    ) -> None:
        self._engine, self._scratch = engine, scratch  # the contexts are of both
        self._names = _names(engine, file, part)
        strategy = library.trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._contexts: dict[str, _Context] = {}
        for index, profile in enumerate(part.profiles):
            context = engine.create_execution_context(strategy)
            if context is None:
                raise _refused(library, file)
            context.set_device_memory(scratch.memory.address, scratch.size)
            if not context.set_optimization_profile_async(index, device.stream):
                raise _refused(library, file)
            what = f"{file.name} ({profile.name})"
            self._contexts[profile.name] = _Context(library, context, device.stream, what)

    def bind(self, profile: str, shapes: Shapes, addresses: Mapping[str, int]) -> Work:
        """What enqueues a run, all of whose inputs have these shapes (see `_Context.run`)."""
        known = {name: shape for name, shape in shapes.items() if name in self._names}
        bound = {name: address for name, address in addresses.items() if name in self._names}
        return partial(self._contexts[profile].run, known, bound)


def load_plans(
    library: Library, folder: Path, parts: Sequence[Part], device: Device
) -> tuple[Plan, ...]:
    """Plans that run one after the other on `device`: they have one scratch.

    Args:
        library: What they were compiled by.
        folder: Where their files are.
        parts: What the manifest says of each; chains are not looked at.
        device: Runs them.

    Raises:
        BackendUnavailableError: the library refuses one: it is of another version or another GPU.
        EngineError: one is not what the manifest says, or there is no memory for it.
    """
    files = [folder / part.file for part in parts]
    engines = [_deserialised(library, file) for file in files]
    size = max(1, *(_scratch_bytes(*pair) for pair in zip(engines, parts, strict=True)))
    scratch = Scratch(device.allocate(size), size)
    return tuple(
        Plan(library, engine, file, part, device, scratch)
        for engine, file, part in zip(engines, files, parts, strict=True)
    )


def _scratch_bytes(engine: Any, part: Part) -> int:
    profiles = range(min(engine.num_optimization_profiles, len(part.profiles)))
    return max((engine.get_device_memory_size_for_profile_v2(n) for n in profiles), default=0)


def _deserialised(library: Library, file: Path) -> Any:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise EngineError(
            f"{file} cannot be read.",
            found=str(error.strerror),
            expected="the plan as build-engine wrote it",
            fix="copy the engine again, or rebuild it",
        ) from error
    library.said.clear()
    engine = library.runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise _refused(library, file)
    return engine


def _refused(library: Library, file: Path) -> BackendUnavailableError:
    name = library.trt.__name__
    return BackendUnavailableError(
        f"{name} {library.trt.__version__} refuses the plan {file.name}.",
        found=library.words()[:400],
        expected="a plan of this very version, for this kind of GPU, and memory for it",
        fix=f"rebuild the engine with the {name} that is installed here: build-engine CHECKPOINT "
        "-o ENGINE --force; or install the version that it was built with",
    )


def _names(engine: Any, file: Path, part: Part) -> frozenset[str]:
    """The tensors of a plan (EngineError: not the part's). Inputs that it does not use may lack."""
    names = frozenset(engine.get_tensor_name(index) for index in range(engine.num_io_tensors))
    given, taken = ({spec.name for spec in specs} for specs in (part.outputs, part.inputs))
    profiles = engine.num_optimization_profiles
    wrong = (names - given - taken) | (given - names)
    if wrong or profiles != len(part.profiles):
        raise EngineError(
            f"The plan {file.name} is not the one that the engine describes.",
            found=f"{profiles} profiles, and tensors that only one of both knows: "
            f"{', '.join(sorted(wrong)[:6]) or 'none'}",
            expected=f"{len(part.profiles)} profiles, and {len(given | taken)} tensors",
            fix="rebuild the engine: build-engine CHECKPOINT -o ENGINE --force",
        )
    return names


class PlanVision(VisionSession):
    """A vision part that is a plan; as many views at once as it was compiled for."""

    def __init__(self, device: Device, library: Library, folder: Path, part: Part) -> None:
        (self._plan,) = load_plans(library, folder, [part], device)
        self._device, self._part = device, part
        (profile,) = part.profiles
        self._profile, self._most = profile.name, profile.dims[IMAGES].most
        most = {name: dim.most for name, dim in profile.dims.items()}
        self._arena = device.allocate(self._arrange(most).size)

    def _arrange(self, dims: Mapping[str, int]) -> Arrangement:
        return in_a_row(self._part.inputs, self._part.outputs, dims)

    @override
    def encode(self, pixel_values: FloatArray, arrays: Arrays = NO_ARRAYS) -> FloatArray:
        starts = range(0, len(pixel_values), self._most)
        parts = (pixel_values[start : start + self._most] for start in starts)
        return np.concatenate([self._run({PIXEL_VALUES: part, **arrays}) for part in parts])

    def _run(self, arrays: Arrays) -> FloatArray:
        device, specs = self._device, self._part.inputs
        dims = {
            dim: size
            for spec in specs
            for dim, size in zip(spec.shape, arrays[spec.name].shape, strict=True)
            if isinstance(dim, str)
        }
        arrangement = self._arrange(dims)
        at = {name: self._arena.address + o for name, o in arrangement.offsets.items()}
        for spec in specs:
            values = np.ascontiguousarray(arrays[spec.name], spec.dtype)
            device.upload(at[spec.name], values)
        shapes = {spec.name: arrays[spec.name].shape for spec in specs}
        self._plan.bind(self._profile, shapes, at)()
        (given,) = self._part.outputs
        kind = np.dtype(DTYPES[given.dtype])
        found = device.download(at[IMAGE_FEATURES], shape_of(given, dims), kind)
        return decode(found, given.dtype).astype(np.float32)
