"""Manifests of older schema versions, as the newest writes them.

1: no digest, so that nothing tells if its values were changed.
2: a digest. Policies have the fields of all their kinds, null or idle where they mean nothing.
3: policies are tagged unions: each kind has its own fields. The position policy may have the
   inverse frequencies, and a part the names of its rotary tables, by which a longer window than the
   built one is made at load; an older engine has neither and keeps its window.

What is malformed is left as it is: `schema` finds the words for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

SCHEMA_VERSION = 3
"""What build-engine writes."""

Table = dict[str, object]

# Fields that the kinds of version 2 had without a meaning.
_IDLE_OF_IMAGES: Mapping[str, tuple[str, ...]] = {
    "center_crop": ("pad_fill", "tiling"),
    "pad_square": ("tiling",),
    "stretch": ("shortest_edge", "pad_fill", "tiling"),
    "anyres": ("shortest_edge", "crop", "pad_fill"),
}
_FORMAT = ("resample", "rescale_factor", "mean", "std", "background")
_DIGITS: Mapping[str, object] = {"down": None, "down_after_7_digits": 7}


def upgraded(data: Mapping[str, object], version: int) -> Table:
    """The values of a manifest of `version` (1 to `SCHEMA_VERSION`), as the newest has them."""
    table = {**data, "schema_version": SCHEMA_VERSION}
    if version == SCHEMA_VERSION:
        return table
    for key, change in (("image", _image), ("prompt", _prompt), ("decode", _decode)):
        if isinstance(table.get(key), dict):
            table[key] = change(dict(cast("Table", table[key])))
    return table


def _image(image: Table) -> Table:
    image["format"] = {key: image.pop(key) for key in _FORMAT if key in image}
    for key in _IDLE_OF_IMAGES.get(str(image.get("name")), ()):
        image.pop(key, None)
    if image.get("name") == "stretch" and "crop" in image:
        image["target"] = image.pop("crop")
    if isinstance(image.get("tiling"), dict):
        image["tiling"] = _tiling(dict(cast("Table", image["tiling"])))
    return image


def _tiling(tiling: Table) -> Table:
    merge, rounding = tiling.get("merge"), str(tiling.pop("rounding", None))
    tiling["merge"] = {"name": merge}
    if merge == "unpadded_lines":
        tiling["merge"] = {"name": merge, "digits": _DIGITS.get(rounding, rounding)}
    return tiling


def _prompt(prompt: Table) -> Table:
    spelling, splice = prompt.pop("spelling", None), prompt.pop("image_splice", None)
    own = spelling if isinstance(spelling, dict) else {}
    return {**prompt, "splice": {"name": splice, **own}}


def _decode(decode: Table) -> Table:
    positions = decode.get("positions")
    if isinstance(positions, dict) and positions.get("name") == "absolute":
        decode["positions"] = {"name": "absolute"}
    return decode
