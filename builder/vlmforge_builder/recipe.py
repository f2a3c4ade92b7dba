"""What a model family tells the builder, and how the builder finds families.

Importing this module loads none of a build's libraries: a checkpoint of an unknown family is to be
refused in a second, and they take longer.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from vlmforge.engine.families import ENTRY_POINT_GROUP, supported
from vlmforge.engine.images import ImagePolicy
from vlmforge.engine.interface import Interface
from vlmforge.engine.manifest import KVLayout
from vlmforge.engine.positions import PositionPolicy
from vlmforge.engine.prompts import PromptPolicy
from vlmforge.errors import UnsupportedModelError
from vlmforge_builder.checkpoint.config import ConfigReader

if TYPE_CHECKING:
    from torch import Tensor, nn

    from vlmforge_builder.checkpoint.store import TensorStore
    from vlmforge_builder.weights import Weight


@dataclass(frozen=True, slots=True)
class PartSpec:
    """One graph to export.

    Attributes:
        name: "vision" or "decoder".
        module: Builds the torch module; called where every tensor is fake.
        interface: What it takes and gives in float32, over a dense cache. Inputs whose names
            differ in what follows a dot are one argument of forward, a list.
        weights: Where the values of each parameter are, by the module's parameter names.
    """

    name: str
    module: Callable[[], nn.Module]
    interface: Interface
    weights: Mapping[str, Weight]


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A chat template as jinja text. It gets OpenAI-like messages whose content is a list."""

    name: str
    jinja: str
    stop_words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RecipeOptions:
    """The options of `build-engine` that a recipe needs.

    `note` is told what was chosen where a checkpoint leaves a choice; `tower_weights` chooses
    between a tower inside the checkpoint ("checkpoint") and the one that it names ("stock").
    """

    session_len: int | None
    vision_tower: str | None
    fetch: Callable[[str], Path]
    note: Callable[[str], None] = lambda text: None
    tower_weights: str | None = None


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A checkpoint, understood: parts to export and policies to store.

    `positions` is what the decoder needs to know of a sequence beside its tokens; `other_images`
    are what else users of the original may preprocess images by, beside `image`. `unused` are
    regular expressions of the names of stored tensors that no part reads and that cannot matter:
    any others are refused (`tensor_check`). `feature_layers`: see `DecodePolicy`.
    """

    architecture: str
    parts: tuple[PartSpec, ...]
    store: TensorStore
    image: ImagePolicy
    template: ChatTemplate
    prompt: PromptPolicy
    tokenizer_json: bytes
    tokenizer_proof: str
    kv: KVLayout
    vocab_size: int
    hidden_size: int
    eos_ids: tuple[int, ...]
    tokens_per_image: int
    session_len: int
    trained_len: int
    source_files: tuple[Path, ...]
    positions: PositionPolicy
    other_images: tuple[ImagePolicy, ...] = ()
    unused: tuple[str, ...] = ()
    feature_layers: int = 1


class Recipe(Protocol):
    """All that is known of a model family. A package of recipes exposes one as `RECIPE`."""

    @property
    def name(self) -> str:
        """Name of the family, for messages and provenance."""

    def matches(self, config: ConfigReader) -> bool:
        """Whether `config.json` is of this family; never looks at names of folders.

        Asked before weights are downloaded: UnsupportedModelError for a variant of the family that
        `load` would refuse.
        """

    def load(self, checkpoint: Path, config: ConfigReader, options: RecipeOptions) -> ModelSpec:
        """Understand a checkpoint (CheckpointError otherwise).

        No tensor's values are read, but to tell whether two that should be the same are.
        """


def installed_recipes() -> tuple[Recipe, ...]:
    """Every `RECIPE` of the sub-packages of the packages that are registered as entry points.

    Plain modules of such a package are what its families share.
    """
    found = []
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda e: e.name):
        package = entry.load()
        modules = pkgutil.iter_modules(package.__path__)
        for module in sorted((m for m in modules if m.ispkg), key=lambda m: m.name):
            family = importlib.import_module(f"{package.__name__}.{module.name}")
            found.append(cast("Recipe", family.RECIPE))
    return tuple(found)


def find_recipe(config: ConfigReader) -> Recipe:
    """The one recipe whose family `config.json` is of.

    Raises:
        UnsupportedModelError: no recipe matches, or several do; or one does, but does not know this
            variant. Tells what was found and what is supported.
    """
    matching = [recipe for recipe in installed_recipes() if recipe.matches(config)]
    if len(matching) == 1:
        return matching[0]
    claims = f", claimed by {', '.join(recipe.name for recipe in matching)}" if matching else ""
    raise UnsupportedModelError(
        f"{'More than one' if matching else 'No'} recipe knows the model of {config.file}.",
        found=f"architectures {config.get('architectures')!r}, "
        f"model_type {config.get('model_type')!r}{claims}",
        expected=f"one of: {supported()}",
        fix="choose a supported checkpoint, or add a recipe (CONTRIBUTING.md, 'Add a model')",
    )


def parameters(module: nn.Module) -> dict[str, Tensor]:
    """Parameters of a module by name, in the order of definition."""
    return dict(module.named_parameters())
