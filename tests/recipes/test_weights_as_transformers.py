"""The tensors that are chosen, against those that `from_pretrained` of transformers chooses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from conftest import DATA, HF
from vlmforge.errors import CheckpointError, TensorError
from vlmforge_builder.recipe import ModelSpec, RecipeOptions
from vlmforge_builder.recognise import recognise

HEAD, EMBEDDING = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
NEXT = DATA / "llava_next_mistral_hf"


def no_hub(name: str) -> Path:
    raise CheckpointError(f"{name} could not be fetched.")


def load(folder: Path) -> tuple[ModelSpec, list[str]]:
    notes: list[str] = []
    config, recipe = recognise(folder)
    return recipe.load(folder, config, RecipeOptions(None, None, no_hub, notes.append)), notes


def head_of(spec: ModelSpec) -> Tensor:
    decoder = next(part for part in spec.parts if part.name == "decoder")
    shape = (spec.hidden_size, spec.vocab_size)
    return decoder.weights["lm_head.weight"].read(spec.store, shape).T.float()


def theirs(folder: Path) -> Tensor:
    names = {HF.name: LlavaForConditionalGeneration, NEXT.name: LlavaNextForConditionalGeneration}
    kind = json.loads((folder / "config.json").read_text("utf-8"))["model_type"]
    model = names[NEXT.name if kind == "llava_next" else HF.name].from_pretrained(
        folder, dtype=torch.float32
    )
    found = model.get_output_embeddings().weight.detach()
    assert isinstance(found, Tensor)
    return found


def copy_of(source: Path, folder: Path, *, top: bool, text: bool) -> tuple[Path, dict[str, Tensor]]:
    """A copy with these flags, and all its tensors, which it holds in shards."""
    shutil.copytree(source / "checkpoint", folder)
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["tie_word_embeddings"] = top
    config["text_config"]["tie_word_embeddings"] = text
    path.write_text(json.dumps(config), "utf-8")
    tensors: dict[str, Tensor] = {}
    for shard in folder.glob("model-*.safetensors"):
        tensors |= load_file(shard)
    return folder, tensors


def rewrite(folder: Path, tensors: dict[str, Tensor]) -> None:
    """The tensors as one file, without the shards."""
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


FLAGS = [(False, False), (True, False), (False, True), (True, True)]


@pytest.mark.parametrize("source", [HF, NEXT], ids=lambda path: path.name)
@pytest.mark.parametrize(("top", "text"), FLAGS)
def test_a_stored_head_is_used_whatever_the_flags_say(
    tmp_path: Path, source: Path, top: bool, text: bool
) -> None:
    folder, tensors = copy_of(source, tmp_path / "it", top=top, text=text)
    spec, notes = load(folder)
    assert torch.equal(head_of(spec), tensors[HEAD].float())
    assert torch.equal(head_of(spec), theirs(folder))
    assert [note.split(",")[0] for note in notes] == (
        ["warning: tie_word_embeddings is true"] if top or text else []
    )
    if notes:
        assert HEAD in notes[0]
        assert notes[0].endswith("the stored one is used")


@pytest.mark.parametrize(("top", "text"), FLAGS)
def test_a_head_that_is_the_embedding_needs_no_warning(
    tmp_path: Path, top: bool, text: bool
) -> None:
    folder, tensors = copy_of(HF, tmp_path / "it", top=top, text=text)
    rewrite(folder, tensors | {HEAD: tensors[EMBEDDING].float()})  # in another dtype
    spec, notes = load(folder)
    assert notes == []
    assert torch.equal(head_of(spec), tensors[EMBEDDING].float())


@pytest.mark.parametrize(("top", "text"), FLAGS)
def test_no_head_is_stored(tmp_path: Path, top: bool, text: bool) -> None:
    """Untied, transformers would make one of random numbers; here that is refused."""
    folder, tensors = copy_of(HF, tmp_path / "it", top=top, text=text)
    del tensors[HEAD]
    rewrite(folder, tensors)
    if not (top or text):
        with pytest.raises(TensorError, match="no output projection") as caught:
            load(folder)
        assert "tie_word_embeddings" in caught.value.fix
        return
    spec, notes = load(folder)
    assert notes == []
    assert torch.equal(head_of(spec), theirs(folder))
    assert torch.equal(head_of(spec), tensors[EMBEDDING].float())


NEWER = {HEAD: "lm_head.weight", EMBEDDING: "model.language_model.embed_tokens.weight"}


@pytest.mark.parametrize("name", NEWER)
def test_one_tensor_under_two_of_its_names(tmp_path: Path, name: str) -> None:
    """A folder of a mixture of versions: the same value is one tensor, another is refused."""
    folder, tensors = copy_of(HF, tmp_path / "it", top=False, text=False)
    rewrite(folder, tensors | {NEWER[name]: tensors[name].clone()})
    assert torch.equal(head_of(load(folder)[0]), tensors[HEAD].float())
    rewrite(folder, tensors | {NEWER[name]: tensors[name] * 2})
    with pytest.raises(TensorError, match="under two of its names") as caught:
        load(folder)
    assert caught.value.found == f"{name} and {NEWER[name]}"


@pytest.mark.parametrize("name", ["yi_vl", "qwen_vl_chat", "llava_v1_5_liuhaotian"])
def test_the_other_families_use_a_stored_head_too(tmp_path: Path, name: str) -> None:
    shutil.copytree(DATA / name, tmp_path / name)
    path = tmp_path / name / "checkpoint" / "config.json"
    before, _ = load(path.parent)
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(config | {"tie_word_embeddings": True}), "utf-8")
    after, notes = load(path.parent)
    assert torch.equal(head_of(before), head_of(after))
    assert any("tie_word_embeddings is true, but lm_head.weight is stored" in n for n in notes)


# --- files that hold weights more than once ----------------------------------------------------


def one_file(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def one_bin(folder: Path, tensors: dict[str, Tensor]) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")


def bin_shards(folder: Path, tensors: dict[str, Tensor]) -> None:
    name = "pytorch_model-00001-of-00001.bin"
    torch.save(tensors, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(tensors, name)}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index), "utf-8")


def consolidated(folder: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, folder / "consolidated.safetensors", {"format": "pt"})


Writer = Callable[[Path, dict[str, Tensor]], None]


@pytest.mark.parametrize(
    ("writers", "note"),
    [
        ((one_file,), "model.safetensors is used"),
        ((one_bin,), "model.safetensors.index.json is used"),
        ((bin_shards,), "model.safetensors.index.json is used"),
        ((one_file, one_bin), "model.safetensors is used"),
        ((consolidated,), None),
    ],
    ids=lambda value: " ".join(w.__name__ for w in value) if isinstance(value, tuple) else None,
)
def test_the_file_that_is_read(tmp_path: Path, writers: tuple[Writer, ...], note: str) -> None:
    """New weights were saved into a folder with an old index and its shards."""
    folder, tensors = copy_of(HF, tmp_path / "it", top=False, text=False)
    for number, writer in enumerate(writers, 1):
        writer(folder, tensors | {HEAD: tensors[HEAD] * (1 + number)})
    spec, notes = load(folder)
    assert torch.equal(head_of(spec), theirs(folder))
    assert [note in found for found in notes] == ([True] if note else [])


def test_pickles_are_read_in_the_order_of_transformers(tmp_path: Path) -> None:
    folder, tensors = copy_of(HF, tmp_path / "it", top=False, text=False)
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    bin_shards(folder, tensors)
    one_bin(folder, tensors | {HEAD: tensors[HEAD] * 2})
    spec, notes = load(folder)
    assert torch.equal(head_of(spec), theirs(folder))
    assert "pytorch_model.bin is used" in notes[0]
