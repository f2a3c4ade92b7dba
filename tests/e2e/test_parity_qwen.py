"""Qwen-VL-Chat against an oracle in plain torch, on drawn checkpoints and on the golden one.

Where the goldens have no case: several images, images in the middle, long text at several levels of
the dynamic NTK, decoding that crosses a threshold, batches of sequences of different levels.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from conftest import DATA, golden_engine
from qwen_original import Original, draw_checkpoint
from vlmforge import EngineConfig, GenerationConfig, Pipeline, Response, pipeline
from vlmforge.vl.constants import IMAGE_TOKEN
from vlmforge_builder.build import BuildOptions, build_engine
from vlmforge_builder.progress import Progress

GOLDEN = DATA / "qwen_vl_chat" / "checkpoint"
SYSTEM = "You are a helpful assistant."
T = IMAGE_TOKEN
_SMALL = {"width": 48, "heads": 3, "image_size": 112, "layers": 1, "output_dim": 128}
# Name -> what differs from the golden checkpoint: geometry, tower, and what is switched off.
VARIANTS: dict[str, dict[str, Any]] = {
    "downsized grid": {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "kv_channels": 32,
        "seq_length": 300,
        "visual": _SMALL,
    },
    "grid as it is, no ntk": {
        "hidden_size": 128,
        "num_attention_heads": 2,
        "kv_channels": 64,
        "seq_length": 70,
        "use_dynamic_ntk": False,
        "num_hidden_layers": 1,
        "intermediate_size": 96,
        "layer_norm_epsilon": 1e-5,
        "visual": {**_SMALL, "image_size": 224, "mlp_ratio": 2.5},
    },
    "no logn, other base": {
        "hidden_size": 256,
        "num_attention_heads": 2,
        "kv_channels": 128,
        "seq_length": 90,
        "use_logn_attn": False,
        "rotary_emb_base": 5000,
        "num_hidden_layers": 1,
        "visual": {**_SMALL, "output_dim": 256, "patch_size": 7, "image_size": 126},
    },
}


@dataclass(frozen=True)
class Pair:
    pipe: Pipeline
    original: Original

    def prompt(self, query: str, history: list[tuple[str, str]], window: int = 6144) -> list[int]:
        return self.original.tokens.context(query, history, SYSTEM, window)


def opened(engine: Path, checkpoint: Path, **fields: Any) -> Pair:
    return Pair(pipeline(engine, EngineConfig(threads=1, **fields)), Original(checkpoint))


@pytest.fixture(scope="module", params=["golden", *VARIANTS])
def pair(
    request: pytest.FixtureRequest, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    if request.param == "golden":
        checkpoint, engine = GOLDEN, golden_engine(shared, "qwen_vl_chat")
    else:
        folder = tmp_path_factory.mktemp("drawn")
        checkpoint = draw_checkpoint(folder / "checkpoint", GOLDEN, 7, **VARIANTS[request.param])
        engine = folder / "engine"
        with Progress(text=io.StringIO()) as progress:
            options = BuildOptions(str(checkpoint), engine, max_batch_size=4, skip_goldens=True)
            build_engine(options, progress)
    # Prompts are run in pieces that end anywhere.
    made = opened(engine, checkpoint, max_batch_size=4, max_prefill_token_num=129)
    with made.pipe:
        yield made


def drawn(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng((width, height))
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


WIDE, TALL, TINY, GREY = drawn(301, 37), drawn(13, 190), drawn(1, 1), drawn(97, 61, "L")
CLEAR = drawn(50, 40)
CLEAR.putalpha(drawn(50, 40, "L"))  # `convert("RGB")` takes no account of it
LONG = "A word, 图 and 12 more. " * 24


def user(text: str, *images: Image.Image) -> dict[str, Any]:
    pictures = [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": [{"type": "text", "text": text}, *pictures]}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


I = "<img>image</img>"  # noqa: E741 - what stands in a text for an image without a name
# Messages, and the same as a query, its history and all images.
CASES: dict[str, tuple[list[dict[str, Any]], str, list[tuple[str, str]], list[Image.Image]]] = {
    "text": ([user("hi")], "hi", [], []),
    "long text": ([user(LONG)], LONG, [], []),
    "two images": (
        [user("Compare them.", WIDE, TALL)],
        f"Picture 1: {I}\nPicture 2: {I}\nCompare them.",
        [],
        [WIDE, TALL],
    ),
    "in the middle": (
        [user(f"Look at {T} and 图 more.", TINY)],
        f"Look at {I} and 图 more.",
        [],
        [TINY],
    ),
    "in two turns": (
        [user("q1", GREY), said("a <box>(1,2),(3,4)</box>"), user(f"{T}{T}?", TALL, GREY)],
        f"{I}{I}?",
        [(f"Picture 1: {I}\nq1", "a <box>(1,2),(3,4)</box>")],
        [GREY, TALL, GREY],
    ),
    "specials typed": (
        [user("<|im_end|>\n<|im_start|>x<ref>y</ref><imgpad></img><|extra_3|>", TINY)],
        f"Picture 1: {I}\n<|im_end|>\n<|im_start|>x<ref>y</ref><imgpad></img><|extra_3|>",
        [],
        [TINY],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_ids_and_logits_of_the_whole_prompt(pair: Pair, case: str) -> None:
    messages, query, history, images = CASES[case]
    expected = pair.prompt(query, history)
    assert list(pair.pipe.render(messages).token_ids) == expected
    response = pair.pipe(
        messages, gen_config=GenerationConfig(max_new_tokens=1, output_logits="all")
    )
    assert isinstance(response, Response)
    assert response.logits is not None
    logits = pair.original.logits(expected, images, len(expected))
    assert logits.std() > 1  # a flat output would prove nothing
    np.testing.assert_allclose(response.logits, logits, atol=5e-3, rtol=0)


def test_features(pair: Pair) -> None:
    engine = pair.pipe._engine
    for image in (WIDE, TALL, TINY, GREY, CLEAR):
        prepared = engine.prepare_image(image)
        gap = np.abs(prepared.pixel_values - pair.original.pixels(image).numpy())
        assert gap.max() <= 1e-5
        features = engine.vision.encode(prepared.pixel_values).reshape(256, -1)
        np.testing.assert_allclose(features, pair.original.features(image), atol=2e-3, rtol=0)


COUNT = 14
FREE = GenerationConfig(max_new_tokens=COUNT, ignore_eos=True, output_logits="generation")


def near(pair: Pair, below: int) -> str:
    """A text whose prompt is `below` tokens short of the trained length."""
    trained, text = pair.original.config["seq_length"], "hi "
    while len(pair.prompt(text, [])) < trained - below:
        text += "1"
    assert len(pair.prompt(text, [])) == trained - below
    return text


@pytest.mark.parametrize("below", [-1, 0, 1, 9])
def test_decoding_across_the_threshold(pair: Pair, below: int) -> None:
    """The level is the prompt's, whatever comes after; the scale of queries is by position."""
    text = near(pair, below)
    prompt = pair.prompt(text, [])
    expected = pair.original.greedy(prompt, [], COUNT)
    response = pair.pipe(text, gen_config=FREE)
    assert isinstance(response, Response)
    assert response.token_ids == expected
    assert response.logits is not None
    ids = [*prompt, *expected[:-1]]
    logits = pair.original.logits(ids, [], len(prompt))[len(prompt) - 1 :]
    np.testing.assert_allclose(response.logits, logits, atol=5e-3, rtol=0)


def test_a_batch_of_different_levels_equals_single_calls(pair: Pair) -> None:
    """In one decode step, and with prefixes in the cache that only look as if they fitted."""
    texts = ["hi", near(pair, 3), near(pair, -1), LONG, LONG * 2, near(pair, 0) + " and more"]
    prompts = [pair.prompt(text, []) for text in texts]
    expected = [pair.original.greedy(prompt, [], COUNT) for prompt in prompts]
    levels = {pair.original.alpha(len(prompt)) for prompt in prompts}
    assert len(levels) >= (3 if pair.original.config["use_dynamic_ntk"] else 1)
    for order in (range(6), (5, 3, 1, 0, 2, 4), (4, 4, 2, 2, 1, 1)):
        answers = pair.pipe([texts[i] for i in order], gen_config=FREE)
        assert isinstance(answers, list)
        assert [answer.token_ids for answer in answers] == [expected[i] for i in order]


def test_a_prefix_is_reused_within_its_level_only(pair: Pair) -> None:
    short, same = near(pair, 30), near(pair, 25)
    longer = near(pair, 30) + " 1 and" * 12
    one = GenerationConfig(max_new_tokens=1)
    # Of their own: prompts of other tests begin alike, some of them at the longer level.
    first, again, beyond = (
        pair.pipe(text, gen_config=one, salt="levels") for text in (short, same, longer)
    )
    assert isinstance(first, Response) and isinstance(again, Response)
    assert isinstance(beyond, Response)
    assert first.cached_tokens == 0
    assert again.cached_tokens > 20
    lengths = [len(pair.prompt(text, [])) for text in (short, longer)]
    if pair.original.alpha(lengths[0]) == pair.original.alpha(lengths[1]):
        assert beyond.cached_tokens > 20
    else:
        assert beyond.cached_tokens == 0
    for text, answer in ((same, again), (longer, beyond)):
        assert answer.token_ids == pair.original.greedy(pair.prompt(text, []), [], 1)
