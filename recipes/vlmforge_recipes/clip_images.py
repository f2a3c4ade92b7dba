"""The CLIP image processor's configuration as an image policy."""

from __future__ import annotations

import math
from pathlib import Path

from vlmforge.errors import CheckpointError, UnsupportedModelError
from vlmforge.vl.preprocess import ImagePolicy
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.checkpoint.config import ConfigReader, read_config

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
# Of a mean or a deviation, in which pixels are 0 to 1 or 0 to 255.
_LARGEST = 1e4
_STEPS = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")


def read_image_policy(folder: Path, *, image_size: int, pad_to_square: bool) -> ImagePolicy:
    """The policy of `preprocessor_config.json` (or `processor_config.json` of transformers 5).

    `pad_to_square` puts the image on a square of the mean's colour first, as the original LLaVA
    code does (`expand2square` in `llava/mm_utils.py`).

    Raises:
        CheckpointError: no such file, or a crop that is not the tower's image size.
        UnsupportedModelError: one of the steps is switched off.
    """
    config = find_processor(folder)
    for step in _STEPS:
        if not config.bool(step, default=True):
            raise UnsupportedModelError(
                f"The image processor of {config.file} leaves a step out.",
                found=f"{step}: false",
                expected=", ".join(_STEPS) + " true",
                fix="check the file against the published one",
            )
    crop = _size(config, "crop_size", ("height", "width"), image_size)
    if crop != (image_size, image_size):
        raise CheckpointError(
            f"The image processor of {config.file} does not fit the vision tower.",
            found=f"crop_size {crop}",
            expected=f"({image_size}, {image_size}), the tower's image_size",
            fix="check that the file belongs to this checkpoint",
        )
    mean = _triple(config, "image_mean", _MEAN)
    resample = config.int("resample", 3, within=range(len(_RESAMPLE)))
    return ImagePolicy(
        name="pad_square" if pad_to_square else "center_crop",
        shortest_edge=_size(config, "size", ("shortest_edge",), image_size)[0],
        crop=crop,
        resample=_RESAMPLE[resample],
        rescale_factor=config.float("rescale_factor", 1 / 255, within=limits.SCALE),
        mean=mean,
        std=_triple(config, "image_std", _STD),
        background=None,  # the originals' `convert("RGB")`
        pad_fill=(int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255)),
        tiling=None,
    )


def find_processor(folder: Path) -> ConfigReader:
    """The image processor's configuration (CheckpointError when there is none)."""
    plain, nested = folder / "preprocessor_config.json", folder / "processor_config.json"
    if plain.exists():
        return read_config(plain)
    if nested.exists() and (config := read_config(nested)).has("image_processor"):
        return config.section("image_processor")
    raise CheckpointError(
        f"{folder} has no configuration of its image processor.",
        found="neither preprocessor_config.json nor an image_processor in processor_config.json",
        expected="preprocessor_config.json",
        fix="download it from where the checkpoint was published",
    )


def _size(config: ConfigReader, key: str, names: tuple[str, ...], default: int) -> tuple[int, ...]:
    """A size given as a number (all `names` alike) or as an object with `names`."""
    value = config.get(key)
    if isinstance(value, dict):
        section = config.section(key)
        return tuple(section.int(name, within=limits.PIXELS) for name in names)
    number = config.opt_int(key, within=limits.PIXELS)
    return (default if number is None else number,) * len(names)


def _triple(
    config: ConfigReader, key: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    value = config.get(key)
    if value is None:
        return default
    least = math.ulp(0.0) if key == "image_std" else -math.inf  # it is divided by
    numbers = isinstance(value, list) and all(
        isinstance(item, int | float)
        and not isinstance(item, bool)
        and abs(item) < _LARGEST
        and item >= least
        for item in value
    )
    if not isinstance(value, list) or not numbers or len(value) != 3:
        raise CheckpointError(
            f"{config.file} has a wrong {key}.",
            found=repr(value)[:80],
            expected="three numbers (of image_std: above 0)",
            fix="check the file against the published one",
        )
    first, second, third = (float(item) for item in value)
    return first, second, third
