"""What config.json tells of the family, and which variants of it were published."""

from __future__ import annotations

from vlmforge.errors import UnsupportedModelError
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.checkpoint.keys import check_keys
from vlmforge_recipes.qwen_vl.keys import TABLES

ARCHITECTURE = "QWenLMHeadModel"


def is_family(config: ConfigReader) -> bool:
    """Whether it is of this family."""
    architectures = config.get("architectures")
    return (
        isinstance(architectures, list) and ARCHITECTURE in architectures and config.has("visual")
    )


def check(config: ConfigReader) -> None:
    """Refuse what the original code can be configured to but was never published as.

    Raises:
        UnsupportedModelError: such a variant.
    """
    check_keys(config, TABLES)
    if (length := config.int("seq_length", 2048, within=limits.POSITIONS)) < 2:
        raise _unsupported(config, f"seq_length {length}", "at least 2")


def _unsupported(config: ConfigReader, found: str, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{config.file} describes a variant that this recipe does not know.",
        found=found,
        expected=expected,
        fix="choose a Qwen-VL-Chat checkpoint, or extend the recipe",
    )
