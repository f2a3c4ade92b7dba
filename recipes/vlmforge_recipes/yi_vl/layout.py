"""What config.json tells of the family, and which variants of it were published."""

from __future__ import annotations

from vlmforge.errors import UnsupportedModelError
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.checkpoint.keys import check_keys
from vlmforge_recipes.yi_vl.keys import TABLES

ARCHITECTURE = "LlavaLlamaForCausalLM"
_KNOWN = {
    "mm_projector_type": ("mlp2x_gelu_Norm",),
    "mm_vision_select_feature": ("patch", "cls_patch"),
    "image_aspect_ratio": ("square", "pad"),
}


def is_family(config: ConfigReader) -> bool:
    """Whether it is of this family: another has the same architecture and another projector."""
    architectures = config.get("architectures")
    return (
        isinstance(architectures, list)
        and ARCHITECTURE in architectures
        and config.has("mm_vision_tower")
        and config.str("mm_projector_type", "linear").endswith("_Norm")
    )


def check(config: ConfigReader) -> None:
    """Refuse variants that the original code does not publish (UnsupportedModelError)."""
    for key, values in _KNOWN.items():
        value = config.str(key, values[0])
        if value not in values:
            raise _unsupported(config, f"{key} {value!r}", " or ".join(map(repr, values)))
    check_keys(config, TABLES)


def _unsupported(config: ConfigReader, found: str, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{config.file} describes a variant that this recipe does not know.",
        found=found,
        expected=expected,
        fix="choose a Yi-VL checkpoint, or extend the recipe",
    )
