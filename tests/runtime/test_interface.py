"""The list of what graphs take and give: what follows from a manifest, and the check against it."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from msgspec import structs

from sample_manifest import MANIFEST, RICH
from vlmforge.engine.bundle import Bundle
from vlmforge.engine.images.patches import Patches
from vlmforge.engine.interface import DecoderInterface, fits, interface_of
from vlmforge.engine.manifest import FileEntry, KVLayout, Manifest, Part, load_manifest
from vlmforge.engine.positions.axes import Axes
from vlmforge.engine.static_check import check_static
from vlmforge.engine.tensors import TensorSpec

POOLS = structs.replace(RICH, compute_dtype="float16", kv=KVLayout(3, 2, 8, "float8_e4m3fn", 64))
CHAIN = structs.replace(POOLS, backend="cuda")


def described(manifest: Manifest) -> Manifest:
    """With parts that take and give what is listed, and room for what ranks read of a file."""

    def part(old: Part) -> Part:
        listed = interface_of(manifest, old.name)
        return structs.replace(
            old,
            inputs=listed.inputs,
            outputs=listed.outputs,
            aliases=listed.aliases,
            layers=None,
            profiles=(),
        )

    files = (*manifest.files, FileEntry("d.data", 1 << 20, "0" * 64))
    parts = tuple(part(old) for old in manifest.parts)
    return structs.replace(manifest, parts=parts, files=files)


def failures(manifest: Manifest) -> set[tuple[str, str]]:
    results = check_static(Bundle(Path(), manifest))
    return {(r.part, r.check) for r in results if not r.passed and r.check != "files"}


def test_a_built_engine_is_as_listed(hf_engine: Path) -> None:
    manifest = load_manifest(hf_engine)
    for part in manifest.parts:
        listed = interface_of(manifest, part.name)
        assert (part.inputs, part.outputs) == (listed.inputs, listed.outputs)


def test_what_a_dense_decoder_takes_and_gives() -> None:
    listed = interface_of(MANIFEST, "decoder")
    names = ["input_ids", "image_features", "past_lengths", "logits_indices"]
    caches = ["key.0", "key.1", "value.0", "value.1"]
    assert [spec.name for spec in listed.inputs] == [*names, *(f"past_{c}" for c in caches)]
    assert [spec.name for spec in listed.outputs] == ["logits", *(f"present_{c}" for c in caches)]
    assert listed.aliases == {f"present_{cache}": f"past_{cache}" for cache in caches}
    assert listed.inputs[1] == TensorSpec("image_features", "float32", ("rows", 16))
    assert listed.inputs[4] == TensorSpec("past_key.0", "float32", ("batch", 2, "capacity", 8))
    assert listed.outputs[0] == TensorSpec("logits", "float32", ("batch", "outputs", 704))


def test_what_levels_pools_and_types_change() -> None:
    listed = interface_of(POOLS, "decoder")
    assert [spec.name for spec in listed.inputs[-3:]] == [
        *("rotary_levels", "query_lengths", "block_table")
    ]
    assert {spec.dtype for spec in listed.inputs[-2:]} == {"int32"}
    assert listed.inputs[1].dtype == "float16"
    assert listed.outputs[0].dtype == "float32"
    pool = TensorSpec("present_value.2", "float8_e4m3fn", ("pages", 2, 64, 8))
    assert listed.outputs[-1] == pool


def test_views_of_a_picture() -> None:
    (pixels,), (features,) = (
        getattr(interface_of(RICH, "vision"), side) for side in ("inputs", "outputs")
    )
    assert pixels == TensorSpec("pixel_values", "float32", ("images", 3, 8, 8))
    assert features == TensorSpec("image_features", "float32", ("images", 5, 2 * 16))
    decoder = interface_of(RICH, "decoder")
    assert decoder.inputs[1] == TensorSpec("image_features", "float32", ("rows", 2 * 16))


def test_patches_of_a_picture_and_places_of_tokens() -> None:
    image = Patches(RICH.image.format, 4, 2, 2, 64, 6400, (1.0, 0.5), window=3, table=5)
    decode = structs.replace(RICH.decode, positions=Axes(64, (1.0, 0.5), (0, 2)))
    manifest = structs.replace(RICH, image=image, decode=decode)
    listed = {spec.name: spec for spec in interface_of(manifest, "vision").inputs}
    assert listed["pixel_values"].shape == ("images", "rows", 4, 3 * 2 * 16)
    assert listed["patch_cos"].shape == ("rows", 4, 4)
    assert listed["window_rows"].shape == ("windows", 9)
    assert listed["place_weights"].dtype == "float32"
    (features,) = interface_of(manifest, "vision").outputs
    assert features.shape == ("images", "rows", 2 * 16)
    arrays = image.arrays((2, 3))
    assert {name: array.dtype.name for name, array in arrays.items()} == {
        name: spec.dtype for name, spec in listed.items() if name != "pixel_values"
    }
    (turns,) = [s for s in interface_of(manifest, "decoder").inputs if s.name == "turns"]
    assert turns == TensorSpec("turns", "float32", ("batch", "tokens", 4))


def test_graphs_of_a_chain_know_no_pages() -> None:
    whole, chain = interface_of(POOLS, "decoder"), interface_of(CHAIN, "decoder")
    assert [spec.name for spec in chain.inputs] == [spec.name for spec in whole.inputs[:-2]]
    assert [spec.name for spec in chain.outputs] == ["logits"]
    assert chain.aliases == {}
    assert chain.inputs[4:-1] == whole.inputs[4:-3]  # the pools
    features = [spec for spec in chain.inputs if spec.name == "image_features"]
    assert [spec.dtype for spec in features] == ["float32"]
    assert interface_of(CHAIN, "vision").outputs[0].dtype == "float32"


@pytest.mark.parametrize("manifest", [MANIFEST, RICH, POOLS, CHAIN])
def test_what_is_listed_passes_the_check(manifest: Manifest) -> None:
    assert failures(described(manifest)) == set()


def test_a_fixed_capacity_passes_the_check() -> None:
    listed = interface_of(MANIFEST, "decoder")
    assert isinstance(listed, DecoderInterface)
    fixed = structs.replace(listed, capacity=64)
    assert fixed.inputs[4].shape == ("batch", 2, 64, 8)
    whole = described(MANIFEST)
    decoder = structs.replace(whole.parts[1], inputs=fixed.inputs, outputs=fixed.outputs)
    assert failures(structs.replace(whole, parts=(whole.parts[0], decoder))) == set()


OTHER = {
    "name": lambda spec: structs.replace(spec, name=spec.name.replace("_", "-")),
    "dtype": lambda spec: structs.replace(spec, dtype="bfloat16"),
    "rank": lambda spec: structs.replace(spec, shape=(*spec.shape, 1)),
    "size": lambda spec: structs.replace(spec, shape=(*spec.shape[:-1], "other")),
}


@given(st.data())
def test_any_other_input_or_output_fails_the_check(data: st.DataObject) -> None:
    whole = described(data.draw(st.sampled_from([MANIFEST, RICH, POOLS, CHAIN])))
    part = data.draw(st.sampled_from(whole.parts))
    side = data.draw(st.sampled_from(["inputs", "outputs"]))
    specs = list(getattr(part, side))
    place = data.draw(st.integers(0, len(specs) - 1))
    how = data.draw(st.sampled_from([*OTHER, "gone", "twice"]))
    changed = {"gone": [], "twice": [specs[place]] * 2}.get(how)
    new = [OTHER[how](specs[place])] if changed is None else changed
    assume(new != [specs[place]])  # "logits" has nothing to replace
    specs[place : place + 1] = new
    odd = structs.replace(part, **{side: tuple(specs)}, aliases={})
    parts = tuple(odd if old.name == part.name else old for old in whole.parts)
    found = failures(structs.replace(whole, parts=parts))
    assert found and found <= {(part.name, "interface"), (part.name, "caches")}


def test_a_size_may_be_fixed_but_not_freed() -> None:
    varying, fixed = (TensorSpec("x", "int64", (size,)) for size in ("n", 4))
    assert fits(fixed, varying)
    assert fits(fixed, fixed)
    assert not fits(varying, fixed)
