"""The processor in the place of a GPU, for tests: all code of the backend `cuda` but the driver's.

    with cuda_on_cpu(), pipeline("ENGINE") as pipe:
        ...

Segments run by ONNX Runtime's CPU provider, which calculates a float16 graph in float32; kernels by
numpy, from the very parameters of their launches. That provider has no bfloat16: whoever has the
builder can open such graphs as float32 ones (`Graphs`, `vlmforge_builder.widened_graphs`).
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray
from typing_extensions import override

from vlmforge.backends import Communicator, cuda
from vlmforge.backends.cuda import CudaBackend
from vlmforge.backends.cuda.device import (
    Arriving,
    Device,
    Mark,
    MeetingPlace,
    Segment,
    T,
    Tensor,
    Work,
)
from vlmforge.backends.cuda.segments import OrtSegment, open_session
from vlmforge.backends.fake_gates import NumpyGates
from vlmforge.backends.fake_marks import Arrived, HostMark
from vlmforge.backends.fake_meetings import HostMeetings
from vlmforge.backends.fake_memory import bits_of, memory_as, narrow, numbers_of
from vlmforge.backends.number_formats import DTYPES, decode, encode, rounded
from vlmforge.backends.ranks import processes
from vlmforge.ort import ort
from vlmforge_plugins.cached_attention.config import TARGETS, Config, Sizes, sizes
from vlmforge_plugins.cached_attention.kernel_store import Loaded
from vlmforge_plugins.cached_attention.launcher import MAP_BYTES, Boxes, Kernels, Params
from vlmforge_plugins.cached_attention.plan import Launch, Machine
from vlmforge_plugins.gated_activation import launcher as gated
from vlmforge_plugins.token_choice import launcher as choice

_POISON, _MOST_POISON = 0x7F, 1 << 26
MakeKernels = Callable[[Sizes], Kernels]
Arrays = Mapping[str, NDArray[Any]]
Note = Callable[[Sequence[Tensor], Sequence[Tensor], Arrays], None]
"""Inputs and outputs of a run, and all that the graph gave, by its names."""


class NumpyKernels:
    """The attention's kernels by numpy, in float32."""

    def __init__(self, chosen: Sizes) -> None:
        self._config = chosen.config

    def tile_map(self, boxes: Boxes) -> bytes:
        """Nothing reads it here."""
        del boxes
        return bytes(MAP_BYTES)

    def launch(self, launch: Launch, params: Params, stream: int) -> None:
        """Do what the kernel does."""
        del stream
        call = _Call(params, self._config)
        for row in range(params.batch):
            if launch.kernel == "vf_write":
                call.write(row)
            elif launch.kernel != "vf_combine":
                call.attend(row)


class _Call:
    """A launch's parameters as arrays of bits."""

    def __init__(self, params: Params, config: Config) -> None:
        p = self._p = params
        self._type, self._stored = config.activation, config.stored
        self._width, self._page = config.head_size, 1 << p.page_shift
        self._past = memory_as(p.past_lengths, np.int32, (p.batch,))
        most = np.full(p.batch, p.max_query, np.int32)
        lengths = p.query_lengths
        self._new = memory_as(lengths, np.int32, (p.batch,)) if lengths else most
        self._table = memory_as(p.block_table, np.int32, (p.batch, p.max_pages))

    def write(self, row: int) -> None:
        """New keys and values to their pages."""
        p, places = self._p, self._places(row)
        if not len(places):
            return
        key = self._rotated(self._rows(p.key, p.key_batch, p.key_row, row, p.kv_heads), places)
        value = self._numbers(self._rows(p.value, p.value_batch, p.value_row, row, p.kv_heads))
        keys = encode(key * np.float32(p.key_inverse_scale), self._stored)
        values = encode(value * np.float32(p.value_inverse_scale), self._stored)
        for place, new_key, new_value in zip(places, keys, values, strict=True):
            page, offset = self._table[row, place // self._page], place % self._page
            self._pool(p.key_pool, page)[:, offset] = new_key
            self._pool(p.value_pool, page)[:, offset] = new_value

    def attend(self, row: int) -> None:
        """Attention of the new queries over all tokens of the sequence that come before them."""
        p, places = self._p, self._places(row)
        if not len(places):
            return
        query = self._rotated(self._rows(p.query, p.query_batch, p.query_row, row, p.heads), places)
        query = rounded(query, self._type).astype(np.float32)
        key, value = self._held(p.key_pool, row), self._held(p.value_pool, row)
        group = p.heads // p.kv_heads
        grouped = query.transpose(1, 0, 2).reshape(p.kv_heads, -1, self._width)
        scores = grouped @ key.transpose(0, 2, 1) * (p.scale_log2 * np.float32(np.log(2)))
        scores = scores.reshape(p.kv_heads, group, len(places), -1)
        later = np.arange(scores.shape[-1]) > places[:, None]
        scores = np.where(later, -np.inf, scores)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = weights.reshape(p.kv_heads, -1, weights.shape[-1]) @ value
        mixed = mixed.reshape(p.heads, len(places), self._width).transpose(1, 0, 2)
        out = self._rows(p.out, p.out_batch, p.out_row, row, p.heads)
        out[:] = encode(mixed * np.float32(p.value_scale), self._type)

    def _places(self, row: int) -> NDArray[np.int64]:
        return int(self._past[row]) + np.arange(int(self._new[row]))

    def _numbers(self, bits: NDArray[Any]) -> NDArray[np.float32]:
        return decode(bits, self._type).astype(np.float32)

    def _rows(
        self, address: int, batch_stride: int, row_stride: int, row: int, heads: int
    ) -> NDArray[np.uint16]:
        """`[new tokens, heads, D]`, in place."""
        new = int(self._new[row])
        start = address + 2 * row * batch_stride
        used = heads * self._width
        flat = memory_as(start, np.uint16, ((new - 1) * row_stride + used,))
        shape, strides = (new, heads, self._width), (2 * row_stride, 2 * self._width, 2)
        return np.lib.stride_tricks.as_strided(flat, shape, strides)

    def _rotated(self, rows: NDArray[np.uint16], places: NDArray[np.int64]) -> NDArray[np.float32]:
        p, half, numbers = self._p, self._width // 2, self._numbers(rows)
        if not p.cos:
            return numbers
        cos, sin = (
            np.stack([memory_as(t + 4 * half * int(i), np.float32, (half,)) for i in places])[
                :, None
            ]
            for t in (p.cos, p.sin)
        )
        first, second = numbers[..., :half], numbers[..., half:]
        return np.concatenate((first * cos - second * sin, second * cos + first * sin), -1)

    def _pool(self, address: int, page: int) -> NDArray[Any]:
        """One page, `[kv_heads, page_size, D]`."""
        shape, dtype = (self._p.kv_heads, self._page, self._width), np.dtype(DTYPES[self._stored])
        return memory_as(address + int(page) * dtype.itemsize * int(np.prod(shape)), dtype, shape)

    def _held(self, address: int, row: int) -> NDArray[np.float32]:
        """`[kv_heads, tokens, D]` of a sequence, new tokens included, without the scale."""
        total = int(self._past[row]) + int(self._new[row])
        pages = [self._pool(address, page) for page in self._table[row, : -(-total // self._page)]]
        bits = np.concatenate(pages, 1)[:, :total]
        return decode(bits, self._stored).astype(np.float32)


class Graphs(Protocol):
    """How the graphs of an engine are opened."""

    def session(self, file: Path) -> ort.InferenceSession:
        """A graph that is run from arrays (EngineError: it cannot be loaded)."""

    def segment(self, file: Path, owner: object) -> Segment:
        """A graph whose tensors lie in memory (EngineError: see `session`)."""


class AsTheyAre(Graphs):
    """The very files, opened once."""

    @override
    def session(self, file: Path) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        return open_session(file, ["CPUExecutionProvider"], options)

    @override
    def segment(self, file: Path, owner: object) -> Segment:
        return OrtSegment(self.session(file), "cpu", owner)


@dataclass(frozen=True, slots=True)
class InFloat32(Graphs):
    """Graphs that `open` gives in float32, whatever the files are in.

    A segment is opened for each run: of a large model they do not fit the memory together.
    """

    open: Callable[[Path], ort.InferenceSession]

    @override
    def session(self, file: Path) -> ort.InferenceSession:
        return self.open(file)

    @override
    def segment(self, file: Path, owner: object) -> Segment:
        return Float32Segment(self.open, file)


@dataclass(frozen=True, slots=True)
class Float32Segment(Segment):
    """A segment of `file`, which `open` gives in float32; `note` gets all that goes in and out."""

    open: Callable[[Path], ort.InferenceSession]
    file: Path
    note: Note | None = None

    @override
    def bind(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Work:
        def work() -> None:
            session = self.open(self.file)
            feeds = {tensor.in_graph: numbers_of(tensor) for tensor in inputs}
            names = [item.name for item in session.get_outputs()]
            found = dict(zip(names, session.run(names, feeds), strict=True))
            for tensor in outputs:
                values = found[tensor.in_graph]
                bits_of(tensor)[:] = encode(values, tensor.dtype) if narrow(tensor) else values
            if self.note is not None:
                self.note(inputs, outputs, found)

        return work


class HostMemory(Struct, frozen=True):
    """See `Memory`."""

    address: int
    kept: NDArray[np.uint8]


class HostDevice(Device):
    """See `Device`.

    Attributes:
        captures: How often something was captured.
        replays: How often something captured was launched.
    """

    stream = 0
    machine = Machine(multiprocessors=4, shared_bytes=227 << 10)

    def __init__(self, kernels: MakeKernels = NumpyKernels, graphs: Graphs | None = None) -> None:
        self._kernels, self._graphs = kernels, graphs or AsTheyAre()
        self.captures = self.replays = 0

    @override
    def allocate(self, size: int) -> HostMemory:
        """What is in a small piece is no number, as it might be on a GPU."""
        fill = _POISON if size < _MOST_POISON else 0  # of zeros only those in use take memory
        kept = np.full(size + 256, fill, np.uint8) if fill else np.zeros(size + 256, np.uint8)
        return HostMemory(kept.ctypes.data + -kept.ctypes.data % 256, kept)

    @override
    def upload(self, address: int, values: NDArray[Any]) -> None:
        ctypes.memmove(address, np.ascontiguousarray(values).ctypes.data, values.nbytes)

    @override
    def download(self, address: int, shape: tuple[int, ...], dtype: np.dtype[T]) -> NDArray[T]:
        return memory_as(address, dtype, shape).copy()

    @override
    def fetch(self, address: int, size: int) -> Arriving:
        found = self.download(address, (size,), np.dtype(np.uint8))
        return Arrived(self.mark(), found)

    @override
    def mark(self) -> Mark:
        return HostMark(time.perf_counter())

    @override
    def copy(self, source: int, target: int, size: int) -> None:
        ctypes.memmove(target, source, size)

    @override
    def weights(self, file: Path, places: Sequence[tuple[int, int]]) -> Sequence[HostMemory]:
        """Where the file is mapped."""
        mapped = np.memmap(file, np.uint8, "r") if places else np.empty(0, np.uint8)
        begin = mapped.ctypes.data
        return [HostMemory(begin + offset, mapped) for offset, _ in places]

    @override
    def segment(self, file: Path) -> Segment:
        return self._graphs.segment(file, self)

    @override
    def session(self, file: Path) -> ort.InferenceSession:
        return self._graphs.session(file)

    @override
    def kernels(self, config: Config, files: Mapping[str, Path]) -> Loaded:
        """As they would be on a GPU of one of the kinds."""
        target = next(target for target in TARGETS if target.name in files)
        chosen = sizes(config, target)
        return Loaded(self._kernels(chosen), chosen, self.machine)

    @override
    def activations(self, name: str, files: Mapping[str, Path]) -> gated.Kernels:
        return NumpyGates()

    @override
    def choosers(self, files: Mapping[str, Path]) -> choice.Kernels | None:
        """The graphs do."""
        return None

    @override
    def meeting_place(self, ranks: Communicator, files: Mapping[str, Path]) -> MeetingPlace:
        """Through what ranks on the processor meet by."""
        return HostMeetings(ranks)

    @override
    def captured(self, work: Work) -> Work:
        self.captures += 1

        def replay() -> None:
            self.replays += 1
            work()

        return replay


@dataclass(frozen=True, slots=True)
class HostBackend(CudaBackend):
    """The backend `cuda` on the processor.

    `make` takes the place of loading compiled kernels; `graphs` opens the engine's, as they are
    where it is None.
    """

    make: MakeKernels = NumpyKernels
    graphs: Graphs | None = None

    @override
    def memory(self, devices: Sequence[int] = (0,)) -> None:
        return None

    @override
    def check(self) -> None:
        """Runs everywhere."""

    @override
    def device(self, number: int = 0) -> HostDevice:
        return HostDevice(self.make, self.graphs)


@contextmanager
def cuda_on_cpu(
    make: MakeKernels = NumpyKernels,
    graphs: Graphs | None = None,
    program: str = "vlmforge.backends.fake_rank",
) -> Iterator[None]:
    """Engines of the backend `cuda` that are loaded within the block run on the processor.

    So do the processes of other ranks that are started within it: `program` is theirs.
    """
    real, cuda.BACKEND = cuda.BACKEND, HostBackend(make, graphs)
    child, processes.CHILD = processes.CHILD, program
    try:
        yield
    finally:
        cuda.BACKEND, processes.CHILD = real, child
