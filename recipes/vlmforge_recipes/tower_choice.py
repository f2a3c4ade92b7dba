"""Which vision tower is used where a checkpoint names one and may store another."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from vlmforge.errors import CheckpointError, ConfigError
from vlmforge_builder.checkpoint.compare import same_values
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.checkpoint.store import JoinedStore, TensorStore, open_store
from vlmforge_builder.recipe import RecipeOptions
from vlmforge_recipes.clip_tower import WHOLE_MODEL

_STOCK = "vision_model."
_INSIDE = "model.vision_tower.vision_tower.vision_model."
_POSITION_IDS = "embeddings.position_ids"


@dataclass(frozen=True, slots=True)
class ChosenTower:
    """The tensors of the checkpoint and of its tower, and what the tower's names begin with.

    `unused` are patterns of the names of those that are not used (see `ModelSpec`).
    """

    store: TensorStore
    prefix: str
    unused: tuple[str, ...]


def choose_tower(
    own: TensorStore, config: ConfigReader, folder: Path, options: RecipeOptions
) -> ChosenTower:
    """The tower inside the checkpoint `own`, or the stock one in `folder`; says which.

    `--tower-weights` decides; otherwise the keys by which the originals load a fine-tuned tower:
    `unfreeze_mm_vision_tower` (`CLIPVisionTower` of LLaVA) and a `mm_tunable_parts` that contains
    `mm_vision_tower` (LLaVA-NeXT). Without them it is the stock one, with a warning where another
    is stored.

    Raises:
        CheckpointError: the tower should be inside, and is not; or two have the same names.
    """
    stored = [name for name in own.names() if name.startswith(_INSIDE)]
    reason = _fine_tuned(config)
    if options.tower_weights is not None:
        reason = f"--tower-weights {options.tower_weights}"
    if options.tower_weights == "checkpoint" or (reason and options.tower_weights is None):
        if not stored:
            raise _not_inside(config, reason)
        options.note(
            f"vision tower: that of the checkpoint ({reason}); of {folder} only its configuration"
        )
        return ChosenTower(own, _INSIDE, ())
    stock = open_store(folder, options.note)
    _refuse_clash(own, stock, config, folder)
    if options.tower_weights is None:
        _warn_of_another(own, stored, stock, folder, options)
    joined = JoinedStore((own, stock))
    return ChosenTower(joined, _STOCK, (re.escape(_INSIDE) + ".*", *WHOLE_MODEL))


def refuse_tower_options(options: RecipeOptions) -> None:
    """For a layout that always has its tower inside (ConfigError where another is asked for)."""
    asked = {"--vision-tower": options.vision_tower, "--tower-weights": options.tower_weights}
    for option, value in asked.items():
        if value is not None:
            raise ConfigError(
                "The checkpoint's layout has its vision tower inside; no other can be chosen.",
                found=f"{option} {value}",
                expected=f"no {option}",
                fix="leave it out",
            )


def _fine_tuned(config: ConfigReader) -> str:
    """The key that says that the tower was fine-tuned; empty if none does."""
    if config.bool("unfreeze_mm_vision_tower", default=False):
        return "unfreeze_mm_vision_tower true"
    parts = config.str("mm_tunable_parts", "")
    return f"mm_tunable_parts {parts!r}" if "mm_vision_tower" in parts else ""


def _warn_of_another(
    own: TensorStore, stored: list[str], stock: TensorStore, folder: Path, options: RecipeOptions
) -> None:
    for name in stored:
        twin = _STOCK + name.removeprefix(_INSIDE)
        if name.endswith(_POSITION_IDS) or (twin in stock and same_values(own, name, stock, twin)):
            continue
        options.note(
            f"warning: vision tower: that of {folder}. The checkpoint stores another ({name} "
            "differs), but neither unfreeze_mm_vision_tower nor mm_tunable_parts in config.json "
            "says that it was fine-tuned; --tower-weights checkpoint takes it, --tower-weights "
            "stock ends this warning"
        )
        return


def _refuse_clash(own: TensorStore, stock: TensorStore, config: ConfigReader, folder: Path) -> None:
    for name in own.names():
        if name.startswith(_STOCK) and name in stock:
            raise CheckpointError(
                f"{config.file.parent} and its vision tower store tensors of the same names.",
                found=f"{name} in {own.info(name).file} and in {folder}",
                expected=f"a tower inside the checkpoint under {_INSIDE}*",
                fix="save the checkpoint again with the code that it was trained with",
            )


def _not_inside(config: ConfigReader, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{config.file.parent} stores no vision tower.",
        found=f"{reason}, and no tensor {_INSIDE}*",
        expected="the fine-tuned vision tower among the weights",
        fix="download or save the checkpoint again with it; if the tower was not trained, "
        "--tower-weights stock takes the one that config.json names",
    )
