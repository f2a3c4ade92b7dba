"""Idefics3, SmolVLM and SmolVLM2 in the layout of transformers.

https://arxiv.org/abs/2408.12637 and https://arxiv.org/abs/2504.05299
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.recipe import ModelSpec, Recipe, RecipeOptions

IDEFICS3, SMOLVLM = "Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"


def architecture_of(config: ConfigReader) -> str | None:
    """The architecture, if it is one of the family."""
    found = config.get("architectures")
    known = [name for name in (IDEFICS3, SMOLVLM) if found == [name]]
    return known[0] if known else None


@dataclass(frozen=True, slots=True)
class Idefics3Recipe(Recipe):
    """The family: one model under two names, by their configurations' defaults."""

    name: str = "idefics3"

    @override
    def matches(self, config: ConfigReader) -> bool:
        if architecture_of(config) is None:
            return False
        from vlmforge_recipes.idefics3 import model

        model.check_variant(config)
        return True

    @override
    def load(self, checkpoint: Path, config: ConfigReader, options: RecipeOptions) -> ModelSpec:
        from vlmforge_recipes.idefics3 import model

        return model.load(checkpoint, config, options)


RECIPE = Idefics3Recipe()
