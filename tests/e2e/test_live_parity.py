"""Models of today against transformers, live, on tiny checkpoints that are drawn by seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from golden_models import TOLERANCES
from live_parity import (
    CASES,
    FAMILIES,
    SMALL,
    TALL,
    WIDE,
    Original,
    check_answer,
    check_stages,
    checkpoint,
    engine,
    ours,
    picture,
)
from stand_in import at_once
from vlmforge import (
    ChatTemplateConfig,
    EngineConfig,
    GenerationConfig,
    Pipeline,
    VisionConfig,
    pipeline,
)
from vlmforge.api.load import serve
from vlmforge.backends.fake import cuda_on_cpu
from vlmforge.cli.inspect import describe
from vlmforge.errors import ContextLengthError, PromptError
from vlmforge.evaluation.verify import verify
from vlmforge.runner import stages
from vlmforge.vl.constants import IMAGE_TOKEN

# One shape of each family in `make test` beside the first.
NIGHTLY = {
    *(("internvl", "llama"), ("idefics3", "whole"), ("qwen3_vl", "untied")),
    *(("qwen2_vl", "nested"), ("qwen2_vl", "nested_plain")),
}
SHAPES = [
    pytest.param(family, shape, marks=[pytest.mark.nightly] * ((family, shape) in NIGHTLY))
    for family, module in FAMILIES.items()
    for shape in module.SHAPES
]
FIRST = [(family, next(iter(module.SHAPES))) for family, module in FAMILIES.items()]


@dataclass
class Opened:
    pipe: Pipeline
    original: Original


Open = Callable[..., Opened]


@pytest.fixture(scope="module")
def opened(shared: Path) -> Iterator[Open]:
    known: dict[tuple[str, ...], Opened] = {}
    with ExitStack() as stack:

        def open_one(family: str, shape: str, *options: str) -> Opened:
            key = (family, shape, *options)
            if key not in known:
                if "cuda" in options:
                    stack.enter_context(cuda_on_cpu())
                path = engine(shared, family, shape, *options)
                config = EngineConfig(max_batch_size=3)
                pipe = stack.enter_context(pipeline(path, config))
                beside = known.get((family, shape)) or Opened(
                    pipe, Original(checkpoint(shared, family, shape), family)
                )
                known[key] = Opened(pipe, beside.original)
            return known[key]

        yield open_one


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("family", "shape"), SHAPES)
def test_every_stage(opened: Open, family: str, shape: str, case: str) -> None:
    found = opened(family, shape)
    check_stages(found.pipe, found.original, CASES[case], TOLERANCES["float32"])
    check_answer(found.pipe, found.original, CASES[case])


@pytest.mark.parametrize(("family", "shape"), SHAPES)
def test_answers_are_not_one_token_repeated(opened: Open, family: str, shape: str) -> None:
    original = opened(family, shape).original
    answers = [original.answer(messages)[0] for messages in CASES.values()]
    assert len({token for answer in answers for token in answer}) > 3


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--dtype", "float16"), marks=pytest.mark.nightly),
        pytest.param(("--dtype", "bfloat16"), marks=pytest.mark.nightly),
        ("--target", "cuda", "--dtype", "float16"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize(("family", "shape"), FIRST)
def test_sixteen_bits(opened: Open, family: str, shape: str, options: tuple[str, ...]) -> None:
    found, limits = opened(family, shape, *options), TOLERANCES[options[-1]]
    for case in ("middle", "turns"):
        if "cuda" not in options:  # the chain's arrays are the runner's
            check_stages(found.pipe, found.original, CASES[case], limits)
        check_answer(found.pipe, found.original, CASES[case], limits.margin)


@pytest.mark.parametrize(("family", "shape"), FIRST)
def test_prompts_in_one_step_on_the_chain(
    opened: Open, family: str, shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several lengths, with pictures, and with places of tokens that the runtime gives."""
    held = opened(family, shape, "--target", "cuda", "--dtype", "float16").pipe._engine
    config = GenerationConfig(max_new_tokens=2, output_logits="generation")
    prompts = [ours(CASES[case]) for case in ("middle", "turns")]
    prompts.append("What is it?")
    together, sizes = stages.together, list[int]()

    def noted(parts: Sequence[Any], decode: Any) -> Any:
        sizes.append(len(parts))
        return together(parts, decode)

    with serve(held, EngineConfig(enable_prefix_caching=False), VisionConfig()) as pipe:
        alone = [pipe(prompt, gen_config=config) for prompt in prompts]
        monkeypatch.setattr(stages, "together", noted)
        found = at_once(pipe, prompts, config)
    assert sizes
    for one, other in zip(found, alone, strict=True):
        assert one.logits is not None and other.logits is not None
        gap = TOLERANCES["float16"].logits
        np.testing.assert_allclose(one.logits[0], other.logits[0], atol=gap)


@pytest.mark.parametrize("kind", ["int8", pytest.param("int4", marks=pytest.mark.nightly)])
@pytest.mark.parametrize(("family", "shape"), FIRST)
def test_quantised_weights_answer(opened: Open, family: str, shape: str, kind: str) -> None:
    found, exact = opened(family, shape, "--weights", kind), opened(family, shape)
    config = GenerationConfig(max_new_tokens=1, output_logits="all")
    near, wanted = (o.pipe(ours(CASES["middle"]), gen_config=config) for o in (found, exact))
    gap = np.abs(near.logits - wanted.logits).mean()
    assert 0 < gap < {"int8": 0.1, "int4": 1.5}[kind] * wanted.logits.std()


# --- whatever works for the older models ---------------------------------------------------------


@pytest.mark.parametrize(("family", "shape"), FIRST)
def test_batches_streams_and_chats_give_the_same(opened: Open, family: str, shape: str) -> None:
    pipe, original = opened(family, shape).pipe, opened(family, shape).original
    config = GenerationConfig(max_new_tokens=8)
    prompts: list[Any] = [ours(messages) for messages in CASES.values()]
    singles = [pipe(prompt, gen_config=config).token_ids for prompt in prompts]
    assert [found.token_ids for found in pipe(prompts, gen_config=config)] == singles
    pieces = [piece.token_ids for piece in pipe.stream_infer(prompts[0], gen_config=config)]
    assert [token for piece in pieces for token in piece] == singles[0]
    session = pipe.chat(("What is it?", SMALL), gen_config=config)
    answer = session.response.text
    session = pipe.chat(("And this one? ", [WIDE]), session=session, gen_config=config)
    again = [
        {"role": "user", "content": [SMALL, "What is it?"]},
        {"role": "assistant", "content": [answer]},
        {"role": "user", "content": [WIDE, "And this one? "]},
    ]
    inputs = original.inputs(again)
    assert session.response.token_ids == original.greedy(inputs, 8)[0]
    assert session.response.cached_tokens > 0
    repeated = pipe(ours(CASES["several"]), gen_config=config)
    assert repeated.timings.cached_images == 3


def images_of_any_mode() -> list[Any]:
    """One with transparent pixels, one with a transparent entry in its palette, and one grey."""
    colours, alpha = picture(40, 30), picture(40, 30, 1).convert("L")
    palette = colours.quantize(16)
    palette.info["transparency"] = 3
    return [PIL.Image.merge("RGBA", (*colours.split(), alpha)), palette, alpha]


@pytest.mark.parametrize(("family", "shape"), FIRST)
def test_images_of_any_mode(opened: Open, family: str, shape: str) -> None:
    found = opened(family, shape)
    messages = [{"role": "user", "content": [*images_of_any_mode(), "Compare."]}]
    check_stages(found.pipe, found.original, messages, TOLERANCES["float32"])
    check_answer(found.pipe, found.original, messages)


@pytest.mark.parametrize(("family", "shape"), FIRST)
def test_images_may_be_placed_by_hand(opened: Open, family: str, shape: str) -> None:
    pipe = opened(family, shape).pipe
    placed = pipe.render((f"Look: {IMAGE_TOKEN} What is it?", TALL))
    assert placed.token_ids == pipe.render(ours(CASES["middle"])).token_ids
    own = pipe._engine.manifest.prompt.image_placeholder
    assert pipe.render((f"Look: {own} What is it?", TALL)).token_ids == placed.token_ids
    with pytest.raises(PromptError, match="one image token for each image"):
        pipe.render((f"{IMAGE_TOKEN}{IMAGE_TOKEN}", TALL))
    with pytest.raises(ContextLengthError):
        pipe(("a b " * 4000, WIDE))
    with pytest.raises(PromptError, match="models see images only"):
        pipe.render([{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}])


@pytest.mark.parametrize(("family", "shape"), FIRST)
def test_templates_of_parts(opened: Open, shared: Path, family: str, shape: str) -> None:
    names = {"internvl": "chatml", "idefics3": "smolvlm", "qwen2_vl": "qwen", "qwen3_vl": "qwen"}
    name = names[family]
    path = engine(shared, family, shape)
    with pipeline(path, chat_template_config=ChatTemplateConfig(name)) as pipe:
        prompt = ours(CASES["one"])
        assert pipe.render(prompt).text.replace(": ", ":") == opened(family, shape).pipe.render(
            prompt
        ).text.replace(": ", ":")


@pytest.mark.parametrize(("family", "shape"), FIRST)
def test_verify_and_inspect(opened: Open, shared: Path, family: str, shape: str) -> None:
    opened(family, shape)
    path = engine(shared, family, shape)
    results = list(verify(path))
    assert results
    assert all(result.passed for result in results), results
    assert opened(family, shape).pipe._engine.manifest.image.name in describe(path)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_limits_of_pixels_set_the_tokens(opened: Open, shared: Path, family: str) -> None:
    shape = next(iter(FAMILIES[family].SHAPES))
    usual = opened(family, shape).pipe.render(ours(CASES["one"]))
    unit = opened(family, shape).pipe._engine.manifest.image.view_size[0]
    vision = VisionConfig(min_pixels=1, max_pixels=2 * unit * unit)
    with pipeline(engine(shared, family, shape), vision_config=vision) as pipe:
        fewer = pipe.render(ours(CASES["one"]))
        assert fewer.image_tokens == 2 < usual.image_tokens
        assert fewer.text == usual.text
        assert pipe(ours(CASES["one"]), gen_config=GenerationConfig(max_new_tokens=2)).token_ids
        narrow, fine = pipe([("What is it?", picture(1, 201)), ("And this?", SMALL)])
        assert narrow.finish_reason == "error"
        assert "too narrow" in str(narrow.error_message)
        assert fine.token_ids
