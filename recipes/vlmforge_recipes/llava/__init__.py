"""LLaVA v1.5 and v1.6, in both layouts in which each is published.

https://arxiv.org/abs/2310.03744 and https://llava-vl.github.io/blog/2024-01-30-llava-next/

The layouts' modules are imported when needed: recognising a checkpoint of another family needs none
of a build's libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.recipe import ModelSpec, Recipe, RecipeOptions
from vlmforge_recipes.llava.layout import IN_HF, layout_of


@dataclass(frozen=True, slots=True)
class LlavaRecipe(Recipe):
    """The family, by its layouts."""

    name: str = "llava"

    @override
    def matches(self, config: ConfigReader) -> bool:
        layout = layout_of(config)
        if layout is None:
            return False
        from vlmforge_recipes.llava import hf, original

        (hf if layout in IN_HF else original).check_variant(config)
        return True

    @override
    def load(self, checkpoint: Path, config: ConfigReader, options: RecipeOptions) -> ModelSpec:
        from vlmforge_recipes.llava import hf, original

        if layout_of(config) in IN_HF:
            return hf.load_hf(checkpoint, config, options)
        return original.load_original(checkpoint, config, options)


RECIPE = LlavaRecipe()
