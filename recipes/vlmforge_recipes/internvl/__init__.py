"""InternVL3 and InternVL3.5 in the layout of transformers.

https://arxiv.org/abs/2504.10479 and https://arxiv.org/abs/2508.18265
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.recipe import ModelSpec, Recipe, RecipeOptions

ARCHITECTURE = "InternVLForConditionalGeneration"


@dataclass(frozen=True, slots=True)
class InternVLRecipe(Recipe):
    """The family."""

    name: str = "internvl"

    @override
    def matches(self, config: ConfigReader) -> bool:
        if config.get("architectures") != [ARCHITECTURE]:
            return False
        from vlmforge_recipes.internvl import model

        model.check_variant(config)
        return True

    @override
    def load(self, checkpoint: Path, config: ConfigReader, options: RecipeOptions) -> ModelSpec:
        from vlmforge_recipes.internvl import model

        return model.load(checkpoint, config, options)


RECIPE = InternVLRecipe()
