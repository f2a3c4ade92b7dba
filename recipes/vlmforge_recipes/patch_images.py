"""The image processor of Qwen's models: its configuration as an image policy.

Source: `Qwen2VLImageProcessorPil` of transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlmforge.engine.images.patches import Patches
from vlmforge.errors import CheckpointError, UnsupportedModelError
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_recipes.clip_images import WHITE, read_format

_PIXELS = range(1, 1 << 40)
_SIDES = range(1, 1 << 10)
# The class's own.
_LEAST, _MOST = 56 * 56, 28 * 28 * 1280


@dataclass(frozen=True, slots=True)
class TowerGrid:
    """What the tower says of its patches.

    Attributes:
        patch, frames, merge: See `Patches`.
        inverse_frequencies, window, table: Likewise.
    """

    patch: int
    frames: int
    merge: int
    inverse_frequencies: tuple[float, ...]
    window: int = 0
    table: int = 0


def read_patches(processor: ConfigReader, tower: TowerGrid) -> Patches:
    """The policy of an image processor's configuration.

    Raises:
        CheckpointError: limits that are none, or patches that are not the tower's.
        UnsupportedModelError: images that are not resized, or an unknown filter.
    """
    if not processor.bool("do_resize", default=True):
        raise UnsupportedModelError(
            f"The image processor of {processor.file} leaves a step out.",
            found="do_resize: false",
            expected="images that are resized to whole patches",
            fix="check the file against the published one",
        )
    for key, default, wanted in (
        ("patch_size", 14, tower.patch),
        ("temporal_patch_size", 2, tower.frames),
        ("merge_size", 2, tower.merge),
    ):
        if (found := processor.int(key, default, within=_SIDES)) != wanted:
            raise CheckpointError(
                f"{processor.file} does not fit the vision tower.",
                found=f"{key} {found}",
                expected=f"{wanted}, as config.json says",
                fix="check that the file belongs to this checkpoint",
            )
    least, most = _limit(processor, "least"), _limit(processor, "most")
    if not least <= most or most < (tower.patch * tower.merge) ** 2:
        raise CheckpointError(
            f"{processor.file} has limits of pixels that no image fits.",
            found=f"from {least} to {most}",
            expected="a smaller and a larger number, and room for a token",
            fix="check the file against the published one",
        )
    return Patches(
        read_format(processor, background=WHITE),
        tower.patch,
        tower.frames,
        tower.merge,
        least,
        most,
        tower.inverse_frequencies,
        tower.window,
        tower.table,
    )


def _limit(processor: ConfigReader, which: Literal["least", "most"]) -> int:
    """The older key of its own wins over the one in `size`, as the class has it."""
    key, edge, default = {
        "least": ("min_pixels", "shortest_edge", _LEAST),
        "most": ("max_pixels", "longest_edge", _MOST),
    }[which]
    if (named := processor.opt_int(key, within=_PIXELS)) is not None:
        return named
    if processor.has("size"):
        return processor.section("size").int(edge, within=_PIXELS)
    return default
