"""Random checkpoints in the published layouts, for tests, demonstrations and benchmarks.

    python -m vlmforge_recipes.llava.synthetic OUT --size tiny --layout hf

The answers of such a model mean nothing; its files, shapes, names and costs are a real one's.
"""

from __future__ import annotations

from vlmforge_recipes.llava.synthetic.spec import (
    PRESETS,
    SyntheticSpec,
    TextSpec,
    VisionSpec,
)
from vlmforge_recipes.llava.synthetic.write import write_checkpoint

__all__ = ["PRESETS", "SyntheticSpec", "TextSpec", "VisionSpec", "write_checkpoint"]
