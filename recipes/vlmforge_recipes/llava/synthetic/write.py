"""Writes a synthetic checkpoint folder, all of it or nothing."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from vlmforge.errors import ConfigError
from vlmforge_recipes.llava.synthetic.configs import (
    TOWER_NAME,
    write_hf_configs,
    write_original_configs,
    write_tower_configs,
)
from vlmforge_recipes.llava.synthetic.files import Progress, write_weights
from vlmforge_recipes.llava.synthetic.spec import SyntheticSpec
from vlmforge_recipes.llava.synthetic.tensors import checkpoint_entries, tower_entries
from vlmforge_recipes.llava.synthetic.tokenizer import write_hf_tokenizer, write_original_tokenizer


def write_checkpoint(out: Path, spec: SyntheticSpec, *, force: bool = False) -> Path:
    """Writes `out`, the checkpoint folder, and returns it.

    The `original` layout also writes its vision tower beside it, to
    `out.parent/openai/clip-vit-large-patch14-336`. Equal specs give equal bytes. Memory stays at a
    few blocks of values whatever the size, except for `bin` files, which are made in memory.

    Raises:
        ConfigError: A folder to write is not empty and `force` is not set, or there are more
            shards than tensors.
    """
    # Absolute, so that the parent of "." is what it says.
    out = out.absolute()
    tower = out.parent / TOWER_NAME
    targets = [tower, out] if spec.layout == "original" else [out]
    for target in targets:
        _refuse_to_overwrite(target, force)
    body = checkpoint_entries(spec)
    stock = tower_entries(spec) if spec.layout == "original" else []
    progress = Progress(total=sum(entry.nbytes for entry in (*body, *stock)))
    with contextlib.ExitStack() as publishing:
        if stock:
            beside = publishing.enter_context(_published_at(tower))
            write_tower_configs(beside, spec)
            write_weights(beside, stock, replace(spec, shards=1), progress)
        folder = publishing.enter_context(_published_at(out))
        _write_descriptions(folder, spec)
        write_weights(folder, body, spec, progress)
    return out


def _write_descriptions(folder: Path, spec: SyntheticSpec) -> None:
    if spec.layout == "original":
        write_original_configs(folder, spec)
        write_original_tokenizer(folder)
    else:
        write_hf_configs(folder, spec)
        write_hf_tokenizer(folder)


def _refuse_to_overwrite(target: Path, force: bool) -> None:
    occupied = target.exists() and (not target.is_dir() or any(target.iterdir()))
    if occupied and not force:
        raise ConfigError(
            f"{target} is there already.",
            found="a file or a folder that is not empty",
            expected="a new or empty folder",
            fix="choose another folder, or pass --force (force=True) to replace it",
        )


@contextlib.contextmanager
def _published_at(target: Path) -> Iterator[Path]:
    """A folder to fill, renamed to `target` at the end, or removed if anything fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(8)}.partial")
    partial.mkdir()
    try:
        yield partial
        _remove(target)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _remove(target: Path) -> None:
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)
