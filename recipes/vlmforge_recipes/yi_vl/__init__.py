"""Yi-VL (https://arxiv.org/abs/2403.04652), as 01-ai published it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.recipe import ModelSpec, RecipeOptions
from vlmforge_recipes.yi_vl.model import ARCHITECTURE, check, load


@dataclass(frozen=True, slots=True)
class YiVLRecipe:
    """See `Recipe`. Another family has the same architecture; the projector tells them apart."""

    name: str = "yi_vl"

    def matches(self, config: ConfigReader) -> bool:
        """See `Recipe.matches`."""
        architectures = config.get("architectures")
        matches = (
            isinstance(architectures, list)
            and ARCHITECTURE in architectures
            and config.has("mm_vision_tower")
            and config.str("mm_projector_type", "linear").endswith("_Norm")
        )
        if matches:
            check(config)
        return matches

    def load(self, checkpoint: Path, config: ConfigReader, options: RecipeOptions) -> ModelSpec:
        """See `Recipe.load`."""
        return load(checkpoint, config, options)


RECIPE = YiVLRecipe()
