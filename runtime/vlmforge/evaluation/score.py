"""Whether a reply tells the facts of the exact answer, and how sure a share of right ones is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from vlmforge.evaluation.questions import NUMBERS
from vlmforge.evaluation.scenes import COLORS, PLACES, SHAPES, SIZES

_WORD = re.compile(r"[a-z]+|\d+")
_SAME: Mapping[str, str] = {
    **{str(number): word for number, word in enumerate(NUMBERS)},
    **{f"{shape}s": shape for shape in SHAPES},
    "crosses": "cross",
    "zero": "no",
    "none": "no",
    "center": "centre",
    "middle": "centre",
    "big": "large",
    "little": "small",
}
_PLACE_WORDS = frozenset(" ".join(PLACES).split()) - {"at", "the", "on", "in"}
_FACTS: Mapping[str, frozenset[str]] = {
    "describe": frozenset((*COLORS, *SHAPES, *SIZES)) | _PLACE_WORDS,
    "color": frozenset(COLORS),
    "shape": frozenset(SHAPES),
    "size": frozenset(SIZES),
    "count": frozenset(NUMBERS),
    "place": _PLACE_WORDS,
    "yes_no": frozenset(("yes", "no")),
    "relation": frozenset(("yes", "no")),
    "compare": frozenset(("first", "second", "both", "yes", "no", *COLORS)),
    "second_turn": frozenset((*COLORS, *SIZES)) | _PLACE_WORDS,
}


def facts(kind: str, reply: str) -> tuple[str, ...]:
    """The words of `reply` that answer a question of `kind`, in order, spelled one way.

    A kind that is answered with a fixed sentence keeps every word.
    """
    words = [_SAME.get(word, word) for word in _WORD.findall(reply.lower())]
    known = _FACTS.get(kind)
    found = words if known is None else [word for word in words if word in known]
    # "No, there is no star": one fact.
    return tuple(found[:1]) if kind in ("yes_no", "relation") else tuple(found)


def wilson(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % confidence interval of a share (E. B. Wilson, JASA 22, 1927)."""
    if count == 0:
        return 0.0, 1.0
    share = right / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)
