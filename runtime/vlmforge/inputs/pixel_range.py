"""The limits of pixels that a message gives with an image, as the tools of published models do."""

from __future__ import annotations

from collections.abc import Mapping

from vlmforge.engine.images import ImagePolicy
from vlmforge.engine.images.pixels import AS_ENGINE, PixelRange
from vlmforge.errors import ConfigError, PromptError
from vlmforge.field_rules import Int, OrNone, shown

_LIMITS = ("min_pixels", "max_pixels")
_SIZES = ("resized_height", "resized_width")
KEYS = (*_LIMITS, *_SIZES)
"""What an image's part of a message may have beside the image."""

_RULE = OrNone(Int(1))


def pixel_range(where: str, *places: object) -> PixelRange:
    """`min_pixels` and `max_pixels` of an image: keys of its part, or of what the part holds.

    Raises:
        PromptError: one that is no number of pixels, or differs between places; or a size in pixels
            in their stead.
    """
    tables = [place for place in places if isinstance(place, Mapping)]
    for table in tables:
        for name in _SIZES:
            if table.get(name) is not None:
                raise PromptError(
                    f"The image of {where} asks for a size; images keep their shape.",
                    found=f"{name} {shown(table[name])[:80]}",
                    expected="min_pixels and max_pixels, between which it is brought",
                    fix="leave it out, give those, or resize the image and send that",
                )
    return PixelRange(*(_limit(name, where, tables) for name in _LIMITS))


def _limit(name: str, where: str, tables: list[Mapping[str, object]]) -> int | None:
    given = [table[name] for table in tables if table.get(name) is not None]
    if not all(map(_RULE.admits, given)) or len(set(given)) > 1:
        raise PromptError(
            f"{name} of the image of {where} is no number of pixels.",
            found=" and ".join(shown(value)[:80] for value in given),
            expected=f"{name}, once, a positive integer: width times height",
            fix="{'type': 'image_url', 'image_url': {'url': ..., 'max_pixels': 1280 * 28 * 28}}",
        )
    return int(given[0]) if given else None  # type: ignore[call-overload]


def policy_within(policy: ImagePolicy, asked: PixelRange) -> ImagePolicy:
    """How an image is prepared for which a message asks for these limits.

    Raises:
        PromptError: images of this engine have none, or none like these.
    """
    if asked == AS_ENGINE:
        return policy
    try:
        return policy.within(asked)
    except ConfigError as error:
        raise PromptError(
            f"An image of the prompt asks for what it cannot have. {error.summary}",
            found=error.found,
            expected=error.expected,
            fix=error.fix,
        ) from error
