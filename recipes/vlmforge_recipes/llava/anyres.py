"""Images of any resolution, as the configurations of v1.6 describe them.

Sources: `process_anyres_image` in `llava/mm_utils.py`, `prepare_inputs_labels_for_multimodal` in
`llava/model/llava_arch.py`, and `LlavaNextModel.pack_image_features` of transformers.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

from msgspec import structs

from vlmforge.engine.images.anyres import AnyRes
from vlmforge.engine.images.pixels import Size
from vlmforge.engine.images.tiling import Lines, Merge, Tiling, UnpaddedLines, Views
from vlmforge.errors import CheckpointError, UnsupportedModelError
from vlmforge_builder.blocks.vision import VisionConfig
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_recipes.clip_images import read_tile_format

PINPOINTS = "image_grid_pinpoints"
MERGES: Mapping[str, Merge] = {
    "flat": Views(),
    "spatial": Lines(),
    "spatial_unpad": UnpaddedLines(),
}
"""`mm_patch_merge_type` as the runtime calls it."""

# What the classes of transformers mean by a configuration without pinpoints.
_DEFAULT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def original_anyres(processor: ConfigReader, tower: VisionConfig, config: ConfigReader) -> AnyRes:
    """The policy of the original layout.

    Raises:
        CheckpointError: pinpoints that are none, or an image processor of another size.
        UnsupportedModelError: pinpoints that cannot be cut into tiles, or class tokens in a grid.
    """
    merge = config.str("mm_patch_merge_type", "flat")
    # The tiles are resized by Pillow's default filter, whatever the processor says.
    pixels = structs.replace(
        read_tile_format(processor, image_size=tower.image_size), resample="bicubic"
    )
    canvases = _pinpoints(config, config.get(PINPOINTS))
    return AnyRes(pixels, _tiling(tower, config, canvases, MERGES[merge]))


def hf_anyres(processor: ConfigReader, tower: VisionConfig, config: ConfigReader) -> AnyRes:
    """The policy of the layout of transformers (errors as `original_anyres`).

    The processor counts tokens by its own pinpoints and the model makes rows by those of its
    configuration, so they must be the same. Both are height first.
    """
    pixels = read_tile_format(processor, image_size=tower.image_size)
    found = [
        _pinpoints(reader, reader.get(PINPOINTS) or _DEFAULT_PINPOINTS)
        for reader in (config, processor)
    ]
    if found[0] != found[1]:
        raise CheckpointError(
            f"{config.file.name} and {processor.file.name} have other {PINPOINTS}.",
            found=f"{found[0]} and {found[1]}",
            expected="the same",
            fix="check both files against the published ones",
        )
    canvases = tuple((width, height) for height, width in found[0])
    return AnyRes(pixels, _tiling(tower, config, canvases, UnpaddedLines(digits=7)))


def _tiling(
    tower: VisionConfig, config: ConfigReader, canvases: tuple[Size, ...], merge: Merge
) -> Tiling:
    tile = tower.image_size
    if any(length % tile for canvas in canvases for length in canvas):
        found = f"{PINPOINTS} {[list(canvas) for canvas in canvases]}"
        raise _unsupported(config, found, f"multiples of {tile}, the tower's image_size")
    if tower.keep_class_token and merge != Views():
        raise _unsupported(config, "class tokens among the patches of a grid", "patches only")
    return Tiling(
        tile=tile,
        canvases=canvases,
        fill=(0, 0, 0),
        side=tile // tower.patch_size,
        view_rows=tower.tokens + isinstance(merge, UnpaddedLines),
        merge=merge,
    )


def _pinpoints(config: ConfigReader, value: object) -> tuple[Size, ...]:
    """Pairs of lengths in the order of the file, given as a list or as the text of one."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise _wrong(config, value) from None
    pairs = [tuple(pair) if isinstance(pair, list | tuple) else () for pair in _items(value)]
    if not pairs or not all(
        len(pair) == 2 and all(type(length) is int and length in limits.PIXELS for length in pair)
        for pair in pairs
    ):
        raise _wrong(config, value)
    return tuple((first, second) for first, second in pairs)


def _items(value: object) -> list[object] | tuple[object, ...]:
    return value if isinstance(value, list | tuple) else ()


def _wrong(config: ConfigReader, value: object) -> CheckpointError:
    return CheckpointError(
        f"{config.file} has wrong {PINPOINTS}.",
        found=repr(value)[:80],
        expected="a list of pairs of lengths, such as [[336, 672], [672, 336]]",
        fix=f"check {config.file.name} against the published one",
    )


def _unsupported(config: ConfigReader, found: str, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{config.file} describes a variant that this recipe does not know.",
        found=found,
        expected=expected,
        fix="choose a published LLaVA v1.6 checkpoint, or extend the recipe",
    )
