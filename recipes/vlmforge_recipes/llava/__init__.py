"""LLaVA v1.5 (https://arxiv.org/abs/2310.03744), in both layouts in which it is published."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.recipe import ModelSpec, RecipeOptions
from vlmforge_recipes.llava import hf, original


@dataclass(frozen=True, slots=True)
class LlavaRecipe:
    """See `Recipe`. `model_type` is "llava" in both layouts, so `architectures` decides."""

    name: str = "llava"

    def matches(self, config: ConfigReader) -> bool:
        """See `Recipe.matches`."""
        layout = _layout(config)
        if layout == hf.ARCHITECTURE:
            hf.check_variant(config)
        elif layout == original.ARCHITECTURE:
            original.check_variant(config)
        return layout is not None

    def load(self, checkpoint: Path, config: ConfigReader, options: RecipeOptions) -> ModelSpec:
        """See `Recipe.load`."""
        if _layout(config) == hf.ARCHITECTURE:
            return hf.load_hf(checkpoint, config, options)
        return original.load_original(checkpoint, config, options)


def _layout(config: ConfigReader) -> str | None:
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if hf.ARCHITECTURE in names:
        return hf.ARCHITECTURE
    # The same architecture with a normalising projector is another family.
    normed = config.str("mm_projector_type", "linear").endswith("_Norm")
    if original.ARCHITECTURE in names and config.has("mm_vision_tower") and not normed:
        return original.ARCHITECTURE
    return None


RECIPE = LlavaRecipe()
