"""Image policies: how an image becomes pixel values and tokens. A tagged union, one file each.

All of them have a `format` and answer `pixels(rgb)`, `view_size`, `view_rows(most_tokens)`,
`sized`, `rows(size)`, `layout(size, tokens)`, `most_tokens(rows)` and `str()`; and for vision parts
that take patches instead of views: `patch_inputs`, `grid(size)`, `arrays(grid)` and
`within(limits, tokens)`. A new one is a file here, called as its tag, and stands in the union and
in the list of where its members are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeAlias

from vlmforge.engine.schema import Elsewhere

if TYPE_CHECKING:
    from vlmforge.engine.images.anyres import AnyRes
    from vlmforge.engine.images.aspect_tiles import AspectTiles
    from vlmforge.engine.images.center_crop import CenterCrop
    from vlmforge.engine.images.grid_tiles import GridTiles
    from vlmforge.engine.images.pad_square import PadSquare
    from vlmforge.engine.images.patches import Patches
    from vlmforge.engine.images.stretch import Stretch

    ImagePolicy: TypeAlias = (
        CenterCrop | PadSquare | Stretch | AnyRes | AspectTiles | GridTiles | Patches
    )
else:  # an engine has one: whoever serves it need not import the others
    ImagePolicy = Annotated[
        object,
        Elsewhere(f"{__name__}.center_crop", "CenterCrop"),
        Elsewhere(f"{__name__}.pad_square", "PadSquare"),
        Elsewhere(f"{__name__}.stretch", "Stretch"),
        Elsewhere(f"{__name__}.anyres", "AnyRes"),
        Elsewhere(f"{__name__}.aspect_tiles", "AspectTiles"),
        Elsewhere(f"{__name__}.grid_tiles", "GridTiles"),
        Elsewhere(f"{__name__}.patches", "Patches"),
    ]
