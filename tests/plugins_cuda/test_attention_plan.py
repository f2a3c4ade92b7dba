"""What is launched, chosen from numbers alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlmforge_plugins.cached_attention.config import TARGETS, Config, Target, sizes
from vlmforge_plugins.cached_attention.launcher import (
    Boxes,
    Params,
    Rows,
    Scales,
    Tensors,
    parameters,
)
from vlmforge_plugins.cached_attention.plan import (
    Launch,
    Machine,
    Shape,
    max_workspace,
    plan,
    split_keys,
)
from vlmforge_plugins.errors import PluginError, UnsupportedError

CONFIG = Config(128, "float16", "float16")
SM_80, SM_90 = (next(t for t in TARGETS if t.name == name) for name in ("sm_80", "sm_90"))
H200 = Machine(132, 227 << 10)
SHAPE = Shape(
    batch=4, max_query=1, max_total=4096, heads=32, kv_heads=8, page_size=64, max_pages=64
)

shapes = st.builds(
    lambda batch, new, past, kv_heads, group, page: Shape(
        batch, new, past + new, kv_heads * group, kv_heads, page, -(-(past + new) // page)
    ),
    st.integers(1, 300),
    st.sampled_from([1, 1, 2, 64, 989]),
    st.integers(0, 40000),
    st.sampled_from([1, 2, 8, 32]),
    st.sampled_from([1, 4, 7, 20]),
    st.sampled_from([16, 32, 64, 128]),
)
all_sizes = st.builds(
    lambda config, target: sizes(config, target),
    st.builds(
        Config, st.sampled_from([64, 80, 96, 104, 128]), st.just("float16"), st.just("float16")
    ),
    st.sampled_from([SM_80, SM_90]),
)


def test_a_decode_call_in_full() -> None:
    chosen = plan(SHAPE, sizes(CONFIG, SM_90), H200)
    write, decode = chosen.launches
    assert write.kernel == "vf_write"
    assert write.grid == (1, 1, 4)  # 2 * 8 heads * 16 items / 256 threads
    assert decode.kernel == "vf_decode"
    assert decode.grid == (chosen.splits, 8, 4)
    unfused = plan(SHAPE, replace(sizes(CONFIG, SM_90), fused=False), H200)
    assert unfused.launches[2].grid == (8, 1, 4)
    assert chosen.splits > 1


def test_a_prefill_call_in_full() -> None:
    shape = replace(SHAPE, max_query=1000)
    for target, grid in ((SM_80, (16 * 32, 1, 4)), (SM_90, (132, 1, 1))):
        chosen = plan(shape, sizes(CONFIG, target), H200)
        assert [launch.kernel for launch in chosen.launches] == ["vf_write", "vf_prefill"]
        assert chosen.launches[1].grid == grid
        assert (chosen.splits, chosen.workspace.counters) == (1, 1)
    few = replace(shape, batch=1, max_query=129)
    assert plan(few, sizes(CONFIG, SM_90), H200).launches[1].grid == (2 * 32, 1, 1)


def test_a_full_machine_needs_no_splits() -> None:
    busy = replace(SHAPE, batch=256, kv_heads=32)
    assert plan(busy, sizes(CONFIG, SM_90), H200).splits == 1


def test_many_short_rows_take_narrow_blocks() -> None:
    hopper, short = sizes(CONFIG, SM_90), replace(SHAPE, batch=64, max_total=513)
    taken = plan(short, hopper, H200)
    shared = 4 * 3 * (2 * 16 * 256 + 8)  # warps, stages: a strip of keys, of values, a barrier
    shared += 16 * (128 + 20) * 2  # and rotated queries
    assert taken.launches[1] == Launch("vf_decode_narrow", (1, 8, 64), 128, shared, overlaps=True)
    assert taken.workspace == plan(short, replace(hopper, narrow_warps=8), H200).workspace
    for other in (replace(short, batch=4), replace(short, max_total=2048)):
        assert plan(other, hopper, H200).launches[1].kernel == "vf_decode"
    assert plan(short, sizes(CONFIG, SM_80), H200).launches[1].kernel == "vf_decode"


def test_decode_starts_early_where_the_gpu_can() -> None:
    def overlaps(shape: Shape, target: Target) -> list[bool]:
        return [launch.overlaps for launch in plan(shape, sizes(CONFIG, target), H200).launches]

    assert overlaps(SHAPE, SM_90) == [True, True]
    assert overlaps(replace(SHAPE, max_query=64), SM_90) == [True, True]
    assert not any(overlaps(SHAPE, SM_80))


def test_only_prefill_keeps_rotated_queries() -> None:
    for rotary in (True, False):
        shape = replace(SHAPE, rotary=rotary, batch=256)
        chosen = plan(shape, sizes(CONFIG, SM_90), H200)
        assert (chosen.splits, chosen.workspace.size) == (1, 0)  # decode rotates its own
        chosen = plan(replace(shape, max_query=64), sizes(CONFIG, SM_90), H200)
        rotated = chosen.workspace.partial_out - chosen.workspace.rotated
        assert rotated == (2 * 256 * 64 * 32 * 128 if rotary else 0)


@given(shapes, all_sizes)
def test_splits_cover_every_key_once(shape: Shape, chosen: object) -> None:
    made = plan(shape, chosen, H200)  # type: ignore[arg-type]
    assert made.splits >= 1
    for total in {1, shape.max_total // 3 + 1, shape.max_total}:
        keys = split_keys(total, made.splits)
        assert keys % 64 == 0
        assert keys * made.splits >= total


@given(shapes, all_sizes)
def test_scratch_is_aligned_apart_and_large_enough(shape: Shape, chosen: object) -> None:
    made = plan(shape, chosen, H200)  # type: ignore[arg-type]
    scratch, d = made.workspace, made.head_size
    assert scratch.partial_out % 256 == scratch.partial_lse % 256 == scratch.size % 256 == 0
    if shape.max_query > 1:
        assert scratch.partial_out >= 2 * shape.batch * shape.max_query * shape.heads * d
    slots = shape.batch * shape.heads * made.splits if made.splits > 1 else 0
    assert scratch.partial_lse - scratch.partial_out >= 4 * slots * d
    assert scratch.arrivals - scratch.partial_lse >= 4 * slots
    tiles = shape.batch * shape.kv_heads * -(-shape.heads // shape.kv_heads // 16)
    assert scratch.size - scratch.arrivals >= (4 * tiles if made.splits > 1 else 0)


@given(shapes, all_sizes, st.data())
def test_the_largest_call_is_the_largest(shape: Shape, chosen: object, data: st.DataObject) -> None:
    """An engine allocates once: no smaller batch or shorter context may need more."""
    limit = max_workspace(shape, chosen, H200)  # type: ignore[arg-type]
    batch = data.draw(st.integers(1, shape.batch))
    new = data.draw(st.sampled_from([1, shape.max_query]))
    total = data.draw(st.integers(new, shape.max_total))
    smaller = replace(shape, batch=batch, max_query=new, max_total=total)
    assert plan(smaller, chosen, H200).workspace.size <= limit  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch": 0}, "A dimension of the call is empty."),
        ({"heads": 30}, "Query heads do not divide evenly among key heads."),
        ({"page_size": 48}, "The kernels do not cover this page size."),
        ({"max_total": 5000}, "The longest row does not fit its pages."),
        ({"max_query": 5000}, "The longest row does not fit its pages."),
        ({"positions": 4095}, "The rotary tables are too short."),
        ({"batch": 70000}, "The call is larger than a grid."),
    ],
)
def test_shapes_that_kernels_would_misread(change: dict[str, int], words: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        plan(replace(SHAPE, **change), sizes(CONFIG, SM_90), H200)  # type: ignore[arg-type]
    assert caught.value.summary == words
    assert caught.value.found and caught.value.expected and caught.value.fix
    assert "\n  found:" in str(caught.value) and "\n  fix:" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (Config(72, "float16", "float16"), "72"),
        (Config(128, "float32", "float32"), "float32"),  # type: ignore[arg-type]
        (Config(128, "float16", "bfloat16"), "a cache in bfloat16 under activations in float16"),
    ],
)
def test_configurations_without_kernels(config: Config, found: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        config.check()
    assert found in caught.value.found
    assert caught.value.expected and caught.value.fix


def test_an_fp8_cache_needs_hardware_for_it() -> None:
    fp8 = Config(128, "float16", "float8_e4m3fn")
    fp8.check_target(SM_90)
    with pytest.raises(UnsupportedError, match="fp8") as caught:
        fp8.check_target(SM_80)
    assert caught.value.found == "compute capability 8.0 (sm_80)"
    assert caught.value.fix == "keep the KV cache in float16 for this GPU"


def test_errors_are_values_and_plugin_errors() -> None:
    assert issubclass(UnsupportedError, ValueError) and issubclass(UnsupportedError, PluginError)
    assert str(PluginError("It broke.", found="x")) == "It broke.\n  found:    x"


class NoKernels:
    """Writes down what tile maps are asked for."""

    def __init__(self) -> None:
        self.asked: list[Boxes] = []

    def tile_map(self, boxes: Boxes) -> bytes:
        self.asked.append(boxes)
        return bytes([len(self.asked)]) * 128

    def launch(self, launch: Launch, params: Params, stream: int) -> None:
        raise NotImplementedError


def test_prefill_on_hopper_gets_its_tile_maps() -> None:
    tensors = Tensors(*[Rows(16, 1, 1)] * 4, 512, 1024, 9, 0, 0, 70, 0, 80, workspace=1 << 20)
    for target, query, asked in ((SM_90, 100, 2), (SM_90, 1, 0), (SM_80, 100, 0)):
        kernels = NoKernels()
        chosen = plan(replace(SHAPE, max_query=query), sizes(CONFIG, target), H200)
        params = parameters(chosen, tensors, Scales(1.0), kernels)
        rows = 9 * SHAPE.kv_heads * SHAPE.page_size
        boxes = [Boxes(512, rows, 128, SHAPE.page_size), Boxes(1024, rows, 128, SHAPE.page_size)]
        assert kernels.asked == boxes[:asked]
        assert (params.key_map[127], params.value_map[0]) == ((1, 2) if asked else (0, 0))


def test_parameters_of_a_call() -> None:
    chosen = plan(SHAPE, sizes(CONFIG, SM_90), H200)
    rows = [Rows(4096 * i, 10 * i, i) for i in (1, 2, 3, 4)]
    tensors = Tensors(*rows, 50, 60, 9, 0, 0, 70, 0, 80, workspace=1 << 20)
    params = parameters(chosen, tensors, Scales(0.125, key=0.5, value=0.25), NoKernels())
    assert (params.query, params.key_batch, params.value_row, params.out) == (4096, 20, 3, 16384)
    assert params.cos is None and params.query_lengths is None  # absent, not address 0
    assert params.page_shift == 6
    assert params.splits == chosen.splits
    assert params.partial_lse == (1 << 20) + chosen.workspace.partial_lse
    assert params.scale_log2 == pytest.approx(0.125 * 0.5 * 1.4426950408889634)
    assert (params.key_inverse_scale, params.value_scale) == (2.0, 0.25)
