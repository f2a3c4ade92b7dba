"""The recipe of a checkpoint, found from its config.json alone."""

from __future__ import annotations

from pathlib import Path

from vlmforge_builder.checkpoint.altered import refuse_altered
from vlmforge_builder.checkpoint.config import ConfigReader, read_config
from vlmforge_builder.checkpoint.source import fetch_config
from vlmforge_builder.recipe import Recipe, find_recipe


def recognise(folder: Path) -> tuple[ConfigReader, Recipe]:
    """The configuration of the checkpoint in `folder`, and its recipe.

    Raises:
        CheckpointError: no config.json, or one of a family that no recipe knows; quantised weights,
            or an adapter that is not merged.
    """
    refuse_altered(folder)
    config = read_config(folder / "config.json")
    return config, find_recipe(config)


def refuse_unknown(checkpoint: str, revision: str | None) -> None:
    """Refuse a checkpoint of an unknown family; of a hub id no weights are fetched.

    For before the libraries of a build are loaded, which takes longer than this.

    Raises:
        CheckpointError: as `resolve_checkpoint` and `recognise`.
    """
    recognise(fetch_config(checkpoint, revision=revision))
