"""Every tensor of a checkpoint is accounted for, in every family, before anything is traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import DATA
from vlmforge.errors import CheckpointError, TensorError, UnsupportedModelError
from vlmforge_builder.checkpoint.mapped import TensorInfo
from vlmforge_builder.checkpoint.store import TensorStore
from vlmforge_builder.recipe import ModelSpec, RecipeOptions
from vlmforge_builder.recognise import recognise
from vlmforge_builder.tensor_check import check_tensors

FAMILIES = sorted(path.parents[1].name for path in DATA.glob("*/checkpoint/config.json"))
# One matrix of each family's decoder, tower and projector, without its last part.
MODULES: Mapping[str, tuple[str, str, str]] = {
    "llava_1_5_hf": (
        "language_model.model.layers.0.self_attn.q_proj",
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1",
        "multi_modal_projector.linear_1",
    ),
    "llava_next_mistral_hf": (
        "language_model.model.layers.1.mlp.down_proj",
        "vision_tower.vision_model.encoder.layers.0.self_attn.out_proj",
        "multi_modal_projector.linear_2",
    ),
    "llava_v1_5_liuhaotian": (
        "model.layers.0.self_attn.q_proj",
        "vision_model.encoder.layers.0.mlp.fc1",
        "model.mm_projector.0",
    ),
    "llava_v1_6_mistral_liuhaotian": (
        "model.layers.0.self_attn.k_proj",
        "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1",
        "model.mm_projector.2",
    ),
    "qwen_vl_chat": (
        "transformer.h.0.attn.c_proj",
        "transformer.visual.transformer.resblocks.0.attn.in_proj",
        "transformer.visual.attn_pool.kv_proj",
    ),
    "yi_vl": (
        "model.layers.0.mlp.gate_proj",
        "vision_model.encoder.layers.0.mlp.fc2",
        "model.mm_projector.3",
    ),
}


@dataclass(frozen=True)
class Edited:
    """A store whose headers are changed; `None` removes a tensor. No value may be read."""

    store: TensorStore
    headers: Mapping[str, tuple[str, tuple[int, ...]] | None]

    def names(self) -> tuple[str, ...]:
        gone = {name for name, header in self.headers.items() if header is None}
        return tuple(
            n for n in dict.fromkeys((*self.store.names(), *self.headers)) if n not in gone
        )

    def info(self, name: str) -> TensorInfo:
        header = self.headers.get(name, ...)
        if header is None:
            raise TensorError(f"No tensor {name}.", found="-", expected=name, fix="-")
        if header is ...:
            return self.store.info(name)
        return TensorInfo(name, *header, Path("edited.safetensors"))  # type: ignore[misc]

    def read(self, name: str) -> Tensor:
        raise AssertionError(f"the values of {name} were read")

    def __contains__(self, name: object) -> bool:
        return name in self.names()


def no_hub(name: str) -> Path:
    raise CheckpointError(f"{name} could not be fetched.")


@cache
def spec_of(name: str) -> ModelSpec:
    folder = DATA / name / "checkpoint"
    config, recipe = recognise(folder)
    return recipe.load(folder, config, RecipeOptions(None, None, no_hub))


def read_by(spec: ModelSpec) -> list[str]:
    """Names of the tensors that the parts read."""
    return sorted({n for part in spec.parts for w in part.weights.values() for n in w.names})


@pytest.fixture(params=FAMILIES)
def spec(request: pytest.FixtureRequest) -> ModelSpec:
    return spec_of(request.param)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def edited(spec: ModelSpec, **headers: tuple[str, tuple[int, ...]] | None) -> ModelSpec:
    return dataclasses.replace(spec, store=Edited(spec.store, headers))


def check(spec: ModelSpec, **headers: tuple[str, tuple[int, ...]] | None) -> list[str]:
    notes: list[str] = []
    check_tensors(edited(spec, **headers), notes.append)
    return notes


def refusal(spec: ModelSpec, **headers: tuple[str, tuple[int, ...]] | None) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        check(spec, **headers)
    assert caught.value.found
    assert caught.value.expected
    assert caught.value.fix
    return caught.value


def test_golden_checkpoints_are_whole(spec: ModelSpec) -> None:
    assert check(spec) == []


# --- quantised ---------------------------------------------------------------------------------

OTHERS = ("int64", "int32", "int8", "uint8", "bool", "complex64", "float8_e4m3fn", "float8_e5m2")
ENDINGS = (
    *("weight_scale", "weight_scale_inv", "input_scale", "SCB", "weight_format", "qweight"),
    *("qzeros", "scales", "g_idx", "weight.absmax", "weight.quant_map", "weight.nested_absmax"),
    *("weight.quant_state.bitsandbytes__nf4", "weight_packed", "weight_zero_point", "k_scale"),
)


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("place", range(3), ids=["decoder", "tower", "projector"])
def test_what_quantisers_store_beside_a_weight(ending: str, place: int) -> None:
    for family in FAMILIES:
        name = f"{MODULES[family][place]}.{ending}"
        error = refusal(spec_of(family), **{name: ("float16", (1,))})
        assert isinstance(error, UnsupportedModelError)
        assert error.summary == "The checkpoint's weights are quantised already."
        assert f"the tensor {name}" in error.found
        assert "--weights int8 or int4" in error.fix


def test_a_packed_weight_in_the_place_of_a_weight() -> None:
    """The cause is told, not that the weight is missing."""
    for family in FAMILIES:
        module = MODULES[family][0]
        error = refusal(
            spec_of(family),
            **{f"{module}.weight": None, f"{module}.qweight": ("int32", (4, 4))},
        )
        assert "gptq or awq" in error.found


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(FAMILIES), st.sampled_from(OTHERS), st.data())
def test_weights_are_of_floating_dtypes(family: str, dtype: str, data: st.DataObject) -> None:
    """Any tensor that is read, of any family, in any other dtype."""
    spec = spec_of(family)
    name = data.draw(st.sampled_from(read_by(spec)))
    shape = spec.store.info(name).shape
    error = refusal(spec, **{name: (dtype, shape)})
    assert dtype in error.found
    assert name in str(error)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_floating_dtypes(spec: ModelSpec, dtype: str) -> None:
    headers = {name: (dtype, spec.store.info(name).shape) for name in read_by(spec)}
    assert check(spec, **headers) == []


# --- not read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(3), ids=["decoder", "tower", "projector"])
@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("lora_A.weight", "an adapter that is not merged"),
        ("lora_B.default.weight", "an adapter that is not merged"),
        ("base_layer.weight", "an adapter that is not merged"),
        ("modules_to_save.default.weight", "an adapter that is not merged"),
        ("original_module.weight", "an adapter that is not merged"),
        ("weight_g", "stored in two factors"),
        ("weight_v", "stored in two factors"),
        ("parametrizations.weight.original0", "stored in two factors"),
        ("gate.weight", "would not be used"),
        ("ls1.gamma", "would not be used"),
    ],
)
def test_what_would_change_a_weight(place: int, ending: str, words: str) -> None:
    for family in FAMILIES:
        name = f"{MODULES[family][place]}.{ending}"
        error = refusal(spec_of(family), **{name: ("float32", (4,))})
        assert words in error.summary
        assert name in error.found


def test_biases_that_the_configuration_denies(family: str) -> None:
    name = f"{MODULES[family][0]}.bias"
    error = refusal(spec_of(family), **{name: ("float32", (4,)), "lm_head.bias": ("float32", (4,))})
    assert name in error.found
    assert "biases" in error.fix


def renumbered(name: str, number: int) -> str:
    head, _, tail = name.partition(".0.")
    return f"{head}.{number}.{tail}"


@pytest.mark.parametrize("place", range(2), ids=["decoder", "tower"])
def test_layers_that_the_configuration_does_not_tell_of(family: str, place: int) -> None:
    """A `num_hidden_layers` below what is stored would cut the model short."""
    spec, prefix = spec_of(family), MODULES[family][place].partition(".0.")[0]
    if ".0." not in MODULES[family][place]:
        prefix = MODULES[family][place].partition(".1.")[0]
    layer = next(n for n in spec.store.names() if n.startswith(f"{prefix}.0."))
    error = refusal(spec, **{renumbered(layer, 7): ("float32", (4,))})
    assert renumbered(layer, 7) in error.found
    assert "numbers of layers" in error.fix


@pytest.mark.parametrize("name", ["rotary_emb.inv_freq", "position_ids"])
def test_what_cannot_matter(family: str, name: str) -> None:
    for place in MODULES[family]:
        assert check(spec_of(family), **{f"{place}.{name}": ("int64", (1, 4))}) == []


def test_a_module_of_its_own_is_told(spec: ModelSpec) -> None:
    (note,) = check(spec, **{"score.weight": ("float32", (1, 4)), "v_head.bias": ("int8", (4,))})
    assert note.startswith("warning: 2 tensors (score.weight, v_head.bias) of the checkpoint")


# --- missing, or of another shape --------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(FAMILIES), st.data())
def test_missing_tensors_and_other_shapes(family: str, data: st.DataObject) -> None:
    spec = spec_of(family)
    name = data.draw(st.sampled_from(read_by(spec)))
    info = spec.store.info(name)
    axis = data.draw(st.integers(0, len(info.shape) - 1))
    size = info.shape[axis] + data.draw(st.sampled_from((-1, 1, 128)))
    shape = (*info.shape[:axis], size, *info.shape[axis + 1 :])
    error = refusal(spec, **{name: (info.dtype, shape)})
    assert isinstance(error, TensorError)
    assert str(shape) in error.found
    assert f"No tensor {name}" in refusal(spec, **{name: None}).summary


def test_nothing_is_read_or_traced(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Edited.read` would fail; nor is a parameter's memory taken."""
    made: list[torch.device] = []
    real = torch.nn.Parameter

    def watched(data: Tensor, *rest: bool) -> torch.nn.Parameter:
        made.append(data.device)
        return real(data, *rest)

    monkeypatch.setattr(torch.nn, "Parameter", watched)
    assert check(spec) == []
    assert {device.type for device in made} == {"meta"}
