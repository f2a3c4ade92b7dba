"""Qwen-VL-Chat (https://arxiv.org/abs/2308.12966) as Qwen published it; its code is not run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.recipe import ModelSpec, Recipe, RecipeOptions
from vlmforge_recipes.qwen_vl.layout import check, is_family


@dataclass(frozen=True, slots=True)
class QwenVLRecipe(Recipe):
    """The text-only models have the same architecture and no `visual` section."""

    name: str = "qwen_vl"

    @override
    def matches(self, config: ConfigReader) -> bool:
        if not is_family(config):
            return False
        check(config)
        return True

    @override
    def load(self, checkpoint: Path, config: ConfigReader, options: RecipeOptions) -> ModelSpec:
        # Imported here: recognising a checkpoint needs none of a build's libraries.
        from vlmforge_recipes.qwen_vl.model import load

        return load(checkpoint, config, options)


RECIPE = QwenVLRecipe()
