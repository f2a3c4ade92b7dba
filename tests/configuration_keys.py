"""Checkpoints with one configuration key changed, for the tests of docs/checkpoints.md.

The document's tables are read as text: they are what the code is held to.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import FunctionType
from typing import Any

from msgspec import Struct, structs

from conftest import DATA, ROOT
from live_parity import FAMILIES
from vlmforge_builder.recipe import ModelSpec, RecipeOptions
from vlmforge_builder.recognise import recognise

DOCUMENT = ROOT / "docs/checkpoints.md"
PREPROCESSOR = "preprocessor_config.json"
Edit = Callable[[Path], None]


@dataclass(frozen=True)
class Row:
    """Keys of one section of one file that have one fate in some layouts."""

    file: str
    place: str
    when: str
    layouts: tuple[str, ...]
    keys: tuple[str, ...]
    fate: str
    admitted: tuple[object, ...]


def rows() -> Iterator[Row]:
    """The rows of the document's tables."""
    place: tuple[str, str, str] = ("", "", "")
    layouts: tuple[str, ...] = ()
    for line in DOCUMENT.read_text("utf-8").splitlines():
        if heading := re.fullmatch(r"### `(\S+)`(?: `(\S+)`)?(?: (\D.*))?", line):
            place = (heading[1], heading[2] or "", heading[3] or "")
        elif line.startswith("Of: "):
            layouts = tuple(line.removeprefix("Of: ").removesuffix(".").split("; "))
        elif line.startswith("| `"):
            keys, fate, _ = line.strip("| ").split(" | ", 2)
            name, _, values = fate.partition(" unless ")
            given = [value.strip("`") for value in values.split(" or ") if value]
            admitted = tuple(map(json.loads, given))
            names = tuple(key.strip("`") for key in keys.split(", "))
            yield Row(*place, layouts, names, name, admitted)


def _edit(file: str, **values: object) -> Edit:
    def edit(checkpoint: Path) -> None:
        write(checkpoint / file, {**read(checkpoint / file), **values})

    return edit


def _text(**values: object) -> Edit:
    def edit(checkpoint: Path) -> None:
        config = read(checkpoint / "config.json")
        config["text_config"] = {**config["text_config"], **values}
        write(checkpoint / "config.json", config)

    return edit


def _older_rope(checkpoint: Path, *, scaled: bool) -> None:
    """Rotary positions as they are published: before version 5 of transformers."""
    config = read(checkpoint / "config.json")
    text = config["text_config"]
    rope = text.pop("rope_parameters", None) or {**text.pop("rope_scaling"), "rope_theta": 1e4}
    text["rope_theta"] = rope.pop("rope_theta")
    write(
        checkpoint / "config.json",
        {**config, "text_config": {**text, "rope_scaling": rope} if scaled else text},
    )


def _keep_tokenizer(checkpoint: Path, name: str) -> None:
    """Leave the checkpoint with a tokenizer in this file alone."""
    if not (checkpoint / name).exists():
        (checkpoint / name).write_bytes(load(checkpoint).tokenizer_json)
    for other in ("tokenizer.json", "tokenizer.model", "qwen.tiktoken"):
        if other != name:
            (checkpoint / other).unlink(missing_ok=True)


def _name_processor(path: Path) -> None:
    """The processor that can pad, where CLIP's is named, which takes the same steps but that."""
    if read(path).get("image_processor_type") == "CLIPImageProcessor":
        write(path, {**read(path), "image_processor_type": "LlavaImageProcessor"})


def _move_template(checkpoint: Path, name: str) -> None:
    """Leave the checkpoint with its chat template in this file alone."""
    if name == "tokenizer_config.json":
        (checkpoint / "chat_template.json").unlink(missing_ok=True)
    own = checkpoint / "chat_template.jinja"
    if own.exists():
        _edit(name, chat_template=own.read_text("utf-8"))(checkpoint)
        own.unlink()


def _nested(checkpoint: Path) -> None:
    """As transformers 5 saves it; the file beside it must not be asked."""
    processor = read(checkpoint / PREPROCESSOR)
    _edit("processor_config.json", image_processor=processor)(checkpoint)


def _old_rope(checkpoint: Path) -> None:
    """As before transformers 5: the base apart, and the rest under another name."""
    config = read(checkpoint / "config.json")
    text = config["text_config"]
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    write(checkpoint / "config.json", config)


@cache
def _drawn(family: str, shape: str) -> Path:
    """A checkpoint drawn at random, with an output matrix of its own."""
    module, folder = FAMILIES[family], Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    module.write(folder / "checkpoint", dataclasses.replace(module.SHAPES[shape], tied=False))
    return folder


# Each layout's golden checkpoint, or one that is drawn, and what makes it one of the layout.
LAYOUTS: Mapping[str, tuple[str | tuple[str, str], tuple[Edit, ...]]] = {
    "LLaVA v1.5 of transformers, Llama": ("llava_1_5_hf", ()),
    "LLaVA v1.5 of transformers, Mistral": (
        "llava_1_5_hf",
        (_text(model_type="mistral", sliding_window=None),),
    ),
    "LLaVA v1.6 of transformers, Llama": ("llava_next_mistral_hf", (_text(model_type="llama"),)),
    "LLaVA v1.6 of transformers, Mistral": ("llava_next_mistral_hf", ()),
    "original LLaVA, Llama": ("llava_v1_5_liuhaotian", ()),
    "original LLaVA, Mistral": ("llava_v1_6_mistral_liuhaotian", ()),
    "Yi-VL": ("yi_vl", ()),
    "Qwen-VL-Chat": ("qwen_vl_chat", ()),
    "InternVL of transformers, Qwen2": (("internvl", "qwen2"), ()),
    "InternVL of transformers, Qwen3": (("internvl", "qwen3"), ()),
    "InternVL of transformers, Llama": (("internvl", "llama"), ()),
    "Idefics3 and SmolVLM of transformers": (("idefics3", "idefics3"), ()),
    "SmolVLM2 of transformers": (("idefics3", "smolvlm"), ()),
    "Qwen2-VL": (("qwen2_vl", "plain"), ()),
    "Qwen2-VL of transformers 4.52": (("qwen2_vl", "nested_plain"), (_old_rope,)),
    "Qwen2-VL of transformers 5": (("qwen2_vl", "nested_plain"), ()),
    "Qwen2.5-VL": (("qwen2_vl", "windowed"), ()),
    "Qwen2.5-VL of transformers 4.52": (("qwen2_vl", "nested"), (_old_rope,)),
    "Qwen2.5-VL of transformers 5": (("qwen2_vl", "nested"), ()),
    "Qwen3-VL": (("qwen3_vl", "first"), (_old_rope,)),
    "Qwen3-VL of transformers 5": (("qwen3_vl", "first"), ()),
}


def read(path: Path) -> dict[str, Any]:
    """The JSON object of a file; empty where there is none."""
    if not path.exists():
        return {}
    value: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return value


def write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values), "utf-8")


@dataclass(frozen=True)
class Section:
    """One section of one file of a checkpoint of a layout, on disk."""

    layout: str
    checkpoint: Path
    path: Path
    place: str

    def values(self) -> dict[str, Any]:
        found = read(self.path)
        for part in self.place.split(".") if self.place else ():
            found = found.get(part) or {}
        return found

    def plan(self, **changes: object) -> object:
        """What a build would make of the checkpoint with these keys changed."""
        values, kept = read(self.path), self.checkpoint.parent / "as it was"
        if there := self.path.exists():  # moved away: some disks are slow where a file is cut
            self.path.rename(kept)
        try:
            write(self.path, _with(values, self.place, changes))
            return plan(load(self.checkpoint))
        finally:
            if there:
                kept.replace(self.path)
            else:
                self.path.unlink()


def _with(values: dict[str, Any], place: str, changes: Mapping[str, object]) -> dict[str, Any]:
    if not place:
        return {**values, **changes}
    first, _, rest = place.partition(".")
    return {**values, first: _with(values.get(first) or {}, rest, changes)}


def section(folder: Path, row: Row, layout: str) -> Section:
    """The section of `row` in a new checkpoint of `layout` below `folder`."""
    golden, edits = LAYOUTS[layout]
    source = DATA / golden if isinstance(golden, str) else _drawn(*golden)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.npz", "cases.json"))
    checkpoint = folder / "checkpoint"
    base = checkpoint
    if row.when == "of the vision tower":
        (path,) = folder.rglob("*clip*/config.json")
        base = path.parent
    if row.when.startswith("with a tokenizer."):
        _keep_tokenizer(checkpoint, row.when.removeprefix("with a "))
    if row.file == "config.json" and base == checkpoint:
        (checkpoint / "generation_config.json").unlink()  # it would be asked first
    if row.file == PREPROCESSOR or row.place == "image_processor":
        _name_processor(checkpoint / PREPROCESSOR)
    own_ropes = isinstance(golden, str) or golden[0] in ("qwen2_vl", "qwen3_vl")
    if not own_ropes and not row.place.endswith("rope_parameters"):
        _older_rope(checkpoint, scaled=row.place.endswith("rope_scaling"))
    if row.file in ("tokenizer_config.json", "chat_template.json"):
        _move_template(checkpoint, row.file)
    if row.place == "image_processor":
        _nested(checkpoint)
    for edit in edits:
        edit(checkpoint)
    return Section(layout, checkpoint, base / row.file, row.place)


def load(checkpoint: Path) -> ModelSpec:
    """The checkpoint, understood, as the command line does before it compiles."""
    config, recipe = recognise(checkpoint)
    return recipe.load(checkpoint, config, RecipeOptions(None, None, Path))


def plan(spec: ModelSpec) -> object:
    """All that shapes the engine, comparable: functions by what they hold."""
    parts = {
        field.name: getattr(spec, field.name)
        for field in dataclasses.fields(spec)
        if field.name not in ("store", "source_files")
    }
    return _comparable(parts)


def _comparable(value: object) -> object:
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return (value.__qualname__, _comparable(cells))
    if isinstance(value, partial):
        return (value.func.__qualname__, _comparable(value.args), _comparable(value.keywords))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return (type(value).__name__, _comparable(fields))
    if isinstance(value, Struct):
        return (type(value).__name__, _comparable(structs.asdict(value)))
    if isinstance(value, Mapping):
        return {str(key): _comparable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_comparable(item) for item in value)
    return value
