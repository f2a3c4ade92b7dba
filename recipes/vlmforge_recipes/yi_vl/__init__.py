"""Yi-VL (https://arxiv.org/abs/2403.04652), as 01-ai published it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.recipe import ModelSpec, Recipe, RecipeOptions
from vlmforge_recipes.yi_vl.layout import check, is_family


@dataclass(frozen=True, slots=True)
class YiVLRecipe(Recipe):
    """Another family has the same architecture; the projector tells them apart."""

    name: str = "yi_vl"

    @override
    def matches(self, config: ConfigReader) -> bool:
        if not is_family(config):
            return False
        check(config)
        return True

    @override
    def load(self, checkpoint: Path, config: ConfigReader, options: RecipeOptions) -> ModelSpec:
        # Imported here: recognising a checkpoint needs none of a build's libraries.
        from vlmforge_recipes.yi_vl.model import load

        return load(checkpoint, config, options)


RECIPE = YiVLRecipe()
