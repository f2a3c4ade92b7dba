"""Whatever is passed to a public call: it works, or raises one of our errors. Nothing else."""

from __future__ import annotations

import asyncio
import dataclasses
import inspect
import logging
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import IMAGES
from vlmforge import (
    ChatTemplateConfig,
    EngineConfig,
    GenerationConfig,
    Pipeline,
    PytorchEngineConfig,
    Session,
    VisionConfig,
    VlmforgeError,
    pipeline,
)
from vlmforge.errors import ConfigError
from vlmforge.limits import available_cpus
from vlmforge.vl import encode_image_base64, load_image

PHOTO = str(IMAGES / "alpha_97x61.png")


class Hostile:
    """All that Python may ask of an object raises."""

    def __repr__(self) -> str:
        raise RuntimeError("repr")

    def __bool__(self) -> bool:
        raise RuntimeError("bool")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("eq")

    def __hash__(self) -> int:
        raise RuntimeError("hash")


class BytesPath:
    def __fspath__(self) -> bytes:
        return b"\xff\xfe"


LOOP: list[object] = []
LOOP.append(LOOP)
JUNK: list[Any] = [
    *(None, True, False, 0, 1, -1, 2**70, -(2**70), 10**5000, 0.0, 1.5, math.nan, math.inf),
    *("", " ", "x", "\0", "a\0b", "\ud800", "x" * 5000, "a/" * 3000, "-x", "{", "~nobody/x"),
    *(b"", b"x", b"\0\xff", bytearray(b"x"), memoryview(b"x"), (), (1, 2, 3), ("a", "b", "c")),
    *([], [[]], [None], ["x"], [1], [Hostile()], {}, {"a": 1}, {"role": "user"}, {1, 2}, LOOP),
    *(object(), Hostile(), BytesPath(), print, int, range(3), iter([1]), 1j, Ellipsis),
    *(np.array([1, 2]), np.array(1), np.float32(0.5), np.int64(3), np.zeros((2, 2, 3), np.uint8)),
    *(np.array(["x"]), np.bool_(True), Path("x"), Path("a\0b"), PIL.Image.new("L", (2, 2))),
    *(EngineConfig(), GenerationConfig(), ChatTemplateConfig("x"), VisionConfig(), Session()),
]


def one_of_ours(call: Callable[[Any], object], junk: list[Any] = JUNK) -> int:
    """Call with all junk; how much of it worked."""
    worked = 0
    for value in junk:
        try:
            call(value)
            worked += 1
        except VlmforgeError as error:
            assert str(error)
        except BaseException as error:
            number = next(i for i, other in enumerate(junk) if other is value)
            raise AssertionError(f"junk {number}, a {type(value).__name__}") from error
    return worked


@pytest.fixture(scope="module")
def pipe(hf_engine: Path) -> Iterator[Pipeline]:
    with pipeline(hf_engine, EngineConfig(session_len=192, max_batch_size=2, threads=1)) as made:
        yield made


SHORT = GenerationConfig(max_new_tokens=1)

# --- configurations --------------------------------------------------------------------------

FIELDS = [
    (kind, field.name)
    for kind in (
        *(EngineConfig, PytorchEngineConfig, GenerationConfig),
        *(ChatTemplateConfig, VisionConfig),
    )
    for field in dataclasses.fields(kind)
]


@pytest.mark.parametrize(("kind", "field"), FIELDS)
def test_fields(kind: Any, field: str) -> None:
    required = {"model_name": "x"} if kind is ChatTemplateConfig else {}

    def make(value: object) -> None:
        config = kind(**{**required, field: value})
        assert getattr(config, field) is value

    def change(value: object) -> None:
        config = kind(**required)
        setattr(config, field, value)
        config.validate()

    assert one_of_ours(make) == one_of_ours(change) < len(JUNK)
    assert one_of_ours(make, [getattr(kind(**required), field)]) == 1  # its default


@pytest.mark.parametrize(
    "field",
    [f.name for f in dataclasses.fields(GenerationConfig) if f.name != "logits_processors"],
)
def test_what_a_generation_config_holds_can_be_run(field: str, pipe: Pipeline) -> None:
    def run(value: object) -> None:
        fields: dict[str, Any] = {"max_new_tokens": 1, "do_sample": True, field: value}
        pipe("hi", gen_config=GenerationConfig(**fields))

    one_of_ours(run, [*JUNK, "all", "generation", 2, 1000, [0], [700], [10**9]])


def test_words_of_configs() -> None:
    with pytest.raises(ConfigError, match="session_len must be a positive integer"):
        EngineConfig(session_len=10**5000)
    with pytest.raises(ConfigError, match="model_name must be"):
        EngineConfig(model_name=Hostile())  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        EngineConfig(revision=["x" * 10_000_000])  # type: ignore[arg-type]
    assert len(str(caught.value)) < 2000


def test_a_refused_field_is_not_fooled_by_what_equals_its_default() -> None:
    for value in (True, np.array([1, 1]), "1", [1]):
        with pytest.raises(ConfigError, match="dp is not supported"):
            EngineConfig(dp=value)  # type: ignore[arg-type]


def test_templates_as_json(tmp_path: Path) -> None:
    one_of_ours(ChatTemplateConfig.from_json)
    deep = '{"a":' * 100_000
    one_of_ours(ChatTemplateConfig.from_json, [deep, "{" * 9, tmp_path, tmp_path / "none"])
    os.chdir(tmp_path)
    one_of_ours(ChatTemplateConfig("x").to_json)
    one_of_ours(ChatTemplateConfig("x").to_json, [tmp_path, tmp_path / "no" / "folder"])
    config = ChatTemplateConfig("x")
    config.user = object()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="user must be a string"):
        config.to_json()


# --- pipeline(...) ---------------------------------------------------------------------------


class ReachedError(VlmforgeError):
    """All arguments were taken, and an engine would be loaded or built now."""


@pytest.fixture
def reaching(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def reach(*_: object, **__: object) -> None:
        raise ReachedError("here")

    monkeypatch.setattr("vlmforge.api.load._load", reach)
    monkeypatch.setattr("vlmforge.engine.build_cache._build", reach)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *("backend_config", "chat_template_config", "vision_config", "log_level", "model_name"),
        *("session_len", "tp", "cache_max_entry_count", "system", "trust_remote_code", "unknown"),
    ],
)
def test_arguments_of_pipeline(name: str, hf_engine: Path, reaching: None) -> None:
    level = logging.getLogger("vlmforge").level
    one_of_ours(lambda junk: pipeline(hf_engine, **{name: junk}))
    assert logging.getLogger("vlmforge").level == level
    with pytest.raises(ReachedError):
        pipeline(hf_engine)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("backend_config", 0), ("backend_config", {}), ("chat_template_config", "")),
        *(("vision_config", []), ("log_level", []), ("log_level", "loud"), ("model_name", 3)),
        *(("backend_config", GenerationConfig()), ("vision_config", "INFO")),
    ],
)
def test_a_wrong_argument_is_named(name: str, value: Any, hf_engine: Path) -> None:
    with pytest.raises(ConfigError, match=name):
        pipeline(hf_engine, **{name: value})


def test_a_config_that_was_changed_since_is_checked_again(hf_engine: Path) -> None:
    rows = (
        ("backend_config", EngineConfig(), "session_len"),
        ("chat_template_config", ChatTemplateConfig("x"), "user"),
        ("vision_config", VisionConfig(), "max_batch_size"),
    )
    for name, config, field in rows:
        setattr(config, field, object())
        with pytest.raises(ConfigError, match=f"{field} must be"):
            pipeline(hf_engine, **{name: config})


def test_paths(reaching: None, tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    long = [f"{tmp_path}/{'x' * 256}", "/x" * 5000, "x" * 300]
    assert one_of_ours(pipeline, [*JUNK, *long, loop, tmp_path, "a/b/c/d", b"/no/\xff"]) == 0
    engine = tmp_path / "engine.json"
    engine.touch()
    for path in (tmp_path, str(tmp_path), os.fsencode(tmp_path)):  # all of them name an engine
        with pytest.raises(ReachedError):
            pipeline(path)  # type: ignore[arg-type]
    for path, words in (
        ("a\0b", "NUL"),
        (long[0], "name too long"),
        (loop, "symbolic links"),
        ("\ud800", "surrogates"),
        (3, "3: "),
        ("", "empty"),
    ):
        with pytest.raises(ConfigError, match="model_path") as caught:
            pipeline(path)  # type: ignore[arg-type]
        assert words in caught.value.found


@pytest.mark.parametrize("field", ["session_len", "max_batch_size", "max_prefill_token_num"])
def test_numbers_beyond_all_sense(field: str, hf_engine: Path) -> None:
    def load(value: int) -> None:
        fields: dict[str, Any] = {"max_batch_size": 1, field: value}
        pipeline(hf_engine, EngineConfig(**fields)).close()

    one_of_ours(load, [1, 2**60])


# --- what an engine cannot change, and what is cut -------------------------------------------


def test_an_engine_keeps_its_dtype_and_has_no_revision(hf_engine: Path) -> None:
    with pytest.raises(ConfigError, match="another dtype") as caught:
        pipeline(hf_engine, EngineConfig(dtype="float16"))
    assert "'auto' or 'float32'" in caught.value.expected
    assert "--dtype float16" in caught.value.fix
    with pytest.raises(ConfigError, match="no revisions") as caught:
        pipeline(hf_engine, revision="main")
    assert "revision='main'" in caught.value.found
    pipeline(hf_engine, EngineConfig(dtype="float32", session_len=64)).close()


def test_threads_are_cut_to_the_processors(
    hf_engine: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cpus = available_cpus()
    for asked, cut in ((cpus + 62, cpus), (2**60, cpus), (1, 1), (None, None)):
        caplog.clear()
        with pipeline(hf_engine, EngineConfig(threads=asked, session_len=64)) as pipe:
            assert pipe._engine.options.threads == cut
        assert (f"threads={asked}" in caplog.text) is (cut != asked)
    assert f"may use {cpus} processors" not in caplog.text


def test_a_chunk_is_cut_with_a_word(hf_engine: Path, caplog: pytest.LogCaptureFixture) -> None:
    for asked, cut in ((8192, True), (512, False), (3, False)):
        caplog.clear()
        with pipeline(
            hf_engine, EngineConfig(max_prefill_token_num=asked, session_len=64, max_batch_size=1)
        ) as pipe:
            assert pipe("hi", gen_config=SHORT).generate_token_len == 1  # type: ignore[union-attr]
        assert (f"max_prefill_token_num={asked}: 512 tokens" in caplog.text) is cut
    assert EngineConfig().max_prefill_token_num is None  # 512 of a processor


def exhausted(pieces: Any) -> None:
    for _ in pieces:
        pass


def awaited(pieces: Any) -> None:
    async def read() -> None:
        async for _ in pieces:
            pass

    asyncio.run(read())


BRIEF = {"gen_config": SHORT}


CALLS: dict[str, Callable[..., object]] = {
    "__call__": lambda pipe, **a: pipe(**{"prompts": "hi", "gen_config": SHORT, **a}),
    "stream_infer": lambda pipe, **a: exhausted(
        pipe.stream_infer(**{"prompts": "hi", **BRIEF, **a})
    ),
    "chat": lambda pipe, **a: pipe.chat(**{"prompt": "hi", "gen_config": SHORT, **a}),
    "generate": lambda pipe, **a: awaited(pipe.generate(**{"messages": "hi", **BRIEF, **a})),
    "astream": lambda pipe, **a: awaited(pipe.astream(**{"prompt": "hi", **BRIEF, **a})),
    "render": lambda pipe, **a: pipe.render(**{"prompt": "hi", **a}),
    "count_tokens": lambda pipe, **a: pipe.count_tokens(**{"prompt": "hi", **a}),
    "stop_session": lambda pipe, **a: asyncio.run(pipe.stop_session(**{"session_id": 0, **a})),
    "end_session": lambda pipe, **a: asyncio.run(pipe.end_session(**{"session_id": 0, **a})),
}
TERMS = "priority salt timeout"
ARGUMENTS = {
    "__call__": f"prompts gen_config do_preprocess adapter_name use_tqdm {TERMS}",
    "stream_infer": f"prompts gen_config do_preprocess adapter_name {TERMS}",
    "chat": f"prompt session gen_config stream_response do_preprocess adapter_name {TERMS}",
    "astream": "prompt gen_config do_preprocess session_id " + TERMS,
    "generate": "messages session_id gen_config stream_response sequence_start sequence_end step "
    f"do_preprocess adapter_name {TERMS}",
    "render": "prompt do_preprocess",
    "count_tokens": "prompt do_preprocess",
    "stop_session": "session_id",
    "end_session": "session_id",
}
EACH = [(call, name) for call, names in ARGUMENTS.items() for name in names.split()]


def test_all_arguments_of_all_calls_are_tried() -> None:
    for name in CALLS:
        parameters = [*inspect.signature(getattr(Pipeline, name)).parameters][1:]
        assert parameters == ARGUMENTS[name].split()
    public = {name for name in vars(Pipeline) if not name.startswith("_")}
    others = "infer batch_infer session metrics close manifest tokenizer session_len"
    assert public - CALLS.keys() == set(others.split())


@pytest.mark.parametrize(("call", "name"), EACH)
def test_arguments_of_calls(call: str, name: str, pipe: Pipeline) -> None:
    assert one_of_ours(lambda junk: CALLS[call](pipe, **{name: junk})) < len(JUNK)


_junk = st.recursive(
    st.one_of(
        st.integers(0, len(JUNK) - 1).map(lambda number: JUNK[number]),
        st.sampled_from(["text", "image_url", "image", "user", "system", PHOTO, "hi"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "image_url", "url", "image"]),
            inner,
            max_size=4,
        ),
    ),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(prompt=_junk)
def test_prompts_of_any_shape(prompt: object, pipe: Pipeline) -> None:
    one_of_ours(lambda value: pipe.render(value), [prompt])
    one_of_ours(lambda value: pipe(value, gen_config=SHORT), [prompt])


def test_gen_configs_are_looked_at_one_by_one(pipe: Pipeline) -> None:
    rows = (("x", "'x'"), (["x"], "'x' in the list"), ([SHORT, SHORT], "of 1"), ({}, "(**"))
    for given_, words in rows:
        with pytest.raises(ConfigError, match="gen_config does not fit") as caught:
            pipe(["hi"], gen_config=given_)  # type: ignore[arg-type]
        assert words in str(caught.value)


@pytest.mark.parametrize("call", [load_image, encode_image_base64])
def test_images(call: Callable[[Any], object], monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = ["http://", "http://[", "http://\0", "file://", "data:", "data:,", "ftp://x/y"]
    monkeypatch.setattr("vlmforge.vl.fetch.fetch_bytes", lambda *_, **__: b"")
    assert one_of_ours(call, [*JUNK, *addresses]) < len(JUNK)


def test_sessions(pipe: Pipeline) -> None:
    for name in ("session_id", "prompt", "response", "history", "gen_config", "turns"):

        def use(junk: object, name: str = name) -> None:
            session = Session(**{name: junk})  # type: ignore[arg-type]
            pipe.chat("hi", session, SHORT)

        one_of_ours(use, [value for value in JUNK if not isinstance(value, Hostile)])
