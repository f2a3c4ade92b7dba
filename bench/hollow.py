"""An engine without its weights, to be filled where it is measured: it travels in a few megabytes.

    python bench/hollow.py build --size 7b -o out/hollow -- --target cuda --dtype float16
    python bench/hollow.py fill out/hollow [--like ANOTHER]
    python bench/hollow.py trust out/hollow

`build` writes everything but the matrices, for which it leaves holes in the data files; `fill` puts
random numbers there, of a size that keeps activations finite. Speed does not depend on them.
`trust` leaves the holes, which are zeros: enough to see what memory the engine takes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

HOLES = "holes.json"
LARGEST = "34b"
_POOL = 1 << 24  # different random numbers
_WRITERS = 12


def fill(engine: Path, like: Path | None = None) -> None:
    """Random numbers into the holes; those of files that `like` has alike are its very files.

    Its files are taken for checked from now on: their hashes are of what was never written.
    """
    holes = json.loads((engine / HOLES).read_text("utf-8"))
    others = {} if like is None else json.loads((like / HOLES).read_text("utf-8"))
    drawn = np.random.default_rng(0).standard_normal(_POOL, np.float32)
    made: dict[tuple[float, str], memoryview] = {}
    with ThreadPoolExecutor(_WRITERS) as pool:
        for name, places in holes.items():
            path = engine / name
            if like is not None and places == others.get(name) and same_size(path, like / name):
                path.unlink()
                path.hardlink_to(like / name)
                continue
            with path.open("r+b") as file:
                list(pool.map(lambda piece: os.pwrite(*piece), _pieces(file, places, drawn, made)))
    trust(engine)
    if like is not None:  # its files have changed: they have more names
        trust(like)


def same_size(one: Path, other: Path) -> bool:
    """Whether both files have as many bytes."""
    return one.stat().st_size == other.stat().st_size


def _pieces(
    file: BinaryIO,
    places: list[list[Any]],
    drawn: Any,
    made: dict[tuple[float, str], memoryview],
) -> Iterator[tuple[int, memoryview, int]]:
    """What is written where, for `os.pwrite`."""
    for offset, shape, dtype, *given in places:
        usual = shape[0] ** -0.5 if len(shape) == 2 else 0.02
        scale = given[0] if given else usual
        if (scale, dtype) not in made:
            made[scale, dtype] = _narrow(drawn * np.float32(scale), dtype)
        block = made[scale, dtype]
        size = (1 if dtype == "uint8" else 2) * int(np.prod(shape))
        for start in range(0, size, len(block)):
            yield file.fileno(), block[: size - start], offset + start


def trust(engine: Path) -> None:
    """Take an engine's files for checked: hashing gigabytes of random numbers tells nothing."""
    from vlmforge.engine import bundle
    from vlmforge.engine.manifest import load_manifest

    stamp = bundle._stamp_path(bundle.Bundle(engine, load_manifest(engine)))
    if stamp is not None:
        bundle._remember(stamp)


def _narrow(values: Any, dtype: str) -> memoryview:
    if dtype == "uint8":  # of whole numbers any bits are some
        return memoryview(values.view(np.uint8)).cast("B")
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    return memoryview(bits if dtype == "bfloat16" else values.astype(dtype)).cast("B")


def build(size: str, engine: Path, options: list[str]) -> None:
    """Build the engine of a preset's shape with holes."""
    from vlmforge_builder.command import run
    from vlmforge_recipes.llava.synthetic import PRESETS, files, write_checkpoint

    checkpoint = engine.with_name(f"{engine.name}.checkpoint")
    files.write_safetensors = _write_header  # type: ignore[assignment]
    preset = _larger(PRESETS["13b"]) if size == LARGEST else PRESETS[size]
    write_checkpoint(checkpoint, preset, force=True)
    holes = _leave_holes()
    run([str(checkpoint), "-o", str(engine), "--force", "--skip-goldens", *options])
    (engine / HOLES).write_text(json.dumps(holes), "utf-8")


def _larger(preset: Any) -> Any:
    """The decoder of llava-hf/llava-v1.6-34b-hf, behind the tower of another."""
    text = dataclasses.replace(
        preset.text,
        hidden=7168,
        intermediate=20480,
        layers=60,
        heads=56,
        kv_heads=8,
        vocab=64064,
    )
    return dataclasses.replace(preset, text=text)


def _write_header(path: Path, entries: Any, seed: int, progress: Any) -> None:
    """As the synthetic checkpoints' writer does, but for the values."""
    from vlmforge_recipes.llava.synthetic.files import DTYPE_CODES

    del seed, progress
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        places = [offset, offset + entry.nbytes]
        shape = list(entry.source.shape)
        header[entry.name] = {
            "dtype": DTYPE_CODES[entry.dtype],
            "shape": shape,
            "data_offsets": places,
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def _of_whole_numbers(item: Any) -> list[list[Any]]:
    """Numbers, and scales by which the weights are about as large as others."""
    numbers, scales = item.places
    spread = {8: 74.0, 4: 4.6}[item.encoding.blocks.bits]
    return [
        [numbers.offset, numbers.tensor.shape, "uint8"],
        [scales.offset, scales.tensor.shape, scales.tensor.dtype, item.shape[0] ** -0.5 / spread],
    ]


def _leave_holes() -> Mapping[str, list[Any]]:
    """Have builds write vectors and tables only; what they leave out is in the result."""
    import vlmforge_builder.build as build_module
    import vlmforge_builder.targets.cuda as target
    from vlmforge.engine.manifest import FileEntry
    from vlmforge_builder.weights import AsDtype, Computed

    holes: dict[str, list[Any]] = {}

    def write(path: Path, layout: Any, weights: Any, store: Any) -> Iterator[tuple[int, int]]:
        del store
        left_out = holes.setdefault(path.name, [])
        with path.open("wb") as file:
            file.truncate(layout[-1].places[-1].end)
            for item in layout:
                if not isinstance(item.encoding, AsDtype):
                    left_out += _of_whole_numbers(item)
                    continue
                (place,) = item.places
                weight = weights[item.name]
                file.seek(place.offset)
                if isinstance(weight, Computed):
                    file.write(weight.compute().contiguous().numpy().tobytes())
                elif len(item.shape) == 1 and item.name.endswith("weight"):
                    ones = np.ones(item.shape, np.float32).view(np.uint32)
                    narrow = (ones >> 16).astype(np.uint16)
                    one = np.ones(item.shape, np.float16)
                    kept = narrow if place.tensor.dtype == "bfloat16" else one
                    file.write(kept.tobytes())
                elif len(item.shape) > 1:
                    left_out.append([place.offset, list(item.shape), place.tensor.dtype])
                yield place.end, layout[-1].places[-1].end

    def list_files(folder: Path) -> tuple[FileEntry, ...]:
        found = sorted(p for p in folder.rglob("*") if p.is_file())
        return tuple(
            FileEntry(str(p.relative_to(folder)), p.stat().st_size, "0" * 64) for p in found
        )

    target.write = write  # type: ignore[assignment]
    build_module.list_files = list_files
    build_module.fingerprint = lambda files: "hollow"  # type: ignore[assignment]
    return holes


def main() -> None:
    """The command line."""
    arguments = argparse.ArgumentParser(description=__doc__)
    kinds = arguments.add_subparsers(dest="kind", required=True)
    make = kinds.add_parser("build")
    make.add_argument("--size", default="7b")
    make.add_argument("-o", "--output", type=Path, required=True)
    make.add_argument("options", nargs="*", help="of build-engine, behind --")
    full = kinds.add_parser("fill")
    full.add_argument("engine", type=Path)
    full.add_argument("--like", type=Path, help="an engine that is filled already")
    kinds.add_parser("trust").add_argument("engine", type=Path)
    values = arguments.parse_args()
    if values.kind == "fill":
        fill(values.engine, values.like)
    elif values.kind == "trust":
        trust(values.engine)
    else:
        build(values.size, values.output, values.options)


if __name__ == "__main__":
    main()
