"""Drawing the boxes of an answer on its image."""

from __future__ import annotations

from collections.abc import Iterable

from PIL import Image, ImageDraw, ImageFont

from vlmforge.vl.boxes import Box
from vlmforge.vl.decode import to_rgb
from vlmforge.vl.load import ImageSource, load_image

COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")
"""Of the boxes: each new `ref` takes the next, and boxes of the same `ref` share one."""
_BACK = "#ffffff"

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def draw_boxes(
    image: ImageSource, boxes: Iterable[Box], *, font: Font | None = None
) -> Image.Image:
    """A copy of `image`, RGB and upright, with `boxes` and their words on it.

    Args:
        image: The image that the boxes lie on: anything that `load_image` takes.
        boxes: Such as `response.boxes`; corners outside the image are moved to its edge.
        font: For the words; without one, Pillow's own, which has few letters beyond Latin.

    Raises:
        ImageError: the image cannot be loaded.
    """
    canvas = to_rgb(load_image(image)).copy()
    pen, line = ImageDraw.Draw(canvas), max(2, min(canvas.size) // 200)
    font = font or ImageFont.load_default(max(10, min(canvas.size) // 30))
    colours: dict[str, str] = {}
    for number, box in enumerate(boxes):
        known = box.ref is not None and box.ref in colours
        colour = colours.setdefault(box.ref or f"\0{number}", COLOURS[len(colours) % len(COLOURS)])
        (left, right), (top, bottom) = (
            sorted(min(max(place, 0), size - 1) for place in places)
            for places, size in zip(((box.x1, box.x2), (box.y1, box.y2)), canvas.size, strict=True)
        )
        pen.rectangle((left, top, right, bottom), outline=colour, width=line)
        if box.ref and not known:
            _write(pen, (left, top), box.ref, colour, font)
    return canvas


def _write(
    pen: ImageDraw.ImageDraw, place: tuple[int, int], words: str, colour: str, font: Font
) -> None:
    """Words above `place`, or below it where there is no room."""
    if isinstance(font, ImageFont.ImageFont):  # a bitmap font has the letters of Latin-1 only
        words = words.encode("latin-1", "replace").decode("latin-1")
    left, top, right, bottom = pen.textbbox((0, 0), words, font=font)
    x, y = place[0], max(place[1] - int(bottom - top), 0)
    pen.rectangle((x, y, x + right - left, y + bottom - top), fill=_BACK)
    pen.text((x - left, y - top), words, fill=colour, font=font)
