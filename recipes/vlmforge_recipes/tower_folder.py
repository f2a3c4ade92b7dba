"""Where the vision tower of a checkpoint lies that only names it in its config."""

from __future__ import annotations

from pathlib import Path

from vlmforge.errors import CheckpointError
from vlmforge_builder.checkpoint.altered import refuse_altered
from vlmforge_builder.recipe import RecipeOptions


def find_tower(checkpoint: Path, named: str, options: RecipeOptions) -> Path:
    """The folder of the vision tower.

    `--vision-tower` wins. Otherwise `mm_vision_tower` is looked for inside and beside the
    checkpoint, under the working directory, and at last on the hub. A path of the machine where a
    checkpoint was trained is looked for inside by its last two folders. Of several the first is
    taken, with a warning.

    Raises:
        CheckpointError: it is nowhere, and lists the places; or its weights are quantised.
    """
    folder = _find(checkpoint, named, options)
    refuse_altered(folder)
    return folder


def _find(checkpoint: Path, named: str, options: RecipeOptions) -> Path:
    if options.vision_tower is not None:
        return options.fetch(options.vision_tower)
    bases = (checkpoint, checkpoint.parent, checkpoint.parent.parent, Path.cwd())
    places = [base / named for base in bases]
    places += [checkpoint.parent / Path(named).name, checkpoint / Path(*Path(named).parts[-2:])]
    there: dict[Path, Path] = {}
    for place in places:
        if (place / "config.json").exists():
            there.setdefault(place.resolve(), place)
    found = list(there.values())
    if len(found) > 1:
        options.note(
            f"warning: vision tower: that of {found[0]}; it is in {', '.join(map(str, found[1:]))} "
            "too, and --vision-tower chooses another"
        )
    if found:
        return found[0]
    try:
        return options.fetch(named)
    except CheckpointError as error:
        raise CheckpointError(
            f"The vision tower {named!r} of {checkpoint} was not found.",
            found="nothing at "
            + ", ".join(str(place) for place in places)
            + f"; nor on the hub ({error.summary})",
            expected=f"the folder of {named}, with its config.json and weights",
            fix=f"build-engine {checkpoint} --vision-tower FOLDER_OR_HUB_ID ...",
        ) from error
