"""Images of any size: limits of pixels that come with one, sessions, and what users do to them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conftest import build_once
from golden_models import TOLERANCES
from live_parity import (
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
from plan_engines import keep_graph
from vlmforge import EngineConfig, GenerationConfig, Pipeline, Session, VisionConfig, pipeline
from vlmforge.backends.fake_plans import plans_on_cpu
from vlmforge.errors import ConfigError, PromptError
from vlmforge_builder import plan_files

SHORT = GenerationConfig(max_new_tokens=4)


@dataclass
class Opened:
    path: Path
    pipe: Pipeline
    original: Original


@pytest.fixture(scope="module", params=[("qwen2_vl", "windowed"), ("qwen3_vl", "first")])
def opened(shared: Path, request: pytest.FixtureRequest) -> Iterator[Opened]:
    family, shape = request.param
    path = engine(shared, family, shape)
    with pipeline(path, EngineConfig(max_batch_size=3)) as pipe:
        yield Opened(path, pipe, Original(checkpoint(shared, family, shape), family))


def limited(image: Any, least: int, most: int) -> Any:
    return image, {"min_pixels": least, "max_pixels": most}


def test_every_stage_is_that_of_transformers_with_the_same_limits(opened: Opened) -> None:
    """One picture at its usual size, larger, and smaller; and others."""
    messages = [
        {"role": "user", "content": [WIDE, limited(WIDE, 20000, 23000), "Compare."]},
        {"role": "assistant", "content": ["The second."]},
        {"role": "user", "content": [limited(WIDE, 1, 1700), limited(TALL, 1, 4000), "And now?"]},
    ]
    found = opened.pipe.render(ours(messages))
    tokens = [span.length for span in found.image_spans]
    assert tokens[1] > tokens[0] > tokens[2] > 0
    check_stages(opened.pipe, opened.original, messages, TOLERANCES["float32"])
    check_answer(opened.pipe, opened.original, messages)


def test_features_of_one_picture_are_kept_by_its_size(opened: Opened) -> None:
    large, small = (ours(_asked(limits)) for limits in ((16000, 23000), (1, 2500)))
    first = opened.pipe(large, gen_config=SHORT)
    again = opened.pipe(large, gen_config=SHORT)
    assert again.timings.cached_images == 1
    assert again.token_ids == first.token_ids
    assert again.cached_tokens > 0
    other = opened.pipe(small, gen_config=SHORT)
    assert other.timings.cached_images == 0
    assert other.input_token_len < first.input_token_len


def _asked(limits: tuple[int, int]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [limited(picture(71, 93), *limits), "What is it?"]}]


def test_a_conversation_keeps_them_and_so_does_its_file(opened: Opened, tmp_path: Path) -> None:
    pipe = opened.pipe
    session = pipe.chat(ours(_asked((1, 2500))), gen_config=SHORT)
    usual = pipe.chat(("What is it?", picture(71, 93)), gen_config=SHORT)
    assert session.response.input_token_len < usual.response.input_token_len
    session.save(tmp_path / "talk.session")
    loaded = Session.load(tmp_path / "talk.session", pipe)
    found, expected = (pipe.chat("And?", session=s, gen_config=SHORT) for s in (loaded, session))
    assert found.response.input_token_len == expected.response.input_token_len
    assert found.response.token_ids == expected.response.token_ids
    again = pipe.render(loaded.history[0][0])  # the prompt as it was restored
    assert again.token_ids == pipe.render(session.history[0][0]).token_ids


RESTORE = """
import json, sys
from vlmforge import EngineConfig, GenerationConfig, Session, pipeline

with pipeline(sys.argv[1], EngineConfig(threads=1)) as pipe:
    session = Session.load(sys.argv[2], pipe)
    done = pipe.chat("And?", session, GenerationConfig(max_new_tokens=24, ignore_eos=True)).response
    print(json.dumps([done.token_ids, done.cached_tokens, done.timings.cached_images]))
"""


def test_a_new_process_goes_on_where_this_one_ended(opened: Opened, tmp_path: Path) -> None:
    """Places behind images lag behind the number of tokens, and each image has its own size."""
    pipe, path = opened.pipe, tmp_path / "talk.session"
    session = pipe.chat(("What is it?", TALL), gen_config=SHORT)
    session = pipe.chat(ours(_asked((16000, 23000))), session, gen_config=SHORT)
    session.save(path)
    command = [sys.executable, "-c", RESTORE, str(opened.path), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    greedy = GenerationConfig(max_new_tokens=24, ignore_eos=True)
    here = pipe.chat("And?", session, gen_config=greedy).response
    assert here is not None
    assert json.loads(done.stdout) == [here.token_ids, here.cached_tokens, 2]
    assert here.cached_tokens > 40


def test_plans_take_what_images_of_any_size_are(
    opened: Opened, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the library's stand-in: images of one size and of others, answers beside each other."""
    monkeypatch.setattr(plan_files, "run_compiler", keep_graph)
    options = ("--target", "tensorrt_rtx", "--dtype", "float16", "--max-batch-size", "2")
    plans = build_once(shared / f"{opened.path.stem}.plans", opened.original.folder, *options)
    prompts = [[WIDE, picture(90, 40, 1), SMALL, "Compare."], ["Look: ", TALL, " What is it?"]]
    messages = [[{"role": "user", "content": content}] for content in prompts]
    together = VisionConfig(max_batch_size=4)
    with plans_on_cpu("tensorrt_rtx"), pipeline(plans, vision_config=together) as pipe:
        for asked in messages:
            check_answer(pipe, opened.original, asked, TOLERANCES["float16"].margin)
        answers = pipe([ours(asked) for asked in messages], gen_config=SHORT)
        alone = [pipe(ours(asked), gen_config=SHORT).token_ids for asked in messages]
        assert [answer.token_ids for answer in answers] == alone


def test_what_cannot_be_is_refused(opened: Opened) -> None:
    pipe, most = opened.pipe, opened.pipe._engine.manifest.image.max_pixels
    cases = ((1, 10, "leave no size"), (9, 3, "leave no size"), (1, most + 1, "be larger than"))
    for least, largest, words in cases:
        with pytest.raises(PromptError, match=words) as caught:
            pipe.render(ours(_asked((least, largest))))
        assert f"max_pixels {largest}" in caught.value.found
    assert f"at most {most}" in caught.value.expected
    narrow, fine = pipe([ours(_asked((9, 3))), ("What is it?", SMALL)], gen_config=SHORT)
    assert "asks for what it cannot have" in str(narrow.error_message)
    assert fine.token_ids


def test_a_pipeline_holds_images_as_large_as_its_window(opened: Opened) -> None:
    image = opened.pipe._engine.manifest.image
    unit, window = image.view_size[0] ** 2, 64
    most = max(image.max_pixels, window * unit)
    config = EngineConfig(session_len=window)
    for largest in (most + 1, 1 << 45):
        with pytest.raises(ConfigError, match="larger than it may be") as caught:
            pipeline(opened.path, config, vision_config=VisionConfig(max_pixels=largest))
        assert str(largest) in caught.value.found
        assert str(most) in caught.value.expected
    with pipeline(opened.path, config, vision_config=VisionConfig(max_pixels=most)) as pipe:
        assert pipe.render(("What?", SMALL)).image_tokens > 0
