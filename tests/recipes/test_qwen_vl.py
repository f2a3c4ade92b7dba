"""The traps of Qwen-VL-Chat: who recognises it, what is refused, how it stops, boxes."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from safetensors.torch import save_file

from conftest import DATA, IMAGES, golden_engine
from vlmforge import (
    Box,
    EngineConfig,
    GenerationConfig,
    Pipeline,
    Response,
    Session,
    pipeline,
)
from vlmforge.engine.manifest import load_manifest
from vlmforge.errors import CheckpointError, TokenizerError, UnsupportedModelError, VlmforgeError
from vlmforge.outputs import token_generator as generate_module
from vlmforge.vl import draw_boxes
from vlmforge_builder.build import BuildOptions, build_engine
from vlmforge_builder.checkpoint.config import ConfigReader, read_config
from vlmforge_builder.progress import Progress
from vlmforge_builder.recipe import ModelSpec, RecipeOptions, find_recipe, installed_recipes

NAME = "qwen_vl_chat"
CHECKPOINT = DATA / NAME / "checkpoint"


def no_hub(name: str) -> Path:
    raise CheckpointError(f"{name} could not be fetched.", found="no hub", expected="", fix="")


def load(checkpoint: Path, session_len: int | None = None) -> ModelSpec:
    config = read_config(checkpoint / "config.json")
    return find_recipe(config).load(checkpoint, config, RecipeOptions(session_len, None, no_hub))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The checkpoint again, to be changed, in a folder whose name says nothing."""
    folder = tmp_path / "models" / "my-llava-yi-finetune"
    shutil.copytree(CHECKPOINT, folder)
    return folder


def change(checkpoint: Path, values: Mapping[str, object], file: str = "config.json") -> None:
    path = checkpoint / file
    config = json.loads(path.read_text("utf-8"))
    if "visual" in values:
        values = {**values, "visual": {**config["visual"], **values["visual"]}}  # type: ignore[dict-item]
    path.write_text(json.dumps({**config, **values}), "utf-8")


# --- who recognises it -------------------------------------------------------------------------


def test_the_name_of_the_folder_says_nothing(copy: Path) -> None:
    spec = load(copy)
    assert spec.architecture == "QWenLMHeadModel"
    assert (spec.tokens_per_image, spec.session_len, spec.trained_len) == (256, 8192, 8192)
    assert spec.eos_ids == (512, 514, 513)
    assert (spec.positions.name, spec.positions.trained_length) == ("dynamic_ntk", 330)
    assert spec.positions.levels == 6  # 330, 660, ..., 10560
    assert load(copy, session_len=700).positions.levels == 3
    matching = [
        recipe.name
        for recipe in installed_recipes()
        if recipe.matches(read_config(copy / "config.json"))
    ]
    assert matching == ["qwen_vl"]


def test_the_text_model_of_the_same_architecture_is_another_family() -> None:
    config = ConfigReader({"architectures": ["QWenLMHeadModel"]}, Path("config.json"))
    assert not any(recipe.matches(config) for recipe in installed_recipes())
    with pytest.raises(UnsupportedModelError):
        find_recipe(config)


def test_a_checkpoint_saved_again(copy: Path) -> None:
    """As one file of safetensors in bfloat16."""
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(copy.glob("*.bin")):
        tensors |= torch.load(path, weights_only=True)
        path.unlink()
    (copy / "pytorch_model.bin.index.json").unlink()
    save_file({k: v.bfloat16() for k, v in tensors.items()}, copy / "model.safetensors")
    ours, theirs = load(copy), load(CHECKPOINT)
    assert set(ours.store.names()) == set(theirs.store.names())
    name = "transformer.visual.attn_pool.query"
    assert torch.equal(ours.store.read(name).float(), theirs.store.read(name).float())


def test_defaults_of_absent_keys(copy: Path) -> None:
    (copy / "generation_config.json").unlink()
    config = json.loads((copy / "config.json").read_text("utf-8"))
    for key in ("use_dynamic_ntk", "use_logn_attn", "no_bias", "tie_word_embeddings"):
        del config[key]
    (copy / "config.json").write_text(json.dumps(config), "utf-8")
    spec = load(copy)
    assert spec.positions.name == "dynamic_ntk"
    assert spec.prompt.history_window == load(CHECKPOINT).prompt.history_window


def test_a_window_of_its_own(copy: Path) -> None:
    change(copy, {"max_window_size": 100}, "generation_config.json")
    published = load(CHECKPOINT).prompt.history_window
    assert published is not None
    assert load(copy).prompt.history_window == published - 6044


REFUSED: Mapping[str, tuple[dict[str, object], type[VlmforgeError], str]] = {
    "biases": ({"no_bias": False}, UnsupportedModelError, "no_bias false"),
    "no scale": ({"scale_attn_weights": False}, UnsupportedModelError, "scale_attn_weights false"),
    "part of a head": ({"rotary_pct": 0.5}, UnsupportedModelError, "rotary_pct 0.5"),
    "no length": ({"seq_length": 1}, UnsupportedModelError, "seq_length 1"),
    "queries": ({"visual": {"n_queries": 64}}, UnsupportedModelError, "n_queries 64"),
    "image token": ({"visual": {"image_start_id": 725}}, TokenizerError, "'<img>' is 726"),
    "width": ({"visual": {"output_dim": 512}}, CheckpointError, "visual.output_dim 512"),
    "vocabulary": ({"vocab_size": 700}, CheckpointError, "the tokenizer's size 729"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(copy: Path, name: str) -> None:
    values, kind, found = REFUSED[name]
    change(copy, values)
    with pytest.raises(kind) as caught:
        load(copy)
    assert found in caught.value.found
    assert caught.value.expected
    assert caught.value.fix


def test_a_missing_vocabulary(copy: Path) -> None:
    (copy / "qwen.tiktoken").unlink()
    with pytest.raises(TokenizerError):
        load(copy)


def test_facts_of_the_engine(shared: Path) -> None:
    manifest = load_manifest(golden_engine(shared, NAME))
    assert manifest.image.name == "stretch"
    assert manifest.decode.eos_ids == (512, 514, 513)
    prompt = manifest.prompt
    assert (prompt.bos_id, prompt.box_format, prompt.template_name) == (
        None,
        "ref_box_1000",
        "qwen",
    )
    assert prompt.stop_words == ("<|im_end|>",)


# --- stops ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_what_ends_an_answer(pipe: Pipeline, stop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script(pipe, f"so it is{stop}and more", monkeypatch)
    response = pipe("hi")
    assert isinstance(response, Response)
    assert (response.text, response.finish_reason) == ("so it is", "stop")


def test_a_stop_that_the_model_chooses(copy: Path, tmp_path: Path) -> None:
    """The golden's second token changes places with the one that ends a turn.

    The remote code that `auto_map` of the published files names is there, and is not run.
    """
    for name in ("configuration_qwen", "modeling_qwen", "tokenization_qwen", "visual"):
        text = f"open({str(tmp_path / 'marker')!r}, 'a').write({name!r})\n"
        (copy / f"{name}.py").write_text(text, "utf-8")
    golden = [403, 76, 470]
    path = copy / "pytorch_model-00003-of-00003.bin"
    tensors = torch.load(path, weights_only=True)
    tensors["lm_head.weight"][[76, 514]] = tensors["lm_head.weight"][[514, 76]]
    torch.save(tensors, path)
    options = BuildOptions(str(copy), tmp_path / "engine", max_batch_size=1)  # traced already
    with Progress(text=io.StringIO()) as progress:
        build_engine(options, progress)
    prompt = "Write one line about cats."
    with pipeline(tmp_path / "engine", EngineConfig(threads=1, session_len=512)) as pipe:
        ended = pipe(prompt)
        config = GenerationConfig(max_new_tokens=2, ignore_eos=True)
        going_on = pipe(prompt, gen_config=config)
    assert isinstance(ended, Response)
    assert isinstance(going_on, Response)
    assert (ended.token_ids, ended.finish_reason) == (golden[:1], "stop")
    assert going_on.token_ids == [403, 514]
    assert not (tmp_path / "marker").exists()


# --- boxes ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe(shared: Path) -> Iterator[Pipeline]:
    with pipeline(golden_engine(shared, NAME), EngineConfig(threads=1)) as made:
        yield made


def script(pipe: Pipeline, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every answer is `text`, token by token."""
    ids = [*pipe._engine.tokenizer.encode(text), 514]
    given: dict[object, Iterator[int]] = {}

    def step(sampler: object, _: object) -> SimpleNamespace:
        tokens = given.setdefault(sampler, iter(ids))
        return SimpleNamespace(id=next(tokens), top_logprobs=None)

    monkeypatch.setattr(generate_module.Sampler, "step", step)


ANSWER = "See <ref>the cat</ref><box>(100,200),(300,400)</box> and <box>(1,2)</box>."
PHOTO, TALL = str(IMAGES / "photo_640x480.png"), str(IMAGES / "tall_300x900.png")


def test_boxes_of_an_answer(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pixels of the latest image; the text is as it was."""
    script(pipe, ANSWER, monkeypatch)
    response = pipe(("Find it.", PHOTO))
    assert isinstance(response, Response)
    assert response.text == ANSWER
    assert response.boxes == (Box(64, 96, 192, 192, "the cat", 0),)
    drawn = draw_boxes(PHOTO, response.boxes)
    assert drawn.size == (640, 480)
    both, none = pipe([("Find it.", [PHOTO, TALL]), "Find it."])  # type: ignore[misc]
    assert both.boxes == (Box(30, 180, 90, 360, "the cat", 1),)
    assert none.boxes == ()
    assert none.text == ANSWER


def test_boxes_of_an_image_that_is_turned(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    script(pipe, ANSWER, monkeypatch)
    image = PIL.Image.new("RGB", (200, 1000))
    image.getexif()[0x0112] = 6  # shown turned by a quarter: 1000 x 200
    response = pipe(("Find it.", image))
    assert isinstance(response, Response)
    assert response.boxes == (Box(100, 40, 300, 80, "the cat", 0),)
    assert draw_boxes(image, response.boxes).size == (1000, 200)


def test_boxes_in_a_stream_and_in_a_chat(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    script(pipe, ANSWER, monkeypatch)
    pieces = list(pipe.stream_infer(("Find it.", TALL)))
    assert [bool(piece.boxes) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    session = pipe.chat(("Find it.", TALL))
    assert isinstance(session, Session)
    session = pipe.chat("Again.", session)
    assert isinstance(session, Session)
    assert session.response is not None
    assert session.response.boxes == (Box(30, 180, 90, 360, "the cat", 0),)
    assert ANSWER in pipe._engine.render(session.turns).text
