"""Pictures whose features stay on the device answer as those do that pass through the host."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs
from PIL import Image

from conftest import HF, cuda_engine
from stand_in import at_once, settle
from vlmforge import EngineConfig, GenerationConfig, Pipeline, VisionConfig, pipeline
from vlmforge.api.load import serve
from vlmforge.backends import FloatArray
from vlmforge.backends.cuda.decoder import PagedDecoder
from vlmforge.backends.cuda.vision import DeviceVision, HostVision, Piece, Pool, Store
from vlmforge.backends.fake import HostDevice, cuda_on_cpu
from vlmforge.backends.features import DEVICE_VIEWS, DeviceRows, Features, device_features
from vlmforge.runner.stages import Engine

GREEDY = GenerationConfig(max_new_tokens=6, ignore_eos=True)


def picture(seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), np.uint8)
    return Image.fromarray(pixels)


PROMPTS: list[object] = [
    ("What is it?", picture(1)),
    ("Compare them.", [picture(2), picture(3), picture(2)]),
    "hi",
    *((f"Number {n}: what is it?", picture(n)) for n in range(4, 8)),
    ("And this?", picture(1)),
]


@pytest.fixture(scope="module")
def loaded(shared: Path) -> Iterator[Engine]:
    engine = cuda_engine(shared, HF.name)
    with cuda_on_cpu(), pipeline(engine, EngineConfig(max_batch_size=4)) as opened:
        yield opened._engine


def served(engine: Engine, **vision: int) -> Pipeline:
    return serve(engine, EngineConfig(enable_prefix_caching=False), VisionConfig(**vision))


def vision(engine: Engine) -> DeviceVision:
    assert isinstance(engine.vision, DeviceVision)
    return engine.vision


def test_nothing_is_captured_before_it_is_of_use(shared: Path) -> None:
    with cuda_on_cpu(), pipeline(cuda_engine(shared, HF.name)) as pipe:
        device = vision(pipe._engine)._device
        assert isinstance(device, HostDevice)
        assert device.captures == 0
        pipe(PROMPTS[0], gen_config=GenerationConfig(max_new_tokens=1))
        assert device.captures == 1


def pool_bytes(engine: Engine) -> int:
    sizes = device_features(engine.manifest, engine.options.features)
    assert sizes is not None
    return sizes.kept


def view_bytes(engine: Engine) -> int:
    decode = engine.manifest.decode
    return -(-4 * decode.tokens_per_image * decode.hidden_size // 256) * 256


@pytest.fixture(scope="module")
def through_host(loaded: Engine, shared: Path) -> Engine:
    """The same decoder, and the same graph of the vision part run from arrays."""
    decoder = loaded.decoder
    assert isinstance(decoder, PagedDecoder)
    file = cuda_engine(shared, HF.name) / loaded.manifest.part("vision").file
    return dataclasses.replace(loaded, vision=HostVision(decoder._device.session(file)))


@pytest.fixture(scope="module")
def wanted(through_host: Engine) -> list[list[int]]:
    with served(through_host) as pipe:
        answers = [pipe(prompt, gen_config=GREEDY) for prompt in PROMPTS]
    return [answer.token_ids for answer in answers]  # type: ignore[union-attr]


def pixels(engine: Engine, *seeds: int) -> FloatArray:
    return np.concatenate([engine.prepare_image(picture(n)).pixel_values for n in seeds])


@pytest.mark.parametrize("count", [1, 3, DEVICE_VIEWS + 1])
def test_features_are_those_of_the_graph(loaded: Engine, through_host: Engine, count: int) -> None:
    views = pixels(loaded, *range(count))
    for _ in range(2):  # as it is, and captured
        found = loaded.encode(views)
        assert [type(rows) for rows in found] == [DeviceRows] * count
        alone = np.concatenate([np.asarray(through_host.encode(view[None])) for view in views])
        whole = np.stack([np.asarray(rows) for rows in found])
        np.testing.assert_allclose(whole, alone, rtol=0, atol=2e-3)
        if count == 1:
            np.testing.assert_array_equal(whole, alone)


def test_answers_are_the_same_alone_and_at_once(loaded: Engine, wanted: list[list[int]]) -> None:
    with served(loaded) as pipe:
        alone = [pipe(prompt, gen_config=GREEDY).token_ids for prompt in PROMPTS]  # type: ignore[union-attr]
    assert alone == wanted
    with served(loaded) as pipe:
        assert pipe.metrics().images_encoded == 0
        together = [a.token_ids for a in at_once(pipe, PROMPTS, [GREEDY] * len(PROMPTS))]
        assert together == wanted
        assert pipe.metrics().images_encoded == 7  # each once


def test_pictures_that_wait_are_run_together(
    loaded: Engine, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []
    real = DeviceVision._run

    def noted(self: DeviceVision, views: int) -> None:
        runs.append(views)
        real(self, views)

    monkeypatch.setattr(DeviceVision, "_run", noted)
    with served(loaded) as pipe:
        answers = at_once(pipe, PROMPTS, [GREEDY] * len(PROMPTS))
    assert [answer.token_ids for answer in answers] == wanted
    assert sum(runs) == 7
    assert max(runs) <= DEVICE_VIEWS
    assert len(runs) <= 3  # one for who comes first, and one for all that wait then


def test_where_the_pool_is_full_features_pass_through_the_host(
    loaded: Engine, wanted: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    take, keep = Pool.take, Store.keep
    assert vision(loaded).store.pool.free == pool_bytes(loaded)  # whoever came before has closed
    least = pool_bytes(loaded) - 2 * view_bytes(loaded)
    kinds = set[type]()

    def tight(self: Pool, size: int) -> Piece | None:
        return take(self, size) if self.free > least else None

    def noted(self: Store, address: int, rows: int, width: int) -> Features:
        found = keep(self, address, rows, width)
        kinds.add(type(found))
        return found

    monkeypatch.setattr(Pool, "take", tight)
    monkeypatch.setattr(Store, "keep", noted)
    with served(loaded) as pipe:
        answers = at_once(pipe, PROMPTS, [GREEDY] * len(PROMPTS))
    assert [answer.token_ids for answer in answers] == wanted
    assert kinds == {DeviceRows, np.ndarray}


def test_features_are_let_go_when_the_prompt_has_been_run(loaded: Engine) -> None:
    pool, whole = vision(loaded).store.pool, pool_bytes(loaded)
    with served(loaded, feature_cache_bytes=0) as pipe:
        many = GenerationConfig(max_new_tokens=40, ignore_eos=True)
        frees = []
        for piece in pipe.stream_infer(PROMPTS[1], many):
            frees.append(pipe._scheduler.ask(lambda _: pool.free))  # by the thread that takes
            assert piece.finish_reason != "error"
    assert frees[0] == whole  # while the answer is still being written
    with served(loaded) as pipe:
        pipe(PROMPTS[0], gen_config=GREEDY)
        settle(pipe)
        assert pool.free == whole - view_bytes(loaded)  # it is kept for who asks again
        assert pipe._scheduler._features.bytes == view_bytes(loaded)
        pipe(("Once more?", picture(1)), gen_config=GREEDY)
        assert pipe.metrics().images_encoded == 1
    assert pool.free == whole


def test_a_prompt_that_is_run_again_has_its_pictures_encoded_again(
    loaded: Engine, wanted: list[list[int]]
) -> None:
    """Few pages: who came last gives them up, and begins again later."""
    page, more = loaded.options.block_size, dataclasses.replace(GREEDY, max_new_tokens=40)
    asked = [PROMPTS[0], PROMPTS[3], PROMPTS[4]]
    with served(loaded) as pipe:
        lengths = [pipe.count_tokens(prompt) for prompt in asked]
        alone = [pipe(prompt, gen_config=more).token_ids for prompt in asked]  # type: ignore[union-attr]
    assert [tokens[:6] for tokens in alone] == [wanted[0], wanted[3], wanted[4]]
    # They begin together, and then there is no page for the next tokens.
    pages = sum(-(-(length + 1) // page) for length in lengths)
    assert pages < sum(-(-(length + 40) // page) for length in lengths)
    options = structs.replace(loaded.options, budget=pages)
    with served(dataclasses.replace(loaded, options=options), feature_cache_bytes=0) as pipe:
        answers = at_once(pipe, asked, [more] * len(asked))
        assert [answer.token_ids for answer in answers] == alone
        settle(pipe)
        assert pipe.metrics().preemptions > 0
        assert pipe.metrics().images_encoded > len(asked)
