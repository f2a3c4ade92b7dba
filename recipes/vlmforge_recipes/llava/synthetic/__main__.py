"""The command line: `python -m vlmforge_recipes.llava.synthetic OUT --size 60m`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from vlmforge.errors import VlmforgeError
from vlmforge_recipes.llava.synthetic.spec import (
    PRESETS,
    DType,
    FileFormat,
    Keys,
    Layout,
    SyntheticSpec,
)
from vlmforge_recipes.llava.synthetic.write import write_checkpoint


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    made = argparse.ArgumentParser(
        prog="python -m vlmforge_recipes.llava.synthetic",
        description="Write a checkpoint with random weights in a published layout.",
    )
    made.add_argument("out", type=Path, help="the checkpoint folder to write")
    made.add_argument("--size", choices=sorted(PRESETS), default="tiny")
    made.add_argument(
        "--layout",
        choices=get_args(Layout),
        default="hf",
        help="original: the vision tower goes beside OUT, into openai/",
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--dtype", choices=get_args(DType), help="default: that of the size")
    made.add_argument("--shards", type=int, help="default: that of the size")
    made.add_argument("--kv-heads", type=int, help="fewer than the heads: grouped queries")
    made.add_argument("--tie", action="store_true", help="the head shares the embedding table")
    made.add_argument("--keys", choices=get_args(Keys), default="old", help="names, hf layout")
    made.add_argument(
        "--format",
        choices=get_args(FileFormat),
        help="default: safetensors for hf, bin for original (made in memory: small sizes only)",
    )
    made.add_argument("--force", action="store_true", help="replace OUT if it is there")
    return made


def spec_of(arguments: argparse.Namespace) -> SyntheticSpec:
    """The preset with what the arguments change.

    Raises:
        ConfigError: The changes contradict the preset's geometry.
    """
    preset = PRESETS[arguments.size]
    kv_heads = preset.text.kv_heads if arguments.kv_heads is None else arguments.kv_heads
    published: FileFormat = "bin" if arguments.layout == "original" else "safetensors"
    return replace(
        preset,
        text=replace(preset.text, kv_heads=kv_heads, tied=arguments.tie),
        layout=arguments.layout,
        dtype=arguments.dtype or preset.dtype,
        file_format=arguments.format or published,
        shards=preset.shards if arguments.shards is None else arguments.shards,
        keys=arguments.keys,
        seed=arguments.seed,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the checkpoint and prints its folder; 2 if it could not be written."""
    arguments = parser().parse_args(argv)
    try:
        out = write_checkpoint(arguments.out, spec_of(arguments), force=arguments.force)
    except VlmforgeError as error:
        print(error, file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
