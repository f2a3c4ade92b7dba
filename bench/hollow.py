"""An engine without its weights, to be filled where it is measured: it travels in a few megabytes.

    python bench/hollow.py build --size 7b -o out/hollow -- --target cuda --dtype float16
    python bench/hollow.py fill out/hollow

`build` writes everything but the matrices, for which it leaves holes in the data files; `fill` puts
random numbers there, of a size that keeps activations finite. Speed does not depend on them.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

HOLES = "holes.json"
_POOL = 1 << 25  # different random numbers


def fill(engine: Path) -> None:
    """Random numbers into the holes, and a manifest that knows of them."""
    drawn = np.random.default_rng(0).standard_normal(_POOL, np.float32)
    made: dict[tuple[float, str], memoryview] = {}
    for name, holes in json.loads((engine / HOLES).read_text("utf-8")).items():
        with (engine / name).open("r+b") as file:
            for offset, shape, dtype, *given in holes:
                usual = shape[0] ** -0.5 if len(shape) == 2 else 0.02
                scale = given[0] if given else usual
                if (scale, dtype) not in made:
                    made[scale, dtype] = _narrow(drawn * np.float32(scale), dtype)
                file.seek(offset)
                item = 1 if dtype == "uint8" else 2
                _repeat(file, made[scale, dtype], item * int(np.prod(shape)))
    _seal(engine)


def _seal(engine: Path) -> None:
    """The files' hashes as they are now, and the check that the first opening would make."""
    from vlmforge.engine.bundle import open_bundle
    from vlmforge.engine.manifest import MANIFEST_FILE, dump_manifest, load_manifest

    manifest = load_manifest(engine)
    sums = [_sha256(engine / entry.path) for entry in manifest.files]
    pairs = zip(manifest.files, sums, strict=True)
    files = tuple(dataclasses.replace(entry, sha256=found) for entry, found in pairs)
    text = dump_manifest(dataclasses.replace(manifest, files=files))
    (engine / MANIFEST_FILE).write_text(text, "utf-8")
    open_bundle(engine)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _narrow(values: Any, dtype: str) -> memoryview:
    if dtype == "uint8":  # of whole numbers any bits are some
        return memoryview(values.view(np.uint8)).cast("B")
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    return memoryview(bits if dtype == "bfloat16" else values.astype(dtype)).cast("B")


def _repeat(file: BinaryIO, block: memoryview, size: int) -> None:
    for start in range(0, size, len(block)):
        file.write(block[: size - start])


def build(size: str, engine: Path, options: list[str]) -> None:
    """Build the engine of a preset's shape with holes."""
    from vlmforge_builder.command import run
    from vlmforge_recipes.llava.synthetic import PRESETS, files, write_checkpoint

    checkpoint = engine.with_name(f"{engine.name}.checkpoint")
    files.write_safetensors = _write_header  # type: ignore[assignment]
    write_checkpoint(checkpoint, PRESETS[size], force=True)
    holes = _leave_holes()
    run([str(checkpoint), "-o", str(engine), "--force", "--skip-goldens", *options])
    (engine / HOLES).write_text(json.dumps(holes), "utf-8")


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
    encoding = getattr(item.encoding, "inner", item.encoding)  # of a rank's share
    spread = {8: 74.0, 4: 4.6}[encoding.blocks.bits]
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
    values = arguments.parse_args()
    if values.kind == "fill":
        fill(values.engine)
    else:
        build(values.size, values.output, values.options)


if __name__ == "__main__":
    main()
