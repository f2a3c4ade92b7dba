"""The content of an image as plain data, and an image of it again: equal pixels, equal digest."""

from __future__ import annotations

from msgspec import Struct
from PIL import Image

from vlmforge.errors import ImageError
from vlmforge.vl.orientation import TAG, UPRIGHT, of_image


class Pixels(Struct, frozen=True):
    """What a Pillow image is, beside its pixels and palette.

    Attributes:
        mode: Pillow's name of what a pixel is.
        size: Width and height, as the pixels lie.
        transparency: "" or the kind of what is transparent: "level" (one number), "colour" (three)
            or "levels" (one for each colour of the palette).
        transparent: Its numbers.
    """

    mode: str
    size: tuple[int, int]
    transparency: str
    transparent: tuple[int, ...]


class StoredImage(Struct, frozen=True):
    """The content of an image.

    Attributes:
        data: A file, without what does not decide its pixels; or pixels, row by row.
        palette: Four bytes for each of its colours, where the pixels have one.
        orientation: EXIF's; 0 where the file itself tells it.
        pixels: What `data` is; None: a file.
    """

    data: bytes
    palette: bytes
    orientation: int
    pixels: Pixels | None


def stored_pixels(image: Image.Image) -> StoredImage:
    """The content of a Pillow image that is loaded."""
    kind, numbers = _transparency(image.info.get("transparency"))
    palette = image.getpalette("RGBA") if image.mode in ("P", "PA") else None
    pixels = Pixels(image.mode, image.size, kind, numbers)
    return StoredImage(image.tobytes(), bytes(palette or ()), of_image(image), pixels)


def pixels_image(stored: StoredImage) -> Image.Image:
    """The Pillow image that `stored_pixels` was given (ImageError: it is not one's content)."""
    facts = stored.pixels
    try:
        if facts is None:
            raise ValueError("an encoded file in the place of pixels")
        image = Image.frombytes(facts.mode, facts.size, stored.data)
        if stored.palette:
            image.putpalette(stored.palette, "RGBA")
        if facts.transparency:
            image.info["transparency"] = _transparent(facts)
        if stored.orientation != UPRIGHT:
            exif = Image.Exif()
            exif[TAG] = stored.orientation
            image.info["exif"] = exif.tobytes()
    except (ValueError, TypeError, KeyError, IndexError, MemoryError, OverflowError) as error:
        raise ImageError(
            "Stored pixels are not those of an image.",
            found=f"{len(stored.data)} bytes, {facts}: {error}"[:200],
            expected="the pixels of an image, as many as its mode and size say",
            fix="store the image again",
        ) from error
    return image


def _transparency(given: object) -> tuple[str, tuple[int, ...]]:
    if isinstance(given, bytes):
        return "levels", tuple(given)
    if isinstance(given, tuple):
        return "colour", tuple(int(level) for level in given)
    return ("level", (given,)) if isinstance(given, int) else ("", ())


def _transparent(facts: Pixels) -> object:
    if facts.transparency == "levels":
        return bytes(facts.transparent)
    return facts.transparent if facts.transparency == "colour" else facts.transparent[0]
