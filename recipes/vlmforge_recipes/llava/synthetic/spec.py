"""What a synthetic checkpoint is: its geometry, its published form, and the sizes we use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from vlmforge.errors import ConfigError

Layout = Literal["hf", "original"]
Keys = Literal["old", "new"]
DType = Literal["float32", "float16", "bfloat16"]
FileFormat = Literal["safetensors", "bin"]

# The pieces of the tokenizer; `<image>` and `<pad>` of the hf layout come right after them.
PIECES = 640
IMAGE_ID = PIECES
PAD_ID = PIECES + 1


@dataclass(frozen=True, slots=True)
class TextSpec:
    """The decoder. `vocab` is the height of both embedding tables, in both layouts."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    rms_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_positions: int = 4096
    tied: bool = False


@dataclass(frozen=True, slots=True)
class VisionSpec:
    """The vision tower. Its last layer and its last norm are stored, and never used."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    image_size: int
    patch_size: int = 14

    @property
    def positions(self) -> int:
        """Patches plus the class token."""
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True, slots=True)
class SyntheticSpec:
    """One checkpoint: everything that decides its bytes.

    Args:
        layout: `hf` (tower inside) or `original` (tower in a sibling folder).
        keys: Tensor names of the hf layout: `old` as published, or `new` as transformers 5 has
            them in memory; `new` also writes its style of config.json. Ignored by `original`.
        file_format: As published, `hf` is safetensors and `original` is bin. A bin file is made
            in memory, so it is for the small sizes.

    Raises:
        ConfigError: A field is unknown, or the geometry contradicts itself.
    """

    text: TextSpec
    vision: VisionSpec
    layout: Layout = "hf"
    dtype: DType = "float32"
    file_format: FileFormat = "safetensors"
    shards: int = 1
    keys: Keys = "old"
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("layout", self.layout, get_args(Layout))
        _one_of("dtype", self.dtype, get_args(DType))
        _one_of("file_format", self.file_format, get_args(FileFormat))
        _one_of("keys", self.keys, get_args(Keys))
        _require(self.shards >= 1, "shards", str(self.shards), "at least 1")
        text, vision = self.text, self.vision
        _divides("heads", text.heads, "hidden", text.hidden)
        _divides("kv_heads", text.kv_heads, "heads", text.heads)
        _divides("vision heads", vision.heads, "vision hidden", vision.hidden)
        _divides("patch_size", vision.patch_size, "image_size", vision.image_size)
        least = PIECES + 2 if self.layout == "hf" else PIECES
        _require(text.vocab >= least, "vocab", str(text.vocab), f"at least {least}")


def _require(holds: bool, name: str, found: str, expected: str) -> None:
    if not holds:
        raise ConfigError(
            f"The synthetic checkpoint cannot have this {name}.", found=found, expected=expected
        )


def _one_of(name: str, found: str, allowed: tuple[str, ...]) -> None:
    _require(found in allowed, name, repr(found), " or ".join(allowed))


def _divides(name: str, divisor: int, whole_name: str, whole: int) -> None:
    holds = divisor >= 1 and whole % divisor == 0
    _require(holds, name, str(divisor), f"a divisor of {whole_name} = {whole}")


PRESETS: Mapping[str, SyntheticSpec] = {
    # 0.7 M parameters, 144 image tokens.
    "tiny": SyntheticSpec(
        text=TextSpec(hidden=128, intermediate=256, layers=2, heads=4, kv_heads=4, vocab=704),
        vision=VisionSpec(hidden=64, intermediate=128, layers=3, heads=2, image_size=168),
    ),
    # A tower of 20 M and a decoder of 41 M parameters, 576 image tokens. The vocabulary is small,
    # so that nearly every id that a random model generates has a text: a demo shows something.
    "60m": SyntheticSpec(
        text=TextSpec(hidden=640, intermediate=1728, layers=8, heads=10, kv_heads=10, vocab=704),
        vision=VisionSpec(hidden=512, intermediate=2048, layers=6, heads=8, image_size=336),
    ),
    # A decoder of 303 M parameters with grouped heads, for compilers.
    "300m": SyntheticSpec(
        text=TextSpec(hidden=1024, intermediate=2816, layers=24, heads=16, kv_heads=4, vocab=32000),
        vision=VisionSpec(hidden=512, intermediate=2048, layers=6, heads=8, image_size=336),
        dtype="float16",
    ),
    # The published tower (0.3 B) before a decoder of 0.74 B parameters.
    "1b": SyntheticSpec(
        text=TextSpec(
            hidden=2048, intermediate=5504, layers=12, heads=16, kv_heads=16, vocab=32064
        ),
        vision=VisionSpec(hidden=1024, intermediate=4096, layers=24, heads=16, image_size=336),
        shards=2,
    ),
    # Every shape of llava-hf/llava-1.5-7b-hf: 14.1 GB.
    "7b": SyntheticSpec(
        text=TextSpec(
            hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32, vocab=32064
        ),
        vision=VisionSpec(hidden=1024, intermediate=4096, layers=24, heads=16, image_size=336),
        dtype="float16",
        shards=3,
    ),
    # Every shape of llava-hf/llava-1.5-13b-hf: 26.7 GB.
    "13b": SyntheticSpec(
        text=TextSpec(
            hidden=5120, intermediate=13824, layers=40, heads=40, kv_heads=40, vocab=32064
        ),
        vision=VisionSpec(hidden=1024, intermediate=4096, layers=24, heads=16, image_size=336),
        dtype="float16",
        shards=6,
    ),
}
