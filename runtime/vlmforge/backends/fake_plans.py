"""A library in the place of TensorRT's, for tests: plans that hold the graph they would be of.

    with plans_on_cpu("tensorrt_rtx"), pipeline("ENGINE") as pipe:
        ...

All else is the code of the backends: pool, buckets, scheduler, and every call of the library. Its
engines and contexts refuse what the real ones would: tensors without shape or address, sizes out of
a profile's range, plans of another version. A plan's graph has the plugin's nodes by their function
bodies, and is run by ONNX Runtime's CPU provider; so plans of bfloat16 are not among them.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from vlmforge.backends.fake import HostDevice
from vlmforge.backends.fake_memory import memory_as
from vlmforge.backends.plans import Library, open_library
from vlmforge.backends.ranks import processes
from vlmforge.backends.tensorrt import PlanBackend
from vlmforge.ort import ort

VERSION = "1.7.1.116"
_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}
Ranges = Mapping[str, tuple[int, int]]
"""Least and most of each dimension."""


def written_plan(graph: bytes, profiles: Sequence[Ranges], version: str = VERSION) -> bytes:
    """A plan of an ONNX graph, which has its weights and function bodies in it."""
    head = json.dumps({"version": version, "profiles": profiles}).encode()
    return b"%8d" % len(head) + head + graph


def graph_of(plan: bytes) -> bytes:
    """The graph that `written_plan` was given."""
    return plan[8 + int(plan[:8]) :]


class _Severity(IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class _Logger:
    Severity = _Severity

    def log(self, level: _Severity, message: str) -> None:
        """Replaced by whoever listens."""


class _Registry:
    def __init__(self) -> None:
        self.creators: dict[str, Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        """As the library's."""
        self.creators[f"{namespace}::{creator.name}"] = creator
        return True


class _Context:
    """See `IExecutionContext`. `memory` was given: it allocates none of its own."""

    def __init__(self, engine: _Engine) -> None:
        self._engine = engine
        self._profile: int | None = None
        self._memory = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}

    def set_device_memory(self, memory: int, size: int) -> None:
        """As the library's."""
        assert size >= self._engine.get_device_memory_size_for_profile_v2(0)
        self._memory = memory

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """As the library's."""
        del stream_handle
        self._profile = profile_index
        return 0 <= profile_index < self._engine.num_optimization_profiles

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        """As the library's."""
        assert self._profile is not None
        dims, ranges = self._engine.inputs[name].shape, self._engine.profiles[self._profile]
        for dim, size in zip(dims, shape, strict=True):
            least, most = ranges[dim] if isinstance(dim, str) else (dim, dim)
            if not least <= size <= most:
                return self._engine.fails(f"{name}: {size} is not in [{least}, {most}]")
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        """As the library's."""
        if name not in self._engine.names or memory % 16:
            return self._engine.fails(f"{name}: no tensor, or its memory is not aligned")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        """As the library's."""
        del stream_handle
        engine = self._engine
        missing = {*engine.names} - {*self._addresses} | {*engine.inputs} - {*self._shapes}
        if missing or not self._memory:
            return engine.fails(f"not told everything: {sorted(missing)}")
        feeds = {
            name: memory_as(self._addresses[name], _DTYPES[item.type], self._shapes[name])
            for name, item in engine.inputs.items()
        }
        outputs = [name for name in engine.names if name not in engine.inputs]
        for name, values in zip(outputs, engine.session.run(outputs, feeds), strict=True):
            self._write(name, values)
        return True

    def _write(self, name: str, values: NDArray[Any]) -> None:
        memory_as(self._addresses[name], values.dtype, values.shape)[:] = values


@dataclass
class _Engine:
    """See `ICudaEngine`."""

    session: ort.InferenceSession
    profiles: Sequence[Ranges]
    logger: _Logger
    inputs: dict[str, Any] = field(init=False)
    names: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.inputs = {item.name: item for item in self.session.get_inputs()}
        self.names = [*self.inputs, *(item.name for item in self.session.get_outputs())]

    @property
    def num_io_tensors(self) -> int:
        """As the library's."""
        return len(self.names)

    @property
    def num_optimization_profiles(self) -> int:
        """As the library's."""
        return len(self.profiles)

    def get_tensor_name(self, index: int) -> str:
        """As the library's."""
        return self.names[index]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        """As the library's."""
        return 1024 << profile_index

    def create_execution_context(self, strategy: str) -> _Context:
        """As the library's."""
        assert strategy == "user managed"
        return _Context(self)

    def fails(self, reason: str) -> bool:
        """What the library says and gives where it refuses."""
        self.logger.log(_Severity.ERROR, reason)
        return False


class _Runtime:
    def __init__(self, logger: _Logger, registry: _Registry) -> None:
        self._logger, self._registry = logger, registry

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> _Engine | None:
        """As the library's."""
        size = int(serialized_engine[:8])
        head = json.loads(serialized_engine[8 : 8 + size])
        if head["version"] != VERSION:
            words = f"expecting library version {VERSION} got {head['version']}"
            self._logger.log(_Severity.ERROR, f"The plan file is not compatible: {words}")
            return None
        if not self._registry.creators:
            self._logger.log(_Severity.ERROR, "Cannot find plugin: PagedAttention")
            return None
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        graph, providers = graph_of(serialized_engine), ["CPUExecutionProvider"]
        session = ort.InferenceSession(graph, options, providers=providers)
        return _Engine(session, head["profiles"], self._logger)


def stand_in_library(name: str) -> Any:
    """What stands for the module `tensorrt` or `tensorrt_rtx`."""
    registry = _Registry()
    interfaces = ("IPluginV3", "IPluginV3OneCore", "IPluginV3OneBuildV2", "IPluginV3OneRuntime")
    return SimpleNamespace(
        __name__=name,
        __version__=VERSION,
        ILogger=_Logger,
        Runtime=lambda logger: _Runtime(logger, registry),
        ExecutionContextAllocationStrategy=SimpleNamespace(USER_MANAGED="user managed"),
        get_plugin_registry=lambda: registry,
        IPluginCreatorV3One=type("IPluginCreatorV3One", (), {}),
        PluginField=lambda name, data, kind: SimpleNamespace(name=name, data=data, type=kind),
        PluginFieldType=SimpleNamespace(INT32=0, FLOAT32=1, INT8=2),
        PluginFieldCollection=list,
        **{interface: type(interface, (), {}) for interface in interfaces},
    )


@dataclass(frozen=True, slots=True)
class HostPlanBackend(PlanBackend):
    """A backend of plans on the processor."""

    @override
    def memory(self, devices: Sequence[int] = (0,)) -> None:
        return None

    @override
    def check(self) -> None:
        """Runs everywhere."""

    @override
    def device(self, number: int = 0) -> HostDevice:
        return HostDevice()

    @override
    def library(self) -> Library:
        return open_library(stand_in_library(self.module))


@contextmanager
def plans_on_cpu(name: str) -> Iterator[None]:
    """Engines of the backend `name` that are loaded within the block run on the processor.

    So do the processes of other ranks that are started within it.
    """
    module = importlib.import_module(f"vlmforge.backends.{name}")
    real: PlanBackend = module.BACKEND
    stand_in = HostPlanBackend(real.name, real.module, real.requirement, real.gpus)
    module.__dict__["BACKEND"] = stand_in
    child, processes.CHILD = processes.CHILD, "vlmforge.backends.fake_rank"
    try:
        yield
    finally:
        module.__dict__["BACKEND"], processes.CHILD = real, child
