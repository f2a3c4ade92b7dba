"""Where the time of a question about one picture goes, from the call to its first token.

    python bench/image_path.py ENGINE                    # on whatever the engine is for
    python bench/image_path.py ENGINE --on-cpu           # one of the target cuda, on the processor
    python bench/image_path.py ENGINE --burst 64 --new-tokens 128
    python bench/image_path.py ENGINE --check            # features on the device, and their time

Each question has a picture of its own that was never seen before. Shown are medians over the
questions behind the first few: when each piece begins after the call, how long it takes, and by
which thread it is done; what is within another piece is indented. `device:` is the time of the
device itself. `--burst` asks many questions at once instead, and adds the pieces up: what is more
than the wall's time is done by several threads at once, or counted within something else too.
`--check` compares features that stay on the device with those of the same graph run from arrays,
and tells how long so many views take.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / folder) for folder in ("runtime", "plugins_cuda")]

from vlmforge import EngineConfig, GenerationConfig, Pipeline, pipeline  # noqa: E402
from vlmforge.backends.cuda.vision import DeviceVision  # noqa: E402
from vlmforge.engine.interface import PIXEL_VALUES  # noqa: E402
from vlmforge.runner import runner, work  # noqa: E402
from vlmforge.runner.features import FeatureCache  # noqa: E402
from vlmforge.runner.stages import Engine  # noqa: E402
from vlmforge.scheduler import jobs, loop, prepare  # noqa: E402
from vlmforge.vl import load  # noqa: E402

_WARM = 3  # questions that are not counted: what libraries load late, they load now
_QUESTION = "What is shown in this picture? Answer at length, and name what is in the background."


@dataclass(frozen=True, slots=True)
class Piece:
    """Something that was done: when, how deep within others, and by whom."""

    label: str
    begun: float
    took: float
    depth: int
    thread: str


@dataclass(slots=True)
class Notes:
    """The pieces of one question, or of several."""

    pieces: list[Piece] = field(default_factory=list)
    marks: list[tuple[str, Any, Any]] = field(default_factory=list)
    _depth: threading.local = field(default_factory=threading.local)

    def wrapped(self, label: str, real: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, noted."""

        def noted(*given: Any, **named: Any) -> Any:
            depth = getattr(self._depth, "now", 0)
            self._depth.now = depth + 1
            begun = time.perf_counter()
            try:
                return real(*given, **named)
            finally:
                took = time.perf_counter() - begun
                self._depth.now = depth
                name = threading.current_thread().name
                self.pieces.append(Piece(label, begun, took, depth, name))

        return noted

    def marked(self, label: str, device: Any, real: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, with the device's time of all that it enqueues."""

        def noted(*given: Any, **named: Any) -> Any:
            begin = device.mark()
            found = real(*given, **named)
            self.marks.append((label, begin, device.mark()))
            return found

        return noted

    def taken(self) -> list[Piece]:
        """What has been noted since this was last asked; the device must have ended it."""
        pieces, self.pieces = self.pieces, []
        marks, self.marks = self.marks, []
        for label, begin, end in marks:
            pieces.append(Piece(f"device: {label}", 0.0, end.since(begin), 0, "device"))
        return pieces


def places(pipe: Pipeline) -> list[tuple[Any, str, str]]:
    """What is noted: where it is, what it is called there, and in the table."""
    vision, decoder = pipe._engine.vision, pipe._engine.decoder
    found: list[tuple[Any, str, str]] = [
        (prepare.Preparation, "job", "the request is prepared"),
        (Engine, "fitted", "template and tokens"),
        (load, "_digest", "digest of the picture"),
        (load.OpenedImage, "decode", "the picture is decoded"),
        (Engine, "prepare_image", "pixel values"),
        (Engine, "keys", "keys of the tokens"),
        (loop.Loop, "submit", "handed to the worker"),
        (jobs.Jobs, "add", "taken in by the worker"),
        (jobs.Jobs, "step", "a step of the worker"),
        (jobs.Jobs, "_begin", "a step is planned and begun"),
        (runner.Runner, "start", "a step is begun"),
        (runner.Runner, "finish", "a step is waited for, and its tokens taken"),
        (work.Work, "_encode", "features and input of the prompt"),
        (FeatureCache, "get", "features"),
        (type(vision), "encode", "the vision part is run"),
        (type(decoder), "step", "the decoder is run"),
        (type(decoder), "begin_prompts", "the prompt's step is enqueued"),
        (type(decoder), "_frame", "its frame is found or made"),
        (type(decoder), "_fill", "inputs are put together"),
        (type(decoder), "_work", "its kernels are enqueued"),
    ]
    if (device := getattr(decoder, "_device", None)) is not None:
        found += [(type(device), n, f"{n} of memory") for n in ("upload", "download", "copy")]
    return [(owner, name, label) for owner, name, label in found if hasattr(owner, name)]


@contextmanager
def noting(pipe: Pipeline) -> Iterator[Notes]:
    """Notes what is done within the block."""
    notes, kept = Notes(), list[tuple[Any, str, Any]]()
    vision, decoder = pipe._engine.vision, pipe._engine.decoder
    device = getattr(decoder, "_device", None)
    try:
        if device is not None:
            for owner, name, label in (
                (type(vision), "_run", "the vision part"),
                (type(decoder), "_work", "steps of the decoder"),
            ):
                if hasattr(owner, name):
                    kept.append((owner, name, getattr(owner, name)))
                    setattr(owner, name, notes.marked(label, device, kept[-1][2]))
        for owner, name, label in places(pipe):
            kept.append((owner, name, getattr(owner, name)))
            setattr(owner, name, notes.wrapped(label, kept[-1][2]))
        yield notes
    finally:
        for owner, name, real in reversed(kept):
            setattr(owner, name, real)


def picture(seed: int, size: int) -> Image.Image:
    """Noise, another for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    return Image.fromarray(pixels)


def one_by_one(pipe: Pipeline, pictures: Sequence[Any], tokens: int) -> None:
    """A table of medians."""
    generation = GenerationConfig(max_new_tokens=tokens, ignore_eos=True)
    asked, walls = list[list[Piece]](), list[float]()
    with noting(pipe) as notes:
        for image in pictures:
            began = time.perf_counter()
            pipe((_QUESTION, image), generation)
            walls.append(time.perf_counter() - began)
            pieces = notes.taken()
            asked.append([_after(piece, began) for piece in pieces])
    asked, walls = asked[_WARM:], walls[_WARM:]
    print(f"{len(asked)} questions about a picture each, {tokens} tokens; medians in ms\n")
    print(f"{'begins':>8} {'takes':>8}  {'thread':<18} what")
    for label, begun, took, depth, thread, times in _medians(asked):
        more = f" ({times:g} times)" if times != 1 else ""
        print(f"{begun:8.2f} {took:8.2f}  {thread:<18} {'  ' * depth}{label}{more}")
    middle, least = statistics.median(walls) * 1e3, min(walls) * 1e3
    print(f"\nfrom the call to the answer: median {middle:.2f} ms, least {least:.2f} ms")


def _after(piece: Piece, began: float) -> Piece:
    begun = piece.begun - began if piece.thread != "device" else 1e9
    return Piece(piece.label, begun, piece.took, piece.depth, piece.thread)


Line = tuple[str, float, float, int, str, float]


def _medians(asked: Sequence[Sequence[Piece]]) -> list[Line]:
    """Label, begin and length in ms, depth, thread, and how often; in the order of time."""
    found: dict[tuple[str, str, int], list[tuple[float, float, int]]] = defaultdict(list)
    for pieces in asked:
        alike: dict[tuple[str, str, int], list[Piece]] = defaultdict(list)
        for piece in pieces:
            alike[piece.label, piece.thread, piece.depth].append(piece)
        for key, same in alike.items():
            begun, took = min(p.begun for p in same), sum(p.took for p in same)
            found[key].append((begun, took, len(same)))
    lines = [
        (
            label,
            statistics.median(b for b, _, _ in values) * 1e3 if thread != "device" else 0.0,
            statistics.median(t for _, t, _ in values) * 1e3,
            depth,
            thread,
            float(statistics.median(n for _, _, n in values)),
        )
        for (label, thread, depth), values in found.items()
        if 2 * len(values) > len(asked)
    ]
    return sorted(lines, key=lambda line: (line[4] == "device", line[1], line[3]))


def burst(pipe: Pipeline, pictures: Sequence[Any], tokens: int) -> None:
    """All at once, after as many that are not counted."""
    generation = GenerationConfig(max_new_tokens=tokens, ignore_eos=True)
    half = len(pictures) // 2
    pipe([(_QUESTION, image) for image in pictures[:half]], generation)
    with noting(pipe) as notes:
        began = time.perf_counter()
        firsts = dict[int, float]()
        prompts = [(_QUESTION, image) for image in pictures[half:]]
        for part in pipe.stream_infer(prompts, generation):
            assert part.finish_reason != "error", part
            firsts.setdefault(part.index, time.perf_counter() - began)
        wall = time.perf_counter() - began
        pieces = notes.taken()
    print(f"{half} questions at once, {tokens} tokens each: {half / wall:.1f} requests/s, ", end="")
    times = sorted(firsts.values())
    print(
        f"first tokens after {statistics.mean(times) * 1e3:.0f} ms, last {times[-1] * 1e3:.0f} ms"
    )
    print(f"\n{'times':>8} {'ms in all':>10}  what")
    sums: dict[str, list[float]] = defaultdict(list)
    for piece in pieces:
        sums[piece.label].append(piece.took)
    for label, took in sorted(sums.items(), key=lambda item: -sum(item[1])):
        print(f"{len(took):8d} {sum(took) * 1e3:10.1f}  {label}")
    print(f"{'':8} {wall * 1e3:10.1f}  the wall's time")


def check(pipe: Pipeline, folder: Path) -> None:
    """Largest differences, and the device's milliseconds, by the number of views."""
    engine, vision = pipe._engine, pipe._engine.vision
    assert isinstance(vision, DeviceVision), "its features do not stay on a device"
    session = vision._device.session(folder / engine.manifest.part("vision").file)
    values = [engine.prepare_image(picture(seed, 336)).pixel_values for seed in range(vision.views)]
    wanted = np.concatenate([session.run(None, {PIXEL_VALUES: view})[0] for view in values])
    print(f"{'views':>6} {'as it is':>10} {'captured':>10} {'ms':>8} {'host ms':>8}")
    for count in range(1, vision.views + 1):
        views, off = np.concatenate(values[:count]), list[float]()
        for _ in range(2):
            found = np.stack([np.asarray(rows) for rows in vision.encode(views)])
            off.append(float(np.abs(found - wanted[:count]).max()))
        took = list[tuple[Any, Any]]()
        began = time.perf_counter()
        for _ in range(20):
            begin = vision._device.mark()
            vision._run(count)
            took.append((begin, vision._device.mark()))
        host = (time.perf_counter() - began) / 20
        np.asarray(vision.encode(views)[0])  # waits
        middle = statistics.median(end.since(begin) for begin, end in took)
        print(f"{count:6d} {off[0]:10.2g} {off[1]:10.2g} {middle * 1e3:8.2f} {host * 1e3:8.2f}")
    largest = float(np.abs(wanted).max())
    print(f"features are up to {largest:.3g}; batches round otherwise than single views")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument(
        "--check", action="store_true", help="of the target cuda, views of one size"
    )
    parser.add_argument("--on-cpu", action="store_true", help="of the target cuda, for a look")
    parser.add_argument("--images", type=int, default=15)
    parser.add_argument("--session-len", type=int)
    parser.add_argument("--chunk", type=int, help="max_prefill_token_num")
    parser.add_argument("--size", type=int, default=336, help="pixels of each side")
    parser.add_argument("--new-tokens", type=int, default=1)
    parser.add_argument("--burst", type=int, help="so many questions at once")
    parser.add_argument(
        "--switch-interval", type=float, help="seconds, of sys.setswitchinterval: to compare"
    )
    given = parser.parse_args()
    if given.switch_interval:
        sys.setswitchinterval(given.switch_interval)
    config = EngineConfig(enable_prefix_caching=False, session_len=given.session_len)
    if given.burst:
        config.max_batch_size = given.burst
    if given.chunk:
        config.max_prefill_token_num = given.chunk
    count = 2 * given.burst if given.burst else given.images + _WARM
    with ExitStack() as stack:
        if given.on_cpu:
            from vlmforge.backends.fake import cuda_on_cpu

            stack.enter_context(cuda_on_cpu())
        pipe = stack.enter_context(pipeline(given.engine, config))
        if given.check:
            check(pipe, given.engine)
            return
        pictures = [picture(seed, given.size) for seed in range(count)]
        (burst if given.burst else one_by_one)(pipe, pictures, given.new_tokens)


if __name__ == "__main__":
    main()
