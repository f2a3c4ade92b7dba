"""Plans of today's families by TensorRT-RTX: ragged patches, windows, places, features in depth."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from live_parity import FAMILIES, checkpoint
from vlmforge.cli import main
from vlmforge.engine.layer_report import Layer, read_layers
from vlmforge.engine.manifest import Manifest, Part, load_manifest
from vlmforge_builder.build import BuildOptions, build_engine
from vlmforge_builder.progress import Progress

# Each kind of tower. The library's own attention needs none of our kernels, and the builds no
# traces but those of the engines that other tests build.
TOWERS = [
    ("internvl", next(iter(FAMILIES["internvl"].SHAPES))),
    *(("qwen2_vl", "windowed"), ("qwen2_vl", "plain"), ("qwen3_vl", "first")),
]


@pytest.mark.parametrize(("family", "shape"), TOWERS)
def test_a_plan_of_each_kind_of_tower(
    shared: Path, tmp_path: Path, family: str, shape: str
) -> None:
    engine = tmp_path / "engine"
    options = BuildOptions(
        str(checkpoint(shared, family, shape)),
        engine,
        target="tensorrt_rtx",
        dtype="bfloat16",
        attention="native",
    )
    with Progress(text=io.StringIO()) as progress:
        build_engine(options, progress)
    manifest = load_manifest(engine)
    check_ranges(manifest, patches=family != "internvl")
    check_towers_attention(engine, manifest)
    check_decoder(engine, manifest)
    assert main(["verify", str(engine), "--static"]) == 0


def check_ranges(manifest: Manifest, *, patches: bool) -> None:
    """Of a part that takes patches: one image, as large as a sequence; all that is open is told."""
    vision = manifest.part("vision")
    (profile,) = vision.profiles
    symbols = {dim for spec in vision.inputs for dim in spec.shape if isinstance(dim, str)}
    assert symbols == set(profile.dims)
    ends = {name: (dim.least, dim.most) for name, dim in profile.dims.items()}
    if not patches:
        assert ends == {"images": (1, 4)}
        return
    assert ends.pop("images") == (1, 1)
    assert set(ends.values()) == {(1, manifest.decode.session_len)}


def check_towers_attention(engine: Path, manifest: Manifest) -> None:
    """The library's own: over the whole image without a mask, in windows with one of truth."""
    found, types = attention(engine, manifest.part("vision"))
    masks = [layer.inputs[3] for layer in found if len(layer.inputs) > 3]
    assert found
    assert all(len(set(layer.inputs[:3])) == 3 for layer in found)
    windowed = any(spec.name == "window_rows" for spec in manifest.part("vision").inputs)
    assert len(masks) == windowed  # the first layer, of two
    assert {types[mask] for mask in masks} <= {"BOOL"}


def check_decoder(engine: Path, manifest: Manifest) -> None:
    """Tokens are turned by what it is given, and images have rows for some of its layers."""
    decode, decoder = manifest.decode, manifest.part("decoder")
    found, _ = attention(engine, decoder)
    assert len(found) == manifest.kv.layers
    shapes = {spec.name: spec.shape for spec in decoder.inputs}
    assert shapes["image_features"][1] == decode.feature_layers * decode.hidden_size
    assert ("turns" in shapes) == bool(decode.positions.turn_width)


def attention(engine: Path, part: Part) -> tuple[list[Layer], dict[str, str]]:
    """The layers of a plan that are attention, and the type of each tensor."""
    assert part.layers is not None
    layers = read_layers(engine / part.layers).layers
    types = {out.name: out.dtype for layer in layers for out in layer.outputs}
    return [layer for layer in layers if layer.type == "ATTENTION_INPUT"], types
