"""The vision part over patches: lowered attention, images beside each other, memory."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
import torch
from msgspec import structs

from vlmforge.engine.images.patch_inputs import Arrays
from vlmforge.engine.images.patches import Patches
from vlmforge.engine.images.pixels import PixelFormat
from vlmforge.engine.interface import PatchInterface
from vlmforge.ort import ort
from vlmforge_builder.blocks.patch_vision import (
    PatchVision,
    PatchVisionConfig,
    PlacedVision,
    WindowedVision,
)
from vlmforge_builder.export import Traced, trace
from vlmforge_builder.passes.flash_attention import FlashAttentionPass
from vlmforge_builder.recipe import PartSpec
from vlmforge_builder.weights import Computed

FORMAT = PixelFormat("bicubic", 1 / 255, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
POLICY = Patches(FORMAT, 2, 1, 2, 16, 1 << 20, (1.0, 0.1, 0.01, 0.001), window=2, table=3)
CONFIG = PatchVisionConfig(
    inputs=POLICY.patch_inputs,
    hidden_size=32,
    intermediate_size=24,
    layers=2,
    heads=2,
    norm_eps=1e-6,
    activation="silu",
    gated=True,
    patch_bias=False,
    outputs=8,
    whole=frozenset({1}),
)
KINDS = {
    "windowed": (WindowedVision, structs.replace(POLICY, table=0), {}),
    "placed": (PlacedVision, structs.replace(POLICY, window=0), {"table": 9, "tapped": (0,)}),
}


def made(name: str) -> tuple[PatchVision, Patches, PatchVisionConfig]:
    kind, policy, more = KINDS[name]
    config = dataclasses.replace(CONFIG, inputs=policy.patch_inputs, **more)
    torch.manual_seed(3)
    module = kind(config).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.2)
    return module, policy, config


def session(traced: Traced, module: PatchVision) -> ort.InferenceSession:
    model = traced.model
    for name, parameter in module.named_parameters():
        model.graph.initializers[name].const_value = ir.tensor(parameter.detach().numpy())
    options = ort.SessionOptions()
    options.enable_cpu_mem_arena = False
    data = ir.to_proto(model).SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])


@pytest.fixture(
    scope="module", params=["windowed", pytest.param("placed", marks=pytest.mark.nightly)]
)
def parts(request: pytest.FixtureRequest) -> tuple[PatchVision, Patches, ort.InferenceSession]:
    module, policy, config = made(request.param)
    width = config.outputs * (1 + len(config.tapped))
    weights = {name: Computed(lambda: torch.empty(0)) for name, _ in module.named_parameters()}
    spec = PartSpec(
        "vision", lambda: type(module)(config), PatchInterface(config.inputs, width), weights
    )
    traced = trace(spec)
    FlashAttentionPass()(traced.model)
    kinds = [node.op_type for node in traced.model.graph]
    assert kinds.count("MultiHeadAttention") == (1 if request.param == "windowed" else 2)
    assert kinds.count("Attention") == (1 if request.param == "windowed" else 0)
    return module, policy, session(traced, module)


def pixels(policy: Patches, count: int, tokens: int) -> np.ndarray:
    inputs = policy.patch_inputs
    shape = (count, tokens, inputs.group, inputs.values)
    return np.random.default_rng(tokens).standard_normal(shape).astype(np.float32)


def eager(module: PatchVision, values: np.ndarray, arrays: Arrays) -> np.ndarray:
    with torch.no_grad():
        given = [torch.from_numpy(array) for array in arrays.values()]
        return np.asarray(module(torch.from_numpy(values), *given))


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 4)])
def test_the_graph_is_the_module(
    parts: tuple[PatchVision, Patches, ort.InferenceSession], grid: tuple[int, int]
) -> None:
    module, policy, run = parts
    values, arrays = pixels(policy, 2, grid[0] * grid[1]), policy.arrays(grid)
    (found,) = run.run(None, {"pixel_values": values, **arrays})
    np.testing.assert_allclose(found, eager(module, values, arrays), atol=1e-4, rtol=0)
    # Images beside each other see nothing of each other.
    for view, rows in zip(values, found, strict=True):
        (alone,) = run.run(None, {"pixel_values": view[None], **arrays})
        np.testing.assert_allclose(rows, alone[0], atol=1e-5, rtol=0)


def test_windows_see_nothing_of_each_other() -> None:
    module, policy, _ = made("windowed")
    module.layers = module.layers[:1]  # the one in windows
    values, arrays = pixels(policy, 1, 12), policy.arrays((3, 4))
    before = eager(module, values, arrays)
    values[0, 0] += 1
    changed = np.abs(eager(module, values, arrays) - before).max(axis=(0, 2)) > 0
    assert changed.reshape(3, 4)[:2, :2].all()
    assert changed.sum() == 4
