"""What config.json tells of the family: which of its models it is, and in which layout."""

from __future__ import annotations

from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.checkpoint.keys import KeyTable, check_keys
from vlmforge_recipes.qwen2_vl.keys import FULL, WINDOWED

QWEN2_VL = "Qwen2VLForConditionalGeneration"
QWEN2_5_VL = "Qwen2_5_VLForConditionalGeneration"


def architecture_of(config: ConfigReader) -> str | None:
    """The architecture; None: another family's."""
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    return next((name for name in (QWEN2_VL, QWEN2_5_VL) if name in names), None)


def text_of(config: ConfigReader) -> ConfigReader:
    """What is said of the decoder: as published at the top, by transformers 5 in a section."""
    return config.section("text_config") if config.has("text_config") else config


def tables_of(config: ConfigReader) -> tuple[KeyTable, ...]:
    """The keys of the checkpoint's files."""
    by_layout = WINDOWED if architecture_of(config) == QWEN2_5_VL else FULL
    if not config.has("text_config"):
        return by_layout[""]
    old = text_of(config).has("rope_scaling")
    return by_layout[" of transformers 4.52" if old else " of transformers 5"]


def check(config: ConfigReader) -> None:
    """Refuse keys that are unknown or ask for what there is not (UnsupportedModelError)."""
    check_keys(config, tables_of(config))
