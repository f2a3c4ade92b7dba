"""Backends: what runs an engine's parts. One module per backend, one line in the table each.

A backend shares its stem with the target of the builder that compiles for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from vlmforge.backends.features import Features
from vlmforge.engine.images.patch_inputs import NO_ARRAYS, Arrays
from vlmforge.engine.manifest import Manifest
from vlmforge.errors import BackendUnavailableError
from vlmforge.kv.cache import Move
from vlmforge.limits import Room

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]


class LoadOptions(Struct, frozen=True):
    """How to load an engine.

    Attributes:
        slots: Sequences that the key/value cache holds.
        capacity: Tokens that each of them may hold.
        budget: Blocks of `block_size` tokens that all of them together may hold; None: no limit
            but their capacity.
        block_size: Tokens of a block, by which the cache's memory is counted.
        paged: Whether the cache is a pool of such blocks, or one slot for each sequence.
        chunk: Tokens of the prompts of one step, at most.
        threads: Threads of arithmetic; None: one for each physical core.
        pack: True copies the weights into the layout that matrix products read fastest: batches
            decode about twice as fast, but loading takes longer. False maps them from the file:
            loading is immediate, the system can reclaim the memory, and 16-bit weights are widened
            at every use.
        mpi: Whether the ranks of an engine are those that mpirun has started.
        prompts: Whose parts may be run in one step.
        apart: Whether they are run one after the other there, not at once (see
            `DecoderBatch.lengths`).
        packs: Whether these take the time and the memory of their own tokens, not each those of
            the longest; `chunk` may be more than `capacity` then.
        devices: Numbers of the GPUs, one for each rank; empty: the first ones.
        features: Bytes of image features that are kept on the device, if any stay there.
    """

    slots: int
    capacity: int
    threads: int | None = None
    pack: bool = True
    budget: int | None = None
    block_size: int = 64
    paged: bool = False
    chunk: int = 512
    mpi: bool = False
    prompts: int = 1
    apart: bool = False
    packs: bool = False
    devices: tuple[int, ...] = ()
    features: int = 0

    def device(self, rank: int) -> int:
        """The number of a rank's GPU."""
        return self.devices[rank] if self.devices else rank

    @property
    def whole_place(self) -> tuple[int, ...]:
        """The place of a sequence that is alone and may fill the cache (see `KVCache.place`)."""
        return tuple(range(self.blocks)) if self.paged else (0,)

    @property
    def blocks(self) -> int:
        """Blocks that the sequences may hold."""
        most = self.slots * -(-self.capacity // self.block_size)
        return most if self.budget is None else min(most, self.budget)


class VisionSession(Protocol):
    """Runs the vision part."""

    def encode(
        self, pixel_values: FloatArray, arrays: Arrays = NO_ARRAYS
    ) -> FloatArray | Sequence[Features]:
        """`[n, 3, H, W]`, or `[n, tokens, patches, values]`, to features `[n, tokens, width]`.

        Or to those of each view, where they stay on the device. `arrays` are what else it takes,
        by name: see `PatchInterface`.
        """


class DecoderBatch(Struct, frozen=True):
    """Rows of equal length that run together. B > 1 is for decoding, one token each, or `lengths`.

    Attributes:
        slots: Where the sequence of each row is; all different.
        input_ids: int64 `[B, S]`; an id >= vocab_size is row `id - vocab_size` of
            `image_features`.
        past_lengths: int64 `[B]`, tokens already in each slot.
        image_features: `[R, hidden]`, or None when no id refers to one. On the device only of who
            has been loaded with the vision part (`WholeBackend`).
        logits_indices: int64 `[B, K]`, positions in 0..S-1 to return logits of; K may be 0.
        rotary_levels: int64 `[B]`, for an engine whose position policy has levels.
        blocks: The blocks of each row's sequence, in order, for a cache that is a pool of them.
        turns: float32 `[B, S, turn_width]`, for an engine whose position policy gives them.
        lengths: int64 `[B]`, how many of a row's tokens are there where rows are filled up; None:
            all. Only for a cache that is a pool of blocks.
    """

    slots: Sequence[int]
    input_ids: IntArray
    past_lengths: IntArray
    image_features: Features | None
    logits_indices: IntArray
    rotary_levels: IntArray | None = None
    blocks: Sequence[Sequence[int]] = ()
    turns: FloatArray | None = None
    lengths: IntArray | None = None


KeyValues = Mapping[str, NDArray[Any]]
"""Keys and values of a sequence's first tokens: "key.0", "value.0", ... of each layer, in the
cache's dtype `[kv_heads, tokens, head_dim]`."""


class DecoderSession(Protocol):
    """Runs the decoder part over key/value slots that it owns."""

    def step(self, batch: DecoderBatch) -> FloatArray:
        """Run a batch; returns logits `[B, K, vocab_size]` (EngineError: the library failed).

        Those of a step of decoding (S = 1) are valid until the next step.
        """

    def move(self, move: Move) -> None:
        """Copy or drop what the cache's bookkeeping asks for."""

    def read(self, place: Sequence[int], tokens: int) -> KeyValues:
        """A copy of the first `tokens` tokens of a sequence (see `KVCache.place`).

        Raises:
            BackendUnavailableError: this backend cannot.
        """
        raise _no_rows()

    def write(self, place: Sequence[int], rows: KeyValues, start: int) -> None:
        """Put back what `read` gave: from now on these are the first tokens at `place`.

        The first `start` of them are there already, and may be others' too: they are left alone.

        Raises:
            BackendUnavailableError: this backend cannot.
            SessionError: they are not of this decoder's cache; nothing was written.
        """
        raise _no_rows()


def _no_rows() -> BackendUnavailableError:
    return BackendUnavailableError(
        "The engine's backend does not hand out its key/value cache.",
        found="a session to be saved, or restored, with its cache",
        expected="a backend that can read and write it, such as onnxruntime",
        fix="save it without: session.save(path, cache=False); it is computed again",
    )


class Communicator(Protocol):
    """How the ranks of an engine meet, whatever carries what they give each other.

    Attributes:
        rank: Of this process.
        size: Ranks that there are.
        room: Floats that a rank may give at one meeting.
    """

    rank: int
    size: int
    room: int

    def meet(self, values: FloatArray) -> Sequence[FloatArray]:
        """Give `values`, float32 `[n]` with n <= room; returns what each rank gave, by rank.

        All ranks meet equally often and with equally many values. What is returned is valid until
        the next meeting.

        Raises:
            RankError: a rank is no more, or does not answer.
            EOFError: on ranks other than the first: another one is no more.
        """

    def watch(self, alarm: Callable[[], None]) -> None:
        """Have `alarm` called, by any thread, when a rank is lost, and when all end.

        For who waits where nothing can be raised, such as for a GPU. It is called soon, perhaps
        more than once, and is a method of what it does not keep alive. Ranks other than the first
        are ended then, without being asked.
        """
        del alarm

    def check(self) -> None:
        """RankError: a rank is lost, or all have ended."""


@runtime_checkable
class LikeliestDecoder(Protocol):
    """A `DecoderSession` that can spare its caller the logits."""

    def likeliest(self, batch: DecoderBatch) -> IntArray:
        """Run a step of decoding; the ids int64 `[B]` of each row's largest logit.

        The lowest of equals, as `argmax` has it; -1 where logits are not finite. EngineError: the
        library failed.
        """


@runtime_checkable
class FollowingDecoder(Protocol):
    """A `DecoderSession` that can do its share of a step that another rank has asked for."""

    def follow(self, batch: DecoderBatch) -> None:
        """Begin what any call of the first rank's does with `batch`; nothing is waited for.

        EngineError: the library failed, now or in an earlier step.
        """

    def follow_tokens(self, batch: DecoderBatch, ahead: IntArray, *, chosen: bool) -> None:
        """As `follow`, of a step that the first rank begins (see `OverlappingDecoder.begin`).

        Its tokens are those that the first rank has `chosen`, or else the likeliest, which every
        rank finds itself.
        """

    def follow_first(self, batch: DecoderBatch, *, chosen: bool) -> None:
        """The same of `FirstTokenDecoder.begin_first`."""


@runtime_checkable
class ClosableDecoder(Protocol):
    """A `DecoderSession` that has started more than this process."""

    def close(self) -> None:
        """End that. May be called more than once."""


class Backend(Protocol):
    """Loads the parts of an engine."""

    def load_vision(self, folder: Path, manifest: Manifest, options: LoadOptions) -> VisionSession:
        """Load the part "vision" (EngineError otherwise)."""

    def load_decoder(
        self, folder: Path, manifest: Manifest, options: LoadOptions
    ) -> DecoderSession:
        """Load the part "decoder" and make its key/value slots (EngineError otherwise)."""

    def load_rank(
        self, folder: Path, manifest: Manifest, options: LoadOptions, ranks: Communicator
    ) -> DecoderSession:
        """Load the decoder of rank `ranks.rank`, with its share of the key/value slots.

        Raises:
            BackendUnavailableError: this backend has no tensor parallelism.
        """
        del folder, options, ranks
        raise one_rank_only(manifest)

    def memory(self, devices: Sequence[int] = (0,)) -> Room | None:
        """What it may take of the memory of each of its own devices, of those with these numbers.

        None: it has none, and engines lie in this process's memory.
        """

    def check(self) -> None:
        """Whether this machine can run its engines (BackendUnavailableError otherwise)."""

    def versions(self) -> Sequence[tuple[str, str]]:
        """Names and versions of the libraries in use, for `vlmforge doctor`."""


@runtime_checkable
class WholeBackend(Protocol):
    """A `Backend` that loads both parts in one call."""

    def load_parts(
        self, folder: Path, manifest: Manifest, options: LoadOptions
    ) -> tuple[VisionSession, DecoderSession]:
        """As `load_vision` and `load_decoder`, of an engine of one rank (EngineError: they fail).

        Features that the vision part may leave on a device are for this very decoder.
        """


def one_rank_only(manifest: Manifest) -> BackendUnavailableError:
    """What is to be said of an engine of several ranks, for a backend that has none."""
    return BackendUnavailableError(
        f"Engines for {manifest.backend} run on one rank here.",
        found=f"an engine of {manifest.parallel.tp} ranks",
        expected="tp=1 for this backend, or an engine for onnxruntime",
        fix="build-engine CHECKPOINT -o ENGINE --tp 1",
    )


BACKENDS = ("onnxruntime", "cuda", "tensorrt", "tensorrt_rtx")
"""The first runs everywhere."""


def load_backend(name: str) -> Backend:
    """The backend called `name`.

    Raises:
        BackendUnavailableError: unknown to this version, or its library is not installed.
    """
    if name not in BACKENDS:
        raise BackendUnavailableError(
            "The engine was built for a backend that this version does not have.",
            found=repr(name),
            expected="one of: " + ", ".join(BACKENDS),
            fix="install a newer vlmforge, or rebuild with --target onnxruntime",
        )
    try:
        return cast("Backend", importlib.import_module(f"vlmforge.backends.{name}").BACKEND)
    except ImportError as error:
        raise BackendUnavailableError(
            f"The backend {name} is not installed here.",
            found=str(error),
            expected=f"the library of the backend {name}",
            fix=f"pip install {name}",
        ) from error
