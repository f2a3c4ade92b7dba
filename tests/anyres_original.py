"""What the original LLaVA v1.6 code does with an image, restated step by step as an oracle.

Sources: `llava/mm_utils.py` (`select_best_resolution`, `process_anyres_image`) and
`llava/model/llava_arch.py` (`unpad_image`, the merge of "spatial_unpad").
"""

from __future__ import annotations

import math

import torch
from PIL import Image

Size = tuple[int, int]


def best_resolution(size: Size, canvases: tuple[Size, ...]) -> Size:
    """The canvas of an image; sizes are width and height."""
    best, most, least = None, 0, math.inf
    for canvas in canvases:
        scale = min(canvas[0] / size[0], canvas[1] / size[1])
        scaled = int(size[0] * scale) * int(size[1] * scale)
        effective = min(scaled, size[0] * size[1])
        wasted = canvas[0] * canvas[1] - effective
        if effective > most or (effective == most and wasted < least):
            best, most, least = canvas, effective, wasted
    assert best is not None
    return best


def fitted_size(size: Size, canvas: Size) -> Size:
    """What an image is resized to before it is pasted on its canvas."""
    across, down = canvas[0] / size[0], canvas[1] / size[1]
    if across < down:
        return canvas[0], min(math.ceil(size[1] * across), canvas[1])
    return min(math.ceil(size[0] * down), canvas[0]), canvas[1]


def views(image: Image.Image, canvases: tuple[Size, ...], side: int) -> list[Image.Image]:
    """The squeezed image, then the tiles of its canvas."""
    image = image.convert("RGB")
    canvas = best_resolution(image.size, canvases)
    fitted = fitted_size(image.size, canvas)
    padded = Image.new("RGB", canvas, (0, 0, 0))
    offset = ((canvas[0] - fitted[0]) // 2, (canvas[1] - fitted[1]) // 2)
    padded.paste(image.resize(fitted), offset)
    made = [image.resize((side, side))]
    for top in range(0, canvas[1], side):
        for left in range(0, canvas[0], side):
            made.append(padded.crop((left, top, left + side, top + side)))
    return made


def unpad(canvas: torch.Tensor, size: Size) -> torch.Tensor:
    """`canvas` `[channels, down, across]` without what shows padding."""
    high, wide = canvas.shape[1:]
    if size[0] / size[1] > wide / high:
        padding = (high - int(size[1] * (wide / size[0]))) // 2
        return canvas[:, padding : high - padding, :]
    padding = (wide - int(size[0] * (high / size[1]))) // 2
    return canvas[:, :, padding : wide - padding]


def merge(
    features: torch.Tensor, size: Size, canvas: Size, tile: int, newline: torch.Tensor
) -> torch.Tensor:
    """Features `[views, side * side, channels]` to the rows `[tokens, channels]` of an image."""
    base, tiles = features[0], features[1:]
    across, down, side = canvas[0] // tile, canvas[1] // tile, math.isqrt(features.shape[1])
    grid = tiles.view(down, across, side, side, -1).permute(4, 0, 2, 1, 3).contiguous()
    shown = unpad(grid.flatten(1, 2).flatten(2, 3), size)
    ends = newline[:, None, None].expand(*shown.shape[:-1], 1).to(shown.dtype)
    lines = torch.cat((shown, ends), dim=-1).flatten(1, 2).transpose(0, 1)
    return torch.cat((base, lines))
