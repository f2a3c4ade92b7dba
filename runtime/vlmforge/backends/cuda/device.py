"""What a chain asks of the device that runs it. Everything else about a device stays behind this.

There are two: an NVIDIA GPU (`backends.cuda.gpu`), and the processor in its place for tests
(`backends.fake`). All that is enqueued happens in order; nothing waits but what says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from vlmforge.backends import Communicator
from vlmforge.engine.chain import Collective
from vlmforge.ort import ort
from vlmforge_plugins.cached_attention.config import Config
from vlmforge_plugins.cached_attention.kernel_store import Loaded
from vlmforge_plugins.gated_activation import launcher as gated
from vlmforge_plugins.token_choice import launcher as choice

ITEM_BYTES: Mapping[str, int] = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
}
T = TypeVar("T", bound=np.generic)
Work = Callable[[], None]
"""Enqueues something."""


class Tensor(Struct, frozen=True):
    """A tensor of the device's memory, dense and row-major.

    Attributes:
        called: What a graph calls it, where that is not `name`.
        weight: Whether it never changes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    address: int
    called: str = ""
    weight: bool = False

    @property
    def in_graph(self) -> str:
        """What a graph calls it."""
        return self.called or self.name


class Memory(Protocol):
    """A piece of the device's memory, kept as long as this is."""

    @property
    def address(self) -> int:
        """Of its first byte; a multiple of 256."""


class Mark(Protocol):
    """A moment in a stream of work."""

    def since(self, earlier: Mark) -> float:
        """Seconds between two that have passed."""


class Arriving(Protocol):
    """A copy on its way from the device.

    Attributes:
        end: When it is there.
    """

    end: Mark

    def wait(self) -> NDArray[np.uint8]:
        """What was there when all had happened that was enqueued before. Called once."""


class Segment(Protocol):
    """A graph that is loaded."""

    def bind(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Work:
        """What enqueues a run from and to these addresses, as often as it is called.

        Raises (when called):
            EngineError: the library failed.
        """


class SumAndNorm(Struct, frozen=True):
    """A sum over the ranks with what follows it (see `engine.chain.SumNorm`).

    Attributes:
        given: Of this rank.
        added: Is added to the sum of what all give.
        total: Gets that.
        normed: Gets the norm of it.
        scale: Address of the scale.
        epsilon: See `engine.chain.SumNorm`.
    """

    given: Tensor
    added: Tensor
    total: Tensor
    normed: Tensor
    scale: int
    epsilon: float


class MeetingPlace(Protocol):
    """Where a rank meets the others over what lies in their devices' memory.

    All ranks enqueue the same meetings in the same order, whenever their hosts come to it.
    """

    def bind(self, call: Collective, given: Tensor, out: Tensor) -> Work:
        """What enqueues a meeting, as often as it is called, and may be captured.

        Sums are made in float32 and rounded once, or, of large tensors, in any order that is the
        same on all ranks.

        Raises (when called):
            EngineError: a library failed; RankError: a rank is lost.
        """

    def bind_norm(self, call: SumAndNorm) -> Work:
        """As `bind` of a sum, and what follows it: each result is rounded, and taken as such."""

    def broadcast(self, given: int, out: int, count: int) -> Work:
        """As `bind`: `count` int64 of the first rank's at `given` come to be at `out` on all.

        Both are multiples of 8. On the other ranks what is at `given` does not matter, and may be
        what is at `out`.
        """


class Device(Protocol):
    """A device with a stream of work. One thread at a time.

    Attributes:
        stream: The handle that kernels are launched with.
    """

    stream: int

    def allocate(self, size: int) -> Memory:
        """Memory of `size` bytes with anything in it (EngineError: there is not as much)."""

    def upload(self, address: int, values: NDArray[Any]) -> None:
        """Enqueue a copy to the device; `values` may be changed when this returns."""

    def download(self, address: int, shape: tuple[int, ...], dtype: np.dtype[T]) -> NDArray[T]:
        """Wait for all that is enqueued; what is there, until the next download."""

    def fetch(self, address: int, size: int) -> Arriving:
        """Enqueue a copy of `size` bytes to the host, which is not waited for yet."""

    def mark(self) -> Mark:
        """The moment at which all that is enqueued has happened."""

    def copy(self, source: int, target: int, size: int) -> None:
        """Enqueue a copy of `size` bytes within the device's memory."""

    def weights(self, file: Path, places: Sequence[tuple[int, int]]) -> Sequence[Memory]:
        """Memory with pieces of a file in it, each at an offset and of a size, to be read alone.

        Raises:
            EngineError: there is not as much memory; EngineFormatError: the file is shorter.
        """

    def segment(self, file: Path) -> Segment:
        """Load a graph (EngineError: the library cannot)."""

    def session(self, file: Path) -> ort.InferenceSession:
        """Load a graph that is run from arrays and waited for (EngineError: see `segment`)."""

    def kernels(self, config: Config, files: Mapping[str, Path]) -> Loaded:
        """The attention's kernels for this device, of the files by their targets' names.

        Raises:
            BackendUnavailableError: there are none for it.
        """

    def activations(self, name: str, files: Mapping[str, Path]) -> gated.Kernels:
        """The kernel `name` of gated activations, of the files by their targets' names.

        Raises:
            BackendUnavailableError: there are none for it.
        """

    def choosers(self, files: Mapping[str, Path]) -> choice.Kernels | None:
        """The kernel that chooses tokens, of the files by their targets' names; None: graphs do.

        Raises:
            BackendUnavailableError: there is none for it.
        """

    def meeting_place(self, ranks: Communicator, files: Mapping[str, Path]) -> MeetingPlace:
        """Meet the others for the first time; all ranks do, with one device each.

        `files`: compiled kernels by their targets' names (see `PartChain.meetings`).

        Raises:
            BackendUnavailableError: there is no way that all of them have.
            RankError: a rank is lost.
        """

    def captured(self, work: Work) -> Work:
        """The same work, which has been done once, as one launch."""
