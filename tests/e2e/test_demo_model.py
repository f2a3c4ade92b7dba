"""The trained demo model, through its engine: accuracy, parity with torch, and planted faults."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers.models.clip import CLIPImageProcessorPil

from conftest import build_once
from vlmforge import GenerationConfig, Pipeline, pipeline
from vlmforge.cli import main
from vlmforge.engine.manifest import manifest_digest
from vlmforge.evaluation.cases import Case, held_out_cases
from vlmforge.evaluation.evaluate import Report, evaluate
from vlmforge.evaluation.verify import verify
from vlmforge.inputs.render import RenderedPrompt
from vlmforge.runner.stages import DecoderInput, Engine
from vlmforge.vl.preprocess import preprocess
from vlmforge_recipes.llava.demo import CHECKPOINT
from vlmforge_recipes.llava.demo.spec import IMAGE_POLICY, SPEC
from vlmforge_recipes.llava.demo.text import conversation_ids

MINIMUMS = {
    "color": 95,
    "shape": 95,
    "count": 90,
    "place": 90,
    "compare": 85,
    "second_turn": 85,
    "itself": 100,
    "refusal": 100,
    "no_picture": 100,
    "all": 94,
}
GATE = [part for item in MINIMUMS.items() for part in ("--minimum", f"{item[0]}={item[1]}")]
LIMIT_BYTES = 4_000_000


@pytest.fixture(scope="module")
def engine(shared: Path) -> Path:
    return build_once(shared / "demo.engine", CHECKPOINT)


@pytest.fixture(scope="module")
def pipe(engine: Path) -> Iterator[Pipeline]:
    with pipeline(str(engine)) as opened:
        yield opened


def quiet(done: int, total: int) -> None:
    assert done <= total


def test_the_checkpoint_is_small() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.rglob("*")) <= LIMIT_BYTES


def often(few: int, many: int) -> pytest.MarkDecorator:
    """`count` cases: a few each time, many at night. Cases of all kinds come in turn."""
    return pytest.mark.parametrize("count", [few, pytest.param(many, marks=pytest.mark.nightly)])


@often(195, 1300)
def test_the_engine_passes_the_gate(
    engine: Path, capsys: pytest.CaptureFixture[str], count: int
) -> None:
    status = main(["eval", str(engine), "--limit", str(count), *GATE])
    printed = capsys.readouterr()
    assert status == 0, printed.out + printed.err
    assert "95 % interval" in printed.out
    assert "tokens/s" in printed.out


@often(65, 390)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_engines_of_16_bits_pass_it_too(dtype: str, shared: Path, count: int) -> None:
    built = build_once(shared / f"demo.{dtype}.engine", CHECKPOINT, "--dtype", dtype)
    assert main(["eval", str(built), "--limit", str(count), "--minimum", "all=93"]) == 0


def test_an_unreached_minimum_fails_and_a_wrong_one_is_refused(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheet = tmp_path / "sheet.html"
    few = ["eval", str(engine), "--limit", "2", "--sheet", str(sheet)]
    assert main([*few, "--minimum", "compare=1"]) == 1
    assert "FAIL compare: was not asked; raise --limit" in capsys.readouterr().err
    assert "data:image/png" in sheet.read_text("utf-8")
    assert main([*few, "--minimum", "colour=95"]) == 1
    message = capsys.readouterr().err
    assert "found:    --minimum colour=95" in message
    assert "--minimum color=95" in message
    assert main(["eval", str(engine), "--limit", "0"]) == 1
    assert "expected: a positive number" in capsys.readouterr().err


def test_training_saw_prompts_exactly_as_the_engine_makes_them(pipe: Pipeline) -> None:
    rows = SPEC.vision.positions - 1
    for case in held_out_cases(39):
        messages = _messages(case)
        ids, image, labels = conversation_ids(
            pipe._engine.tokenizer, case.turns, pictures=len(case.pictures), rows=rows
        )
        rendered = pipe.render(messages)
        length = len(rendered.token_ids)
        places = {i for s in rendered.image_spans for i in range(s.start, s.start + s.length)}
        assert {i for i, row in enumerate(image) if row >= 0} == places
        text = [i for i in range(length) if i not in places]
        assert [ids[i] for i in text] == [rendered.token_ids[i] for i in text]
        # The first label of the last answer is what comes after the whole prompt.
        assert labels[length - 1] == ids[length]
        assert labels[length - 2] == -100
        assert labels[len(ids) - 2] == 2


def test_training_saw_pixels_exactly_as_the_engine_makes_them(pipe: Pipeline) -> None:
    assert pipe._engine.manifest.image == IMAGE_POLICY


@often(26, 130)
def test_a_batch_gives_what_single_calls_give(pipe: Pipeline, count: int) -> None:
    """Sequences of different lengths end at different steps and move between slots."""
    prompts = [_messages(case) for case in held_out_cases(count, seed=1)]
    config = GenerationConfig(max_new_tokens=96)
    single = [pipe(prompt, gen_config=config).token_ids for prompt in prompts]
    for size in (2, 3, 8, count):
        for start in range(0, len(prompts), size):
            replies = pipe(prompts[start : start + size], gen_config=config)
            assert [reply.token_ids for reply in replies] == single[start : start + size], size


# --- parity with torch -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Torch:
    """The checkpoint in transformers' own classes, preprocessed as the original code does."""

    tower: CLIPVisionModel
    projector: torch.nn.Sequential
    decoder: LlamaForCausalLM
    processor: CLIPImageProcessorPil

    def reply(self, rendered: RenderedPrompt, pictures: tuple[Image.Image, ...]) -> list[int]:
        ids = torch.tensor([[i if 0 <= i < SPEC.text.vocab else 0 for i in rendered.token_ids]])
        embeds = self.decoder.model.embed_tokens(ids)
        for span, picture in zip(rendered.image_spans, pictures, strict=True):
            pixels = self.processor(_expand2square(picture), return_tensors="pt")["pixel_values"]
            states = self.tower(pixels, output_hidden_states=True).hidden_states
            embeds[0, span.start : span.start + span.length] = self.projector(states[-2][0, 1:])
        out = self.decoder.generate(
            inputs_embeds=embeds,
            attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long),
            do_sample=False,
            max_new_tokens=96,
            pad_token_id=0,
        )
        return [token for token in out[0].tolist() if token != 2]


def _expand2square(picture: Image.Image) -> Image.Image:
    side = max(picture.size)
    square = Image.new("RGB", (side, side), (122, 116, 104))
    square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square


@pytest.fixture(scope="module")
def in_torch() -> Torch:
    config = json.loads((CHECKPOINT / "config.json").read_text())
    folder = CHECKPOINT / config["mm_vision_tower"]
    vision = json.loads((folder / "config.json").read_text())
    vision.pop("architectures")
    tower = CLIPVisionModel(CLIPVisionConfig(**vision)).eval()
    names = set(tower.state_dict())
    stored = load_file(folder / "model.safetensors")
    prefixed = any(name.startswith("vision_model.") for name in names)
    tower.load_state_dict(
        {(k if prefixed else k.removeprefix("vision_model.")): v.float() for k, v in stored.items()}
    )
    weights = {k: v.float() for k, v in load_file(CHECKPOINT / "model.safetensors").items()}
    width = config["hidden_size"]
    projector = torch.nn.Sequential(
        torch.nn.Linear(vision["hidden_size"], width),
        torch.nn.GELU(),
        torch.nn.Linear(width, width),
    )
    own = "model.mm_projector."
    projector.load_state_dict(
        {k.removeprefix(own): v for k, v in weights.items() if k.startswith(own)}
    )
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    fields += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
    fields += ("rms_norm_eps", "tie_word_embeddings")
    decoder = LlamaForCausalLM(LlamaConfig(**{name: config[name] for name in fields})).eval()
    language = {k: v for k, v in weights.items() if not k.startswith(own)}
    missing, unexpected = decoder.load_state_dict(language, strict=False)
    assert not unexpected
    assert missing == ["lm_head.weight"]  # tied
    size = {"shortest_edge": vision["image_size"]}
    crop = {"height": vision["image_size"], "width": vision["image_size"]}
    return Torch(tower, projector, decoder, CLIPImageProcessorPil(size=size, crop_size=crop))


@often(39, 200)
def test_every_greedy_token_is_that_of_torch(pipe: Pipeline, in_torch: Torch, count: int) -> None:
    cases = list(held_out_cases(count, seed=1))
    prompts = [_messages(case) for case in cases]
    replies = pipe(prompts, gen_config=GenerationConfig(max_new_tokens=96))
    with torch.inference_mode():
        for case, prompt, reply in zip(cases, prompts, replies, strict=True):
            expected = in_torch.reply(pipe.render(prompt), case.pictures)
            assert [token for token in reply.token_ids if token != 2] == expected, case.turns


def _messages(case: Case) -> list[dict[str, object]]:
    """The conversation up to its last question, with the true answers before it."""
    messages: list[dict[str, object]] = []
    for index, turn in enumerate(case.turns):
        pictures = case.pictures if index == 0 else ()
        content: list[dict[str, object]] = [
            {"type": "image_data", "image_data": {"data": picture}} for picture in pictures
        ]
        messages.append(
            {"role": "user", "content": [*content, {"type": "text", "text": turn.question}]}
        )
        if index + 1 < len(case.turns):
            messages.append({"role": "assistant", "content": turn.answer})
    return messages


# --- planted faults ----------------------------------------------------------------------------


def _altered(engine: Path, folder: Path, change: Callable[[dict[str, object]], None]) -> Path:
    """A copy of the engine whose image policy is changed."""
    shutil.copytree(engine, folder)
    manifest = json.loads((folder / "engine.json").read_text("utf-8"))
    change(manifest["image"])
    manifest["digest"] = manifest_digest(manifest)
    (folder / "engine.json").write_text(json.dumps(manifest), "utf-8")
    return folder


def put(table: dict[str, object], place: str, value: object) -> None:
    *above, last = place.split(".")
    for key in above:
        inner = table[key]
        assert isinstance(inner, dict)
        table = inner
    table[last] = value


def _first_difference(engine: Path) -> str | None:
    return next((result.stage for result in verify(engine) if not result.passed), None)


def test_the_sound_engine_verifies(engine: Path) -> None:
    assert _first_difference(engine) is None


@pytest.mark.parametrize(
    ("fault", "key", "value"),
    [
        ("bilinear", "format.resample", "bilinear"),
        ("a wrong mean", "format.mean", [0.5, 0.5, 0.5]),
        ("a wrong deviation", "format.std", [0.5, 0.5, 0.5]),
        ("another fill", "pad_fill", [0, 0, 0]),
    ],
)
def test_verify_catches_a_wrong_image_policy(
    fault: str, key: str, value: object, engine: Path, tmp_path: Path
) -> None:
    altered = _altered(engine, tmp_path / "engine", lambda image: put(image, key, value))
    assert _first_difference(altered) == "pixels", fault


def test_verify_catches_swapped_colour_channels(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(image: Image.Image, policy: object) -> np.ndarray:
        return preprocess(image, policy)[:, ::-1]  # type: ignore[arg-type]

    monkeypatch.setattr("vlmforge.runner.stages.preprocess", swapped)
    assert _first_difference(engine) == "pixels"


def _shifted(by: int) -> Callable[..., DecoderInput]:
    original = Engine.decoder_input

    def decoder_input(
        self: Engine, rendered: RenderedPrompt, features: list[object]
    ) -> DecoderInput:
        spans = tuple(dataclasses.replace(s, start=s.start + by) for s in rendered.image_spans)
        moved = dataclasses.replace(rendered, image_spans=spans)
        return original(self, moved, features)  # type: ignore[arg-type]

    return decoder_input


@pytest.mark.parametrize("by", [-1, 1])
def test_verify_catches_an_image_one_position_off(
    by: int, engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "decoder_input", _shifted(by))
    assert _first_difference(engine) == "logits"


def _accuracy(engine: Path, count: int) -> Report:
    with pipeline(str(engine)) as opened:
        return evaluate(opened, list(held_out_cases(count, seed=5)), quiet)


def _rebuilt(shared: Path, name: str, change: Callable[[Path], None]) -> Path:
    """An engine of a wrong checkpoint: its goldens are wrong with it, so only eval can tell."""
    checkpoint = shared / f"{name}.checkpoint"
    shutil.copytree(CHECKPOINT, checkpoint)
    change(checkpoint)
    return build_once(shared / f"{name}.engine", checkpoint)


@pytest.mark.parametrize("layer", [-1, pytest.param(-3, marks=pytest.mark.nightly)])
def test_eval_catches_the_wrong_vision_layer(layer: int, tmp_path: Path) -> None:
    def change(checkpoint: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        config["mm_vision_select_layer"] = layer
        (checkpoint / "config.json").write_text(json.dumps(config))

    built = _rebuilt(tmp_path, "layer", change)
    assert _first_difference(built) is None
    assert _accuracy(built, 65).overall.accuracy < 0.8  # the gate asks for 0.94


def test_eval_catches_channels_that_the_build_swapped(tmp_path: Path) -> None:
    def change(checkpoint: Path) -> None:
        from safetensors.torch import save_file

        file = next(checkpoint.glob("*/model.safetensors"))
        weights = load_file(file)
        name = "vision_model.embeddings.patch_embedding.weight"
        weights[name] = weights[name].flip(1).contiguous()
        save_file(weights, file)

    built = _rebuilt(tmp_path, "channels", change)
    scores = {score.kind: score.accuracy for score in _accuracy(built, 130).scores}
    assert scores["color"] < 0.7


def test_eval_catches_an_image_one_position_off(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = _accuracy(engine, 65).overall.accuracy
    monkeypatch.setattr(Engine, "decoder_input", _shifted(1))
    assert _accuracy(engine, 65).overall.accuracy < sound
