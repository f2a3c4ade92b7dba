"""The image processors of CLIP and LLaVA: their configuration as an image policy.

Sources: `CLIPImageProcessor`, `LlavaImageProcessor` and `LlavaNextImageProcessor` of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from vlmforge.engine.images.center_crop import CenterCrop
from vlmforge.engine.images.pad_square import PadSquare
from vlmforge.engine.images.pixels import Colour, PixelFormat
from vlmforge.engine.images.stretch import Stretch
from vlmforge.errors import CheckpointError, UnsupportedModelError
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.checkpoint.config import ConfigReader, read_config
from vlmforge_builder.checkpoint.keys import KeyTable, check_keys
from vlmforge_recipes.config_keys import LLAVA_TYPES, PREPROCESSOR, PROCESSOR, TOWER

_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
WHITE: Colour = (255, 255, 255)
"""What `convert_to_rgb` of transformers has behind transparent pixels."""
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
# Of a mean or a deviation, in which pixels are 0 to 1 or 0 to 255.
_LARGEST = 1e4
# The classes' own size and crop, for a file that says none.
_DEFAULT_SIZE = 224


def read_image_policy(
    config: ConfigReader, *, image_size: int, pad_to_square: bool
) -> CenterCrop | PadSquare | Stretch:
    """The policy of an image processor's configuration.

    Args:
        config: See `find_processor`.
        image_size: Side of what the tower takes.
        pad_to_square: Put the image on a square of the mean's colour first, as the original LLaVA
            code does (`expand2square` in `llava/mm_utils.py`), and `LlavaImageProcessor` with
            `do_pad`.

    Raises:
        CheckpointError: sizes that are none, or do not end in the tower's image size.
        UnsupportedModelError: steps that cannot be taken, or an unknown filter.
    """
    pads = pad_to_square or _llava_pads(config)
    edge, box = _size(config)
    crop = _crop(config)
    resizes = config.bool("do_resize", default=True)
    crops = config.bool("do_center_crop", default=True)
    _check_steps(config, resizes=resizes, fixed=crops or box is not None or pads)
    target = (image_size, image_size)
    if box is not None or not crops:
        check_fit(config, "size", box or edge, box or (edge, edge), target)
    if crops:
        check_fit(config, "crop_size", crop, crop, target)
    if pads:
        mean = _triple(config, "image_mean", _MEAN)
        fill = (int(mean[0] * 255), int(mean[1] * 255), int(mean[2] * 255))
        return PadSquare(read_format(config), edge if box is None else image_size, target, fill)
    if box is not None:
        return Stretch(read_format(config), target)
    return CenterCrop(read_format(config), edge, target)


def read_tile_format(config: ConfigReader, *, image_size: int) -> PixelFormat:
    """How the pixels of tiles of the tower's size become values; the steps leave their size.

    Raises: see `read_image_policy`.
    """
    for step in ("do_resize", "do_center_crop"):
        config.bool(step, default=True)  # of no effect on tiles, if they are flags
    (edge, box), crop, target = _size(config), _crop(config), (image_size, image_size)
    check_fit(config, "size", box or edge, box or (edge, edge), target)
    check_fit(config, "crop_size", crop, crop, target)
    return read_format(config)


def read_format(
    config: ConfigReader,
    *,
    resample: int = 3,
    mean: tuple[float, float, float] = _MEAN,
    std: tuple[float, float, float] = _STD,
    background: Colour | None = None,
) -> PixelFormat:
    """How pixels become values; the numbers are the class's own, for keys that are left out.

    `background` is what the original has behind transparent pixels; None: its `convert("RGB")`
    leaves transparency out.

    Steps that are left out have neutral numbers.

    Raises: see `read_image_policy`.
    """
    rescales = config.bool("do_rescale", default=True)
    normalizes = config.bool("do_normalize", default=True)
    scale = config.float("rescale_factor", 1 / 255, within=limits.SCALE)
    mean, std = _triple(config, "image_mean", mean), _triple(config, "image_std", std)
    return PixelFormat(
        resample=_resample(config, resample),
        rescale_factor=scale if rescales else 1.0,
        mean=mean if normalizes else (0.0, 0.0, 0.0),
        std=std if normalizes else (1.0, 1.0, 1.0),
        background=background,
    )


def _crop(config: ConfigReader) -> tuple[int, int]:
    return read_box(config, "crop_size") or (_DEFAULT_SIZE, _DEFAULT_SIZE)


def find_processor(folder: Path, tables: Iterable[KeyTable], config: ConfigReader) -> ConfigReader:
    """The image processor's configuration of a checkpoint, its keys checked.

    transformers reads the section of processor_config.json first, where there is one. `config` is
    the checkpoint's configuration.

    Raises:
        CheckpointError: there is none, or a key that is unknown or refused.
    """
    return _processor(folder, tables, config, (PROCESSOR, PREPROCESSOR), "")


def find_tower_processor(
    folder: Path, tables: Iterable[KeyTable], config: ConfigReader
) -> ConfigReader:
    """The same of a vision tower's own folder, which the originals' older transformers read."""
    return _processor(folder, tables, config, (PREPROCESSOR,), TOWER)


def _processor(
    folder: Path,
    tables: Iterable[KeyTable],
    config: ConfigReader,
    names: tuple[str, ...],
    when: str,
) -> ConfigReader:
    for name in names:
        if not (folder / name).exists():
            continue
        found = read_config(folder / name, ignored=config.ignored)
        check_keys(found, tables, when)
        if name == PREPROCESSOR:
            return found
        if found.has("image_processor"):
            return found.section("image_processor")
    raise CheckpointError(
        f"{folder} has no configuration of its image processor.",
        found=f"no {PREPROCESSOR}"
        + (f", and no image_processor in {PROCESSOR}" if PROCESSOR in names else ""),
        expected=PREPROCESSOR,
        fix="download it from where the checkpoint was published",
    )


def _llava_pads(config: ConfigReader) -> bool:
    """CLIP's processor pads nothing that is cropped, the tiles' pads batches; this one images."""
    named = config.opt_str("image_processor_type")
    if named is None and config.has("feature_extractor_type"):
        return False
    return (named is None or named in LLAVA_TYPES) and config.bool("do_pad", default=False)


def _check_steps(config: ConfigReader, *, resizes: bool, fixed: bool) -> None:
    for ok, found in ((resizes, "do_resize: false"), (fixed, "do_center_crop: false")):
        if not ok:
            raise UnsupportedModelError(
                f"The image processor of {config.file} leaves a step out.",
                found=found,
                expected="images that all reach the vision tower in its own size",
                fix="check the file against the published one",
            )


def _size(config: ConfigReader) -> tuple[int, tuple[int, int] | None]:
    """The shortest edge that images are resized to, or a height and width for all."""
    value = config.get("size")
    if value is None or isinstance(value, int):
        return config.int("size", _DEFAULT_SIZE, within=limits.PIXELS), None
    if isinstance(value, dict):
        given = {name for name, length in value.items() if length is not None}
        if given == {"shortest_edge"}:
            return config.section("size").int("shortest_edge", within=limits.PIXELS), None
    box = read_box(config, "size")
    assert box is not None
    return box[0], box


def read_box(config: ConfigReader, key: str) -> tuple[int, int] | None:
    """Height and width, given as a number for both, as a list or as an object; None: absent.

    Raises:
        CheckpointError: anything else.
    """
    value = config.get(key)
    if value is None:
        return None
    if isinstance(value, dict):
        given = {name: length for name, length in value.items() if length is not None}
        pair = [given.pop("height", None), given.pop("width", None)]
        pair += given.values()
    else:
        pair = value if isinstance(value, list) else [value, value]
    if len(pair) != 2 or not all(_is_side(length) for length in pair):
        forms = '336, {"height": 336, "width": 336}'
        raise _wrong(config, key, forms + (' or {"shortest_edge": 336}' if key == "size" else ""))
    return pair[0], pair[1]


def _is_side(length: object) -> bool:
    return type(length) is int and length in limits.PIXELS


def _resample(config: ConfigReader, default: int) -> str:
    number = config.int("resample", default, within=limits.TOKEN)
    if number not in _RESAMPLE:
        raise UnsupportedModelError(
            f"The image processor of {config.file} resizes by an unknown filter.",
            found=f"resample: {number}",
            expected=", ".join(f"{known} ({name})" for known, name in _RESAMPLE.items()),
            fix="check the file against the published one",
        )
    return _RESAMPLE[number]


def _triple(
    config: ConfigReader, key: str, default: tuple[float, float, float]
) -> tuple[float, float, float]:
    """A number for each channel, or one for all."""
    value = config.get(key)
    if value is None:
        return default
    items = value if isinstance(value, list) else [value] * 3
    numbers = [item for item in items if type(item) is int or type(item) is float]
    least = math.ulp(0.0) if key == "image_std" else -_LARGEST  # it is divided by
    if len(items) != 3 or len(numbers) != 3 or not all(least <= n < _LARGEST for n in numbers):
        raise _wrong(config, key, "three numbers (of image_std: above 0)")
    first, second, third = map(float, numbers)
    return first, second, third


def _wrong(config: ConfigReader, key: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{config.file} has a wrong {key}.",
        found=repr(config.get(key))[:80],
        expected=expected,
        fix="check the file against the published one",
    )


def check_fit(
    config: ConfigReader, key: str, said: object, end: tuple[int, int], target: tuple[int, int]
) -> None:
    """Check that images end in the tower's size, `target` (CheckpointError)."""
    if end != target:
        raise CheckpointError(
            f"The image processor of {config.file} does not fit the vision tower.",
            found=f"{key} {said}",
            expected=f"{target}, the tower's image_size",
            fix="check that the file belongs to this checkpoint",
        )
