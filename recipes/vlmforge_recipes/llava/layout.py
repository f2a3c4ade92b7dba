"""Which layout of the family a config.json is of."""

from __future__ import annotations

from vlmforge_builder.checkpoint.config import ConfigReader

HF = "LlavaForConditionalGeneration"
HF_ANYRES = "LlavaNextForConditionalGeneration"
ORIGINAL = "LlavaLlamaForCausalLM"
ORIGINAL_MISTRAL = "LlavaMistralForCausalLM"

IN_HF = (HF, HF_ANYRES)
"""Those of transformers; the others are the original code's."""


def layout_of(config: ConfigReader) -> str | None:
    """The architecture, or None: of another family.

    `model_type` may be "llava" in both layouts, so `architectures` decides.
    """
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    for name in IN_HF:
        if name in names:
            return name
    # The same architecture with a normalising projector is another family.
    normed = config.str("mm_projector_type", "linear").endswith("_Norm")
    for name in (ORIGINAL, ORIGINAL_MISTRAL):
        if name in names and config.has("mm_vision_tower") and not normed:
            return name
    return None
