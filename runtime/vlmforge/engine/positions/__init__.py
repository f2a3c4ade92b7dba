"""Position policies: how the places of a sequence's tokens become rotary angles.

A tagged union, one file each. All of them answer `has_levels` and `level(prompt_tokens)`; of angles
that the decoder is given: `turn_width`, `places(tokens, images)` and `turns(places)`; and of
windows that are longer than the built one: `extends`, `trained_length`, `attention_window`,
`table_bytes(positions)` and `longer_tables(positions)`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeAlias

from vlmforge.engine.schema import Elsewhere

if TYPE_CHECKING:
    from vlmforge.engine.positions.absolute import Absolute
    from vlmforge.engine.positions.axes import Axes
    from vlmforge.engine.positions.dynamic_ntk import DynamicNTK

    PositionPolicy: TypeAlias = Absolute | DynamicNTK | Axes
else:  # an engine has one: whoever serves it need not import the others
    PositionPolicy = Annotated[
        object,
        Elsewhere(f"{__name__}.absolute", "Absolute"),
        Elsewhere(f"{__name__}.dynamic_ntk", "DynamicNTK"),
        Elsewhere(f"{__name__}.axes", "Axes"),
    ]
