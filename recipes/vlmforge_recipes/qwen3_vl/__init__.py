"""Qwen3-VL, its dense models (https://github.com/QwenLM/Qwen3-VL)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.checkpoint.keys import check_keys
from vlmforge_builder.recipe import ModelSpec, Recipe, RecipeOptions
from vlmforge_recipes.qwen3_vl.keys import tables_of

ARCHITECTURE = "Qwen3VLForConditionalGeneration"


@dataclass(frozen=True, slots=True)
class Qwen3VLRecipe(Recipe):
    """As published, and as transformers 5 saves it."""

    name: str = "qwen3_vl"

    @override
    def matches(self, config: ConfigReader) -> bool:
        architectures = config.get("architectures")
        if not isinstance(architectures, list) or ARCHITECTURE not in architectures:
            return False
        check_keys(config, tables_of(config))
        return True

    @override
    def load(self, checkpoint: Path, config: ConfigReader, options: RecipeOptions) -> ModelSpec:
        # Imported here: recognising a checkpoint needs none of a build's libraries.
        from vlmforge_recipes.qwen3_vl.model import load

        return load(checkpoint, config, options, architecture=ARCHITECTURE)


RECIPE = Qwen3VLRecipe()
