"""Every number of every family's configuration, changed to what no model has: refused at once.

Nothing is traced and no tensor's values are read. What is not refused must be the plan as before,
or one of the values that are meant to be honoured.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from conftest import DATA
from vlmforge.errors import CheckpointError
from vlmforge_builder.checkpoint import limits
from vlmforge_builder.recipe import ModelSpec, RecipeOptions
from vlmforge_builder.recognise import recognise
from vlmforge_builder.tensor_check import check_tensors

FAMILIES = sorted(path.parents[1].name for path in DATA.glob("*/checkpoint/config.json"))
NEVER: tuple[Any, ...] = (math.nan, 10**400, "7", math.inf, 1e308, True)
"""Refused wherever a number is read."""
WRONG: tuple[Any, ...] = (*NEVER, 0, -1, 10**9, 10**15, 2**63, 1.5, None)
# By the last part of a key: which of those have a meaning, and are honoured.
HONOURED: Mapping[str, tuple[Any, ...]] = {
    "rms_norm_eps": (0,),
    "sliding_window": (10**9, 10**15, 2**63),  # no window of an engine is longer
    "layer_norm_eps": (0,),
    "layer_norm_epsilon": (0,),
    "rope_theta": (10**9, 10**15, 1.5),
    "rotary_emb_base": (10**9, 10**15, 1.5),
    "mm_vision_select_layer": (0, -1),
    "vision_feature_layer": (0, -1),
    "tokenizer_model_max_length": (10**9, 10**15, 2**63, None),
    "num_key_value_heads": (None,),
    "eos_token_id": (0, None),
    "image_mean": (0, -1, 1.5),
    "image_std": (1.5,),
    "rescale_factor": (1.5, None),
    "resample": (0, None),
    "size": (None,),
    "crop_size": (None,),
}
# Keys of config.json that the golden checkpoints leave out.
ABSENT: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "llava_next_mistral_hf": (
        ("text_config", "head_dim"),
        ("text_config", "sliding_window"),
        ("vision_config", "layer_norm_eps"),
    ),
    "qwen_vl_chat": (("visual", "n_queries"),),
    "llava_v1_5_liuhaotian": (("tokenizer_model_max_length",),),
}


@dataclass(frozen=True)
class Number:
    """A number in a JSON file of a checkpoint, by its keys and places."""

    file: Path
    keys: tuple[str | int, ...]

    @property
    def name(self) -> str:
        return [key for key in self.keys if isinstance(key, str)][-1]


def numbers(file: Path, value: Any, keys: tuple[str | int, ...] = ()) -> Iterator[Number]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from numbers(file, inner, (*keys, key))
    elif isinstance(value, list):
        for place, inner in enumerate(value[:2]):
            yield from numbers(file, inner, (*keys, place))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield Number(file, keys)


def changed(whole: Any, keys: tuple[str | int, ...], value: Any) -> Any:
    """The JSON with another value at that place."""
    made = copy.deepcopy(whole)
    inner = made
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return made


def no_hub(name: str) -> Path:
    raise CheckpointError(f"{name} could not be fetched.")


def load(checkpoint: Path) -> ModelSpec:
    config, recipe = recognise(checkpoint)
    return recipe.load(checkpoint, config, RecipeOptions(None, None, no_hub))


def plan(spec: ModelSpec) -> object:
    """All that an engine is made of, but the weights' values."""
    parts = [
        (part.name, part.interface, sorted(part.weights), *_configs(part.module))
        for part in spec.parts
    ]
    fields = {name: getattr(spec, name) for name in spec.__slots__}
    for name in ("parts", "store", "source_files", "unused"):
        del fields[name]
    return parts, fields


def _configs(module: Any) -> Iterator[str]:
    """The configurations that a part's module is made with."""
    if isinstance(module, partial):
        yield repr((module.args, sorted(module.keywords.items())))
        return
    for name, value in sorted(inspect.getclosurevars(module).nonlocals.items()):
        if "Config" in type(value).__name__ or name == "geometry":
            yield repr(value)


def linked(source: Path, target: Path) -> Path:
    """The folder again, as links, so that its JSON files can be replaced."""
    for path in source.rglob("*"):
        place = target / path.relative_to(source)
        if path.is_dir():
            place.mkdir(parents=True, exist_ok=True)
        elif not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(path)
    return target


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenizers and headers are read once: they do not change here, and take nearly all time."""
    from vlmforge_recipes import tower_choice
    from vlmforge_recipes.llava import hf, original
    from vlmforge_recipes.qwen_vl import model as qwen
    from vlmforge_recipes.qwen_vl import prompting
    from vlmforge_recipes.yi_vl import model as yi

    for module in (hf, original, qwen, yi, tower_choice):
        opened = cache(lambda folder, real=module.open_store: real(folder))
        monkeypatch.setattr(
            module, "open_store", lambda folder, note=None, opened=opened: opened(folder)
        )
    for module, name in (
        *((module, "convert_tokenizer") for module in (hf, original, yi)),
        (prompting, "convert_byte_bpe"),
    ):
        monkeypatch.setattr(module, name, cache(getattr(module, name)))


def outcomes(folder: Path, found: Number, before: object) -> Iterator[tuple[Any, str]]:
    """What became of each wrong value: refused, same or other; few of a key that is not read."""
    whole = json.loads(found.file.read_text("utf-8"))
    try:
        seen: set[str] = set()
        for value in WRONG:
            if len(seen) == 1 and "same" in seen and value == NEVER[3]:
                return
            text = json.dumps(changed(whole, found.keys, value))
            found.file.unlink()
            found.file.write_text(text, "utf-8")
            try:
                spec = load(folder / "checkpoint")
                same = plan(spec) == before
                if not same:  # otherwise it would be checked like the unchanged one
                    check_tensors(spec, lambda note: None)
            except CheckpointError as error:
                assert error.found, error
                outcome = "refused"
            else:
                outcome = "same" if same else "other"
            seen.add(outcome)
            yield value, outcome
    finally:
        found.file.write_text(json.dumps(whole), "utf-8")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", FAMILIES)
def test_every_number(tmp_path: Path, name: str) -> None:
    folder = linked(DATA / name, tmp_path / "it")
    files = [
        path
        for path in sorted(folder.rglob("*.json"))
        if path.name in ("config.json", "generation_config.json", "preprocessor_config.json")
    ]
    before = plan(load(folder / "checkpoint"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read: set[str] = set()
    present = [n for path in files for n in numbers(path, json.loads(path.read_text("utf-8")))]
    config = folder / "checkpoint" / "config.json"
    for found in (*present, *(Number(config, keys) for keys in ABSENT.get(name, ()))):
        results = list(outcomes(folder, found, before))
        for value, outcome in results:
            honoured = any(
                value is known or value == known for known in HONOURED.get(found.name, ())
            )
            assert outcome != "other" or honoured, (found, value)
        if any(outcome == "refused" for _, outcome in results):
            read.add(found.name)
            sizes = {repr(value): outcome for value, outcome in results}
            for value in NEVER:
                assert sizes[repr(value)] == "refused", (found, value)
    assert len(read) >= 10, read
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown < 256 << 10  # KiB


# Of models that were published: none of the ranges may refuse them.
PUBLISHED: tuple[tuple[range, tuple[int, ...]], ...] = (
    (limits.LAYERS, (1, 12, 24, 32, 40, 48, 60, 80, 126)),
    (limits.HEADS, (1, 2, 4, 8, 12, 16, 32, 40, 56, 64, 128)),
    (limits.HEAD_DIM, (64, 80, 96, 104, 112, 128, 256, 512)),
    (limits.WIDTH, (512, 1024, 4096, 5120, 7168, 8192, 11008, 13696, 16384, 20480, 22016, 53248)),
    (limits.VOCABULARY, (32000, 32064, 64000, 151936, 152064, 262144)),
    (limits.POSITIONS, (2048, 4096, 8192, 32768, 131072, 200000, 1048576, 10485760)),
    (limits.PIXELS, (224, 336, 378, 384, 448, 490, 980)),
    (limits.PATCH, (14, 16, 32)),
    (limits.UNBOUNDED, (2048, 4096, int(1e30))),
    (limits.FEATURE_LAYER, (-2, -1, 0, 22, 23)),
)


def test_published_sizes_are_within_the_ranges() -> None:
    for within, values in PUBLISHED:
        assert [value for value in values if value not in within] == []
