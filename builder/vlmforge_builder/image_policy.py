"""The image policy that is frozen into an engine: the recipe's, or the one that was asked for."""

from __future__ import annotations

import dataclasses

from vlmforge.errors import ConfigError
from vlmforge_builder.recipe import ModelSpec


def choose_image_policy(spec: ModelSpec, wanted: str | None) -> ModelSpec:
    """The spec with the image policy named `wanted` (None: the recipe's own).

    Raises:
        ConfigError: the model's original code has no such preprocessing.
    """
    if wanted is None:
        return spec
    known = {policy.name: policy for policy in (spec.image, *spec.other_images)}
    if wanted not in known:
        raise ConfigError(
            "This model has no such image policy.",
            found=repr(wanted),
            expected="one of: " + ", ".join(known),
            fix=f"--image-policy {spec.image.name}, or leave it out",
        )
    return dataclasses.replace(spec, image=known[wanted])
