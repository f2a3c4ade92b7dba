"""Image features: computed once, in full batches, and never taken for another image's."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmforge.api.memory import feature_bytes
from vlmforge.backends import FloatArray
from vlmforge.engine.images.patch_inputs import Grid
from vlmforge.errors import BackendUnavailableError
from vlmforge.runner.features import FeatureCache
from vlmforge.vl.prepared import PreparedImage, prepare, row_keys

TOKENS, HIDDEN = 3, 2
IMAGE = TOKENS * HIDDEN * 4  # bytes of the features of one view


def image(value: float, views: int = 1) -> PreparedImage:
    """An image whose every view has pixels of its own."""
    levels = (np.arange(views) / 16 + value).astype(np.float32)
    return prepare(np.broadcast_to(levels[:, None, None, None], (views, 3, 2, 2)).copy())


class Encoder:
    """Row t of a view's features is its mean + t; notes the sizes of its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, pixel_values: FloatArray, grid: Grid | None = None) -> FloatArray:
        del grid
        self.batches.append(len(pixel_values))
        means = pixel_values.mean(axis=(1, 2, 3))
        rows = means[:, None] + np.arange(TOKENS, dtype=np.float32)
        return np.repeat(rows[..., None], HIDDEN, axis=2)


def expected(prepared: PreparedImage) -> FloatArray:
    return Encoder()(prepared.pixel_values).reshape(-1, HIDDEN)


def images(*values: float) -> list[PreparedImage]:
    return [image(value) for value in values]


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=6), max_size=6),
    st.lists(st.integers(0, 9), max_size=4),
    st.integers(1, 4),
    st.integers(0, 9 * IMAGE),
)
def test_whatever_is_asked_for_comes_in_order_and_is_its_own(
    requests: list[list[int]], ahead: list[int], batch: int, budget: int
) -> None:
    encoder = Encoder()
    cache = FeatureCache(encoder, batch=batch, budget=budget)
    for request in requests:
        asked = [image(value, views=1 + value % 3) for value in request]
        found, known = cache.get(asked, [image(value, 1 + value % 3) for value in ahead])
        assert 0 <= known <= len(asked)
        assert cache.bytes <= budget
        for features, prepared in zip(found, asked, strict=True):
            np.testing.assert_array_equal(features, expected(prepared))


def test_unknown_images_go_in_full_batches() -> None:
    encoder = Encoder()
    _, known = FeatureCache(encoder, batch=4).get(images(*range(10)))
    assert encoder.batches == [4, 4, 2]
    assert known == 0


def test_an_image_repeated_in_a_request_is_encoded_once() -> None:
    encoder = Encoder()
    found, known = FeatureCache(encoder, batch=4).get(images(1, 2, 1, 1))
    assert (encoder.batches, known, len(found)) == ([2], 0, 4)
    np.testing.assert_array_equal(found[0], found[3])


def test_known_images_are_counted_and_not_encoded() -> None:
    encoder = Encoder()
    cache = FeatureCache(encoder, batch=4)
    cache.get(images(1, 2))
    assert cache.get(images(2, 3, 2))[1] == 2
    assert encoder.batches == [2, 1]


def test_images_ahead_fill_up_the_last_batch_and_no_more() -> None:
    encoder = Encoder()
    cache = FeatureCache(encoder, batch=4)
    # 1 is asked for already, 7 comes twice: neither takes a place.
    cache.get(images(1, 2), images(1, 7, 7, 8, 9))
    assert encoder.batches == [4]
    assert cache.get(images(7, 8))[1] == 2
    assert cache.get(images(9))[1] == 0


def test_images_ahead_cause_no_run_of_their_own() -> None:
    encoder = Encoder()
    cache = FeatureCache(encoder, batch=2)
    cache.get(images(1, 2), images(3))
    cache.get(images(1), images(3))
    cache.get([], images(3))
    assert encoder.batches == [2]


def test_the_least_recently_used_image_goes() -> None:
    cache = FeatureCache(Encoder(), batch=1, budget=2 * IMAGE)
    cache.get(images(1))
    cache.get(images(2))
    cache.get(images(1))
    cache.get(images(3))
    assert cache.get(images(1))[1] == 1
    assert cache.get(images(2))[1] == 0


def test_who_asks_whether_an_image_is_known_uses_it() -> None:
    cache = FeatureCache(Encoder(), batch=1, budget=2 * IMAGE)
    first, second, third = images(1, 2, 3)
    cache.get([first, second])
    assert cache.known(first.digest) is not None
    cache.get([third])
    assert cache.known(first.digest) is not None
    assert cache.known(second.digest) is None


def test_a_large_image_takes_the_place_of_several() -> None:
    cache = FeatureCache(Encoder(), batch=4, budget=3 * IMAGE)
    small, large, larger = images(1, 2, 3), image(4, views=3), image(5, views=4)
    cache.get(small)
    assert cache.bytes == 3 * IMAGE
    cache.get([large])
    assert [cache.known(i.digest) is not None for i in [*small, large]] == [False] * 3 + [True]
    found, _ = cache.get([larger])  # too large to be kept
    np.testing.assert_array_equal(found[0], expected(larger))
    assert cache.bytes == 0


def test_a_request_may_have_more_images_than_are_kept() -> None:
    encoder = Encoder()
    cache = FeatureCache(encoder, batch=2, budget=2 * IMAGE)
    found, _ = cache.get(images(1, 2, 3, 4, 5))
    assert [float(rows[0, 0]) for rows in found] == [1, 2, 3, 4, 5]
    assert cache.get(images(5, 4))[1] == 2
    assert cache.get(images(3))[1] == 0


def test_after_a_failure_nothing_wrong_is_kept() -> None:
    encoder = Encoder()
    failing = iter([None, RuntimeError("out of memory")])

    def encode(pixel_values: FloatArray, grid: Grid | None) -> FloatArray:
        del grid
        if error := next(failing, None):
            raise error
        return encoder(pixel_values)

    cache = FeatureCache(encode, batch=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.get(images(1, 2))
    found, known = cache.get(images(1, 2))
    assert known == 1
    np.testing.assert_array_equal(found[1], expected(image(2)))


def test_the_digest_tells_images_apart_and_equal_ones_not() -> None:
    one, other = np.zeros((1, 3, 2, 4), np.float32), np.zeros((1, 3, 4, 2), np.float32)
    assert prepare(one).digest != prepare(other).digest
    assert prepare(one).digest == prepare(one.copy()).digest
    changed = one.copy()
    changed[0, 2, 1, 3] = np.nextafter(np.float32(0), np.float32(1))
    assert prepare(one).digest != prepare(changed).digest


def keys_of(digests: Sequence[bytes], length: int) -> list[list[int]]:
    pixels = np.zeros((1, 3, 1, 1), np.float32)
    return [row_keys(PreparedImage(pixels, digest), length).tolist() for digest in digests]


DIGESTS = st.binary(min_size=16, max_size=16)


@given(DIGESTS, st.integers(0, 127), st.integers(1, 3000))
def test_images_whose_digests_differ_in_one_bit_share_no_key(
    digest: bytes, bit: int, length: int
) -> None:
    neighbour = (int.from_bytes(digest, "little") ^ 1 << bit).to_bytes(16, "little")
    first, second = keys_of([digest, neighbour], length)
    assert len({*first, *second}) == 2 * length


@given(DIGESTS, st.integers(1, 600), st.integers(1, 600))
def test_keys_are_below_every_text_id_and_do_not_depend_on_the_length(
    digest: bytes, length: int, other: int
) -> None:
    keys = row_keys(PreparedImage(np.zeros((1, 3, 1, 1), np.float32), digest), length)
    assert keys.dtype == np.int64
    assert keys.shape == (length,)
    assert keys.max() < -(2**16)  # ids are >= 0; some originals write small negative ones
    shorter = min(length, other)
    assert keys_of([digest], other)[0][:shorter] == keys[:shorter].tolist()


def test_views_of_several_images_share_a_run() -> None:
    encoder = Encoder()
    asked = [image(1, views=3), image(2, views=5), image(3)]
    found, _ = FeatureCache(encoder, batch=4).get(asked)
    assert encoder.batches == [4, 4, 1]
    for features, prepared in zip(found, asked, strict=True):
        np.testing.assert_array_equal(features, expected(prepared))


def test_an_image_ahead_is_taken_only_with_all_its_views() -> None:
    encoder = Encoder()
    cache = FeatureCache(encoder, batch=4)
    cache.get([image(1, views=2)], [image(2, views=3), image(3, views=2)])
    assert encoder.batches == [4]
    assert cache.get([image(3, views=2)])[1] == 1
    assert cache.get([image(2, views=3)])[1] == 0


def test_only_the_chosen_rows_are_kept() -> None:
    pixels = image(1, views=2).pixel_values
    rows = np.array([5, 0, 0, 3])
    chosen, whole = prepare(pixels, rows), prepare(pixels)
    found, _ = FeatureCache(Encoder(), batch=8).get([chosen, whole])
    np.testing.assert_array_equal(found[1], expected(whole))
    np.testing.assert_array_equal(found[0], expected(whole)[rows])
    # Equal pixels with other rows are another image.
    assert len({chosen.digest, whole.digest, prepare(pixels, rows[::-1].copy()).digest}) == 3


def test_features_have_a_part_of_the_plan() -> None:
    """Of what is free before anything is loaded."""
    assert feature_bytes(None, 64e9) == 128 << 20
    assert feature_bytes(None, 1e9) == 50_000_000
    assert feature_bytes(0, 1e9) == 0
    assert feature_bytes(700_000_000, 1e9) == 700_000_000
    with pytest.raises(BackendUnavailableError, match="does not fit the memory") as caught:
        feature_bytes(2_000_000_000, 1e9)
    assert "feature_cache_bytes=2000000000" in caught.value.expected
    assert caught.value.found.startswith("1.00 GB")


def patched(value: float, down: int, across: int) -> PreparedImage:
    pixels = np.full((1, down * across, 4, 2), value, np.float32)
    return prepare(pixels, np.arange(down * across), grid=(down, across))


def test_images_in_patches_run_beside_others_of_their_grid_up_to_a_budget() -> None:
    ran: list[tuple[int, object]] = []

    def encode(pixel_values: FloatArray, grid: Grid | None) -> FloatArray:
        ran.append((len(pixel_values), grid))
        return pixel_values.mean(axis=2)

    asked = [patched(1, 8, 16), patched(2, 16, 8), patched(3, 8, 16), patched(4, 8, 16)]
    found, known = FeatureCache(encode, batch=1).get(asked)
    assert known == 0
    assert ran == [(2, (8, 16)), (1, (8, 16)), (1, (16, 8))]  # 1024 patches are a view
    assert [features[0, 0] for features in found] == [1, 2, 3, 4]
    assert all(len(features) == 128 for features in found)
    ran.clear()
    FeatureCache(encode, batch=1).get(
        [patched(1, 1, 2)], ahead=[patched(2, 2, 1), patched(3, 1, 2)]
    )
    assert ran == [(2, (1, 2))]
    ran.clear()
    FeatureCache(encode, batch=1).get([patched(1, 40, 40), patched(2, 40, 40)])
    assert ran == [(1, (40, 40))] * 2
    assert patched(1, 1, 4).digest != patched(1, 4, 1).digest != patched(1, 2, 2).digest
