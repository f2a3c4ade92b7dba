"""Which layout of the family a config.json is of."""

from __future__ import annotations

from vlmforge_builder.checkpoint.config import ConfigReader

HF = "LlavaForConditionalGeneration"
ORIGINAL = "LlavaLlamaForCausalLM"


def layout_of(config: ConfigReader) -> str | None:
    """`HF`, `ORIGINAL`, or None: of another family.

    `model_type` is "llava" in both, so `architectures` decides.
    """
    architectures = config.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    if HF in names:
        return HF
    # The same architecture with a normalising projector is another family.
    normed = config.str("mm_projector_type", "linear").endswith("_Norm")
    if ORIGINAL in names and config.has("mm_vision_tower") and not normed:
        return ORIGINAL
    return None
