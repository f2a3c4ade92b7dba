"""How an image becomes pixel values and tokens: what engine.json says of it."""

from __future__ import annotations

from dataclasses import dataclass

Colour = tuple[int, int, int]
"""RGB, 0 to 255."""

Size = tuple[int, int]
"""Width and height."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How an image is cut into views, and which of their rows become tokens.

    Attributes:
        tile: Side of a view in pixels.
        canvases: Sizes (width, height) to choose from, multiples of `tile`; the first wins a tie.
        fill: RGB of the canvas around the image.
        side: Rows of a view along one side: the vision part gives each view `side * side` rows for
            its pixels.
        view_rows: All rows that it gives each view. Those beyond `side * side` are the same for
            every view; "unpadded_lines" ends its lines with the first of them.
        merge: A key of `MERGES`.
        rounding: A key of `ROUNDINGS`: how the size without padding becomes a whole number.
    """

    tile: int
    canvases: tuple[Size, ...]
    fill: tuple[int, int, int]
    side: int
    view_rows: int
    merge: str
    rounding: str


@dataclass(frozen=True, slots=True)
class ImagePolicy:
    """How an image becomes pixel values.

    Attributes:
        name: A key of `POLICIES`.
        shortest_edge: Pixels of the shorter side after resizing; not used by "stretch".
        crop: Height and width of the centre crop; zeros fill what the image does not cover. Of
            "stretch", those that the whole image is resized to.
        resample: A filter of Pillow, in lower case ("bicubic", ...).
        rescale_factor: Multiplies the 8-bit levels.
        mean: Subtracted after rescaling, per channel.
        std: Divides after that, per channel.
        background: RGB under transparent pixels. None: transparency is left out of account, as it
            was when most models were trained.
        pad_fill: RGB of the padding of "pad_square".
        tiling: Views of "anyres", and their rows that become tokens; None for the others, whose one
            view gives all its rows.
    """

    name: str
    shortest_edge: int
    crop: tuple[int, int]
    resample: str
    rescale_factor: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    background: Colour | None
    pad_fill: Colour
    tiling: Tiling | None
