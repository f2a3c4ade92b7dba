"""Qwen2-VL (https://arxiv.org/abs/2409.12191) and Qwen2.5-VL (https://arxiv.org/abs/2502.13923)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.recipe import ModelSpec, Recipe, RecipeOptions
from vlmforge_recipes.qwen2_vl.layout import architecture_of, check


@dataclass(frozen=True, slots=True)
class Qwen2VLRecipe(Recipe):
    """Both, in the layout that they were published in and in that of transformers 5."""

    name: str = "qwen2_vl"

    @override
    def matches(self, config: ConfigReader) -> bool:
        if architecture_of(config) is None:
            return False
        check(config)
        return True

    @override
    def load(self, checkpoint: Path, config: ConfigReader, options: RecipeOptions) -> ModelSpec:
        # Imported here: recognising a checkpoint needs none of a build's libraries.
        from vlmforge_recipes.qwen2_vl.model import load

        return load(checkpoint, config, options)


RECIPE = Qwen2VLRecipe()
