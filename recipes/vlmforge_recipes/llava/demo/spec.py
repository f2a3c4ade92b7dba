"""What the demo model is: its geometry and its training."""

from __future__ import annotations

from dataclasses import dataclass

from vlmforge.engine.images.pad_square import PadSquare
from vlmforge.engine.images.pixels import PixelFormat
from vlmforge_recipes.llava.synthetic.spec import SyntheticSpec, TextSpec, VisionSpec

TOWER = "clip-vit-patch12-96"
"""Folder of the vision tower inside the checkpoint."""

SPEC = SyntheticSpec(
    # Heads of 64, which every attention kernel has.
    text=TextSpec(
        hidden=192,
        intermediate=384,
        layers=3,
        heads=3,
        kv_heads=3,
        vocab=640,
        max_positions=1024,
        tied=True,
    ),
    vision=VisionSpec(
        hidden=128, intermediate=256, layers=4, heads=4, image_size=96, patch_size=12
    ),
    layout="original",
    dtype="float16",
)

_MEAN = (0.48145466, 0.4578275, 0.40821073)

IMAGE_POLICY = PadSquare(
    PixelFormat("bicubic", 1 / 255, _MEAN, (0.26862954, 0.26130258, 0.27577711)),
    shortest_edge=SPEC.vision.image_size,
    crop=(SPEC.vision.image_size, SPEC.vision.image_size),
    pad_fill=(int(_MEAN[0] * 255), int(_MEAN[1] * 255), int(_MEAN[2] * 255)),
)
"""What the engine makes of the checkpoint's image processor."""


@dataclass(frozen=True, slots=True)
class Training:
    """How it is trained. The `turns` of a conversation share their pictures."""

    steps: int = 2700
    batch_size: int = 48
    turns: int = 5
    matrix_lr: float = 0.005
    other_lr: float = 2e-3
    warmup: int = 100
    cooling: float = 0.5
    weight_decay: float = 0.05
    patch_weight: float = 0.5
    seed: int = 0
