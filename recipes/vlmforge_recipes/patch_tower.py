"""Vision towers that take patches: where their weights are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from vlmforge.engine.images.patches import Patches
from vlmforge.engine.interface import PatchInterface
from vlmforge.errors import CheckpointError, UnsupportedModelError
from vlmforge_builder.blocks.layers import ACTIVATIONS
from vlmforge_builder.blocks.patch_vision import (
    PatchVision,
    PatchVisionConfig,
    PlacedVision,
    WindowedVision,
)
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.checkpoint.config import ConfigReader
from vlmforge_builder.checkpoint.store import TensorStore, expect
from vlmforge_builder.recipe import PartSpec
from vlmforge_builder.weights import Stored, Weight
from vlmforge_recipes.clip_tower import linear, norm

_THETA = 10000.0  # of the configuration classes


@dataclass(frozen=True, slots=True)
class TowerNames:
    """What the tensors are called, behind the tower's prefix.

    Attributes:
        mlp: Of a layer: the names of what its first linear layer is made of, and of the second.
        merger: Norm, first and second linear layer, behind the name of a merger.
        taps: What the names of the mergers of tapped layers begin with.
    """

    mlp: tuple[tuple[str, ...], str]
    merger: tuple[str, str, str]
    taps: str = ""


@dataclass(frozen=True, slots=True)
class Unfolded(Weight):
    """A convolution over whole patches, `[out, channels, ...]`, as a matrix `[values, out]`."""

    key: str
    shape: tuple[int, ...]

    @property
    @override
    def names(self) -> tuple[str, ...]:
        return (self.key,)

    @override
    def read(self, store: TensorStore, shape: tuple[int, ...]) -> Tensor:
        expect(store, self.key, self.shape)
        return store.read(self.key).flatten(1).T


def inverse_frequencies(head_dim: int, theta: float) -> tuple[float, ...]:
    """Radians a patch, `head_dim / 4` of them for each direction, in fp32 as the originals have."""
    half = head_dim // 2
    exponent = torch.arange(0, half, 2, dtype=torch.float) / half
    return tuple((1.0 / (theta**exponent)).tolist())


def vision_theta(vision: ConfigReader) -> float:
    """The base of the angles of patches."""
    if not vision.has("rope_parameters"):
        return _THETA
    return vision.section("rope_parameters").float("rope_theta", _THETA, within=limits.ROTARY_BASE)


def check_heads(vision: ConfigReader, hidden: int, heads: int) -> None:
    """Heads must lie side by side, and turn in two directions (CheckpointError otherwise)."""
    if hidden % heads or (hidden // heads) % 4:
        raise CheckpointError(
            f"{vision.file} does not fit itself.",
            found=f"a vision tower {hidden} wide with {heads} heads",
            expected="heads of a width that four divides, side by side in the tower's",
            fix=f"check {vision.file.name} against the published one",
        )


def read_activation(vision: ConfigReader, default: str) -> str:
    """`hidden_act` of the tower (UnsupportedModelError: not known)."""
    if (named := vision.str("hidden_act", default)) in ACTIVATIONS:
        return named
    raise UnsupportedModelError(
        f"The vision tower of {vision.file} is a variant that is not supported.",
        found=f"hidden_act {named!r}",
        expected="one of: " + ", ".join(sorted(ACTIVATIONS)),
        fix="choose a published checkpoint, or extend the recipe",
    )


def patch_vision_part(
    config: PatchVisionConfig, image: Patches, names: TowerNames, prefix: str
) -> PartSpec:
    """The tower and its mergers as a part."""
    inputs = config.inputs
    kind = WindowedVision if inputs.window else PlacedVision if inputs.places else PatchVision
    width = config.outputs * (1 + len(config.tapped))
    return PartSpec(
        name="vision",
        module=partial(kind, config),
        interface=PatchInterface(inputs, width),
        weights=_weights(config, image, names, prefix),
    )


def _weights(
    config: PatchVisionConfig, image: Patches, names: TowerNames, prefix: str
) -> dict[str, Weight]:
    kernel = (config.hidden_size, 3, image.frames, image.patch, image.patch)
    embed = f"{prefix}patch_embed.proj"
    weights: dict[str, Weight] = {"patch.weight": Unfolded(f"{embed}.weight", kernel)}
    if config.patch_bias:
        weights["patch.bias"] = Stored(f"{embed}.bias")
    if config.table:
        weights["table"] = Stored(f"{prefix}pos_embed.weight")
    for i in range(config.layers):
        weights |= _layer(config, names, f"layers.{i}.", f"{prefix}blocks.{i}.")
    weights |= _merger(config, names, "merger.", f"{prefix}merger.")
    for i in range(len(config.tapped)):
        weights |= _merger(config, names, f"taps.{i}.", f"{prefix}{names.taps}.{i}.")
    return weights


def _layer(
    config: PatchVisionConfig, names: TowerNames, ours: str, theirs: str
) -> dict[str, Weight]:
    hidden, inner = config.hidden_size, config.intermediate_size
    first, second = names.mlp
    return {
        **_norm(config, f"{ours}attn_norm", f"{theirs}norm1"),
        **linear(f"{ours}attn.qkv", (f"{theirs}attn.qkv",), (3 * hidden,)),
        **linear(f"{ours}attn.out", (f"{theirs}attn.proj",), (hidden,)),
        **_norm(config, f"{ours}mlp_norm", f"{theirs}norm2"),
        **linear(f"{ours}mlp.fc1", tuple(f"{theirs}mlp.{n}" for n in first), (inner,) * len(first)),
        **linear(f"{ours}mlp.fc2", (f"{theirs}mlp.{second}",), (hidden,)),
    }


def _merger(
    config: PatchVisionConfig, names: TowerNames, ours: str, theirs: str
) -> dict[str, Weight]:
    width = config.hidden_size * config.inputs.group
    norms, first, second = names.merger
    return {
        **_norm(config, f"{ours}norm", f"{theirs}{norms}"),
        **linear(f"{ours}fc1", (f"{theirs}{first}",), (width,)),
        **linear(f"{ours}fc2", (f"{theirs}{second}",), (config.outputs,)),
    }


def _norm(config: PatchVisionConfig, ours: str, theirs: str) -> dict[str, Weight]:
    if config.gated:
        return {f"{ours}.weight": Stored(f"{theirs}.weight")}
    return norm(ours, theirs)
