"""The recipe of a checkpoint, found from its config.json alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from vlmforge_builder.checkpoint.altered import refuse_altered
from vlmforge_builder.checkpoint.config import ConfigReader, read_config
from vlmforge_builder.checkpoint.source import fetch_config
from vlmforge_builder.recipe import Recipe, find_recipe


def recognise(folder: Path, ignored: Iterable[str] = ()) -> tuple[ConfigReader, Recipe]:
    """The configuration of the checkpoint in `folder`, and its recipe.

    `ignored` are the keys of `--ignore-config-key`.

    Raises:
        CheckpointError: no config.json, or one of a family that no recipe knows; a key of it that
            is refused, or that no table of the recipe knows; quantised weights, or an adapter that
            is not merged.
    """
    refuse_altered(folder)
    config = read_config(folder / "config.json", ignored=frozenset(ignored))
    return config, find_recipe(config)


def refuse_unknown(checkpoint: str, revision: str | None, ignored: Iterable[str]) -> None:
    """Refuse a checkpoint of an unknown family; of a hub id no weights are fetched.

    For before the libraries of a build are loaded, which takes longer than this.

    Raises:
        CheckpointError: as `resolve_checkpoint` and `recognise`.
    """
    recognise(fetch_config(checkpoint, revision=revision), ignored)
