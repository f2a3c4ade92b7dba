"""Every kernel against float64: on the GPU if there is one, else the host build."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from attention_backends import (
    Backend,
    HostBackend,
    HostKernels,
    cuda_backend,
    host_library,
)
from attention_cases import KINDS, TYPES, Batch, Case, covering, grid, make, verify
from vlmforge_plugins.cached_attention import plan as planning
from vlmforge_plugins.cached_attention.compile import SOURCES, Nvrtc, compile_one
from vlmforge_plugins.cached_attention.config import (
    HEAD_SIZES,
    TARGETS,
    Config,
    Sizes,
    Target,
    sizes,
)
from vlmforge_plugins.cached_attention.launcher import Params
from vlmforge_plugins.cached_attention.plan import Launch, Shape, plan, split_keys

COVERING = covering(2)
SM_90 = next(target for target in TARGETS if target.name == "sm_90")
# Several pages and tiles, all formats, both families of prefill, more heads than a tile has rows;
# of kernels that COVERING has compiled too.
VARIED = (
    Case("decode", "float16", "float16", 128, 4, 989, 16),
    Case("decode", "bfloat16", "float8_e4m3fn", 104, 20, 989, 64),
    Case("chunk", "float16", "float16", 128, 4, 989, 32),
    Case("chunk", "bfloat16", "bfloat16", 64, 7, 989, 128),
    Case("prefill", "bfloat16", "float8_e4m3fn", 96, 4, 65, 16),
    Case("chunk", "float16", "float8_e4m3fn", 80, 4, 989, 16),  # Hopper's: tiles are widened
)


@pytest.fixture(scope="session")
def backend(shared: Path) -> Backend:
    """The GPU if there is one."""

    def find(chosen: Sizes, target: Target) -> bytes:
        return compile_one(chosen.config, target, Nvrtc(), shared / "kernels").code

    return cuda_backend(find) or HostBackend()


@pytest.mark.parametrize("case", COVERING, ids=lambda case: case.name)
def test_kernels(case: Case, backend: Backend) -> None:
    batch = make(case)
    verify(batch, backend.run(batch))


@pytest.mark.nightly
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("types", TYPES, ids="-".join)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_whole_grid(
    kind: str, types: tuple[str, str], head_size: int, backend: Backend
) -> None:
    failures = []
    for case in grid():
        if (case.kind, case.activation, case.stored, case.head_size) == (kind, *types, head_size):
            batch = make(case)
            try:
                verify(batch, backend.run(batch))
            except AssertionError as error:
                failures.append(f"{case.name}: {error}")
    assert failures == []


def test_pairs_of_all_axes_are_covered() -> None:
    """Nothing that acceptance names is missing from the subset, nor any two of them together."""
    rows = [
        (c.kind, c.activation + c.stored, c.head_size, c.group, c.length, c.page_size)
        for c in COVERING
    ]
    whole = [
        (c.kind, c.activation + c.stored, c.head_size, c.group, c.length, c.page_size)
        for c in grid()
    ]
    for i in range(6):
        for j in range(i):
            assert {(r[i], r[j]) for r in rows} == {(r[i], r[j]) for r in whole}


@pytest.mark.parametrize("case", VARIED, ids=lambda case: case.name)
def test_the_order_in_which_threads_run_changes_nothing(case: Case) -> None:
    batch = make(case)
    outputs = [HostBackend(direction).run(batch) for direction in (1, -1)]
    for name in ("out", "key_pool", "value_pool"):
        assert (outputs[0][name] == outputs[1][name]).all()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("splits", [1, 2, 5, 64])
@pytest.mark.parametrize("case", [VARIED[0], VARIED[1]], ids=lambda case: case.name)
def test_any_number_of_splits_gives_the_same_attention(
    case: Case, splits: int, fused: bool
) -> None:
    """Also more than the shorter rows have keys for, as under a captured graph."""
    batch = make(case)
    compiled = replace(sizes(case.config, case.target), fused=fused)
    chosen = plan(batch.shape, compiled, HostBackend.machine)
    split = replace(
        chosen,
        splits=splits,
        launches=(chosen.launches[0], *planning._decode(batch.shape, compiled, splits)),
        workspace=planning.workspace(batch.shape, case.head_size, splits),
    )
    verify(batch, HostBackend().run_plan(batch, split, HostKernels(compiled)))


@pytest.mark.parametrize("new", [1, 64, 65, 130, 300])
@pytest.mark.parametrize("past", [0, 100, 500])
def test_both_groups_of_a_hopper_block_come_to_their_end(past: int, new: int) -> None:
    """Whether one has a tile less to do than the other, or nothing: nobody waits for ever."""
    cases = (Case("chunk", "float16", "float16", 64, group, 989, 64) for group in (1, 4, 7, 8))
    case = next(case for case in cases if not case.packed)
    batch = make(case)
    total = past + new
    shape = replace(batch.shape, batch=1, max_query=new, max_total=total, max_pages=16)
    batch = hopper_batch(batch, shape, past)
    compiled = sizes(case.config, SM_90)
    chosen = plan(shape, compiled, HostBackend.machine)
    for direction in (1, -1):
        after = HostBackend().run_plan(batch, chosen, HostKernels(compiled, direction))
        verify(batch, after)


def hopper_batch(batch: Batch, shape: Shape, past: int) -> Batch:
    """One row with this shape, in place of those of `batch`."""
    random = np.random.default_rng(past)
    d, new = batch.case.head_size, shape.max_query
    table = random.permutation(shape.max_pages).astype(np.int32)[None]
    pool = (shape.max_pages, shape.kv_heads, shape.page_size, d)
    made = replace(batch, shape=shape, arrays=dict(batch.arrays), offsets={}, strides={})
    made.arrays.pop("packed", None)
    for name, heads in (("query", shape.heads), ("key", shape.kv_heads), ("value", shape.kv_heads)):
        drawn = random.standard_normal((1, new, heads * d)).astype(np.float16)
        made.arrays[name] = drawn.view(np.uint16)
        made.strides[name] = (new * heads * d, heads * d)
    made.strides["out"] = made.strides["query"]
    made.arrays["out"] = np.full((1, new, shape.heads * d), 0xFFFF, np.uint16)
    for name in ("key_pool", "value_pool"):
        made.arrays[name] = random.standard_normal(pool).astype(np.float16).view(np.uint16)
    made.arrays["block_table"] = table
    made.arrays["past_lengths"] = np.array([past], np.int32)
    made.arrays["query_lengths"] = np.array([new], np.int32)
    return made


class WithoutLengths(HostKernels):
    """Launches with a null pointer for the rows' lengths."""

    def launch(self, launch: Launch, params: Params, stream: int) -> None:
        params.query_lengths = None
        super().launch(launch, params, stream)


def test_without_lengths_every_row_has_all_its_tokens() -> None:
    batch = make(Case("prefill", "float16", "float16", 64, 4, 65, 16))
    row = int(np.argmax(batch.new))  # its pages have room for the padding as well
    batch.shape = replace(batch.shape, batch=1)
    for name in batch.arrays.keys() - {"key_pool", "value_pool", "cos", "sin"}:
        batch.arrays[name] = batch.arrays[name][row : row + 1].copy()
    batch.arrays["query_lengths"][0] = batch.shape.max_query
    for name in batch.arrays.keys() & {"packed", "query", "key", "value"}:
        batch.arrays[name][batch.arrays[name] == 0xFFFF] = 0
    compiled = sizes(batch.case.config, batch.case.target)
    chosen = plan(batch.shape, compiled, HostBackend.machine)
    with_lengths = HostBackend().run_plan(batch, chosen, HostKernels(compiled))
    without = HostBackend().run_plan(batch, chosen, WithoutLengths(compiled))
    assert not (without["out"] == 0xFFFF).any()
    assert (without["out"] == with_lengths["out"]).all()


@pytest.mark.parametrize(
    ("name", "damage"),
    [("out", "missing"), ("key_pool", "off by"), ("value_pool", "something beside")],
)
def test_the_verdict_sees_damage(name: str, damage: str) -> None:
    case = VARIED[0]
    batch = make(case)
    after = HostBackend().run(batch)
    row = int(np.argmax(batch.new))
    if name == "out":
        after[name][row, 0, 3] = 0xFFFF
    elif name == "key_pool":
        position = int(batch.past[row])
        page = batch.arrays["block_table"][row, position // case.page_size]
        after[name][page, 0, position % case.page_size, 0] ^= 0x0200
    else:
        untouched = batch.arrays["block_table"][batch.new > 0]
        free = set(range(len(after[name]))) - set(untouched.ravel().tolist())
        after[name][free.pop(), 0, 0, 0] = 0
    with pytest.raises(AssertionError, match=damage):
        verify(batch, after)


def test_the_verdict_sees_a_wrong_output() -> None:
    batch = make(VARIED[2])
    after = HostBackend().run(batch)
    row = int(np.argmax(batch.new))
    after["out"][row, :, 7] = after["out"][row, :, 8]
    with pytest.raises(AssertionError, match="naively"):
        verify(batch, after)


NEWEST = "if (key + kStripKeys >= total) wait_for_previous_kernel();"
BEFORE_RESULTS = "    wait_for_previous_kernel();\n"
COMBINED = "block.combine(splits.count);\n"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({NEWEST: ""}, "not finite"),
        ({BEFORE_RESULTS: ""}, "did not wait"),
        ({BEFORE_RESULTS: "", COMBINED: COMBINED + BEFORE_RESULTS}, "not finite"),
    ],
    ids=["the newest token", "the results", "behind the results"],
)
@pytest.mark.parametrize("length", [19, 989])
def test_a_wait_that_is_missing_or_late_is_seen(
    changes: dict[str, str], words: str, length: int, tmp_path: Path
) -> None:
    """The host build shows what a kernel reads or writes before the one in front has ended."""
    for path in SOURCES.iterdir():
        text = path.read_text("utf-8")
        if path.name == "decode.cuh":
            for there, instead in changes.items():
                assert text.count(there) == 1
                text = text.replace(there, instead)
        (tmp_path / path.name).write_text(text, "utf-8")
    case = Case("decode", "float16", "float16", 64, 4, length, 16)
    batch, compiled = make(case), sizes(case.config, SM_90)
    chosen = plan(batch.shape, compiled, HostBackend.machine)
    verify(batch, HostBackend().run_plan(batch, chosen, HostKernels(compiled)))
    with pytest.raises(AssertionError, match=words):
        damaged = HostKernels(compiled, sources=tmp_path)
        verify(batch, HostBackend().run_plan(batch, chosen, damaged))


BUILT = sorted({(c.config, c.target) for c in COVERING}, key=str)


@pytest.mark.parametrize(("config", "target"), BUILT, ids=lambda x: x.name)
def test_sizes_are_those_of_the_sources(config: Config, target: Target) -> None:
    chosen = sizes(config, target)
    library = host_library(chosen)
    assert library.vf_shared_bytes(b"vf_decode") == chosen.decode_bytes
    assert library.vf_shared_bytes(b"vf_decode_narrow") == chosen.narrow.decode_bytes
    assert library.vf_shared_bytes(b"vf_prefill") == chosen.prefill_bytes
    assert library.vf_threads(b"vf_decode") == 32 * chosen.decode_warps
    assert library.vf_threads(b"vf_decode_narrow") == 32 * chosen.narrow_warps
    assert library.vf_threads(b"vf_prefill") == chosen.prefill_threads
    assert library.vf_prefill_rows() == chosen.prefill_rows


def test_the_argument_is_mirrored_field_by_field() -> None:
    library: ctypes.CDLL = host_library(sizes(*BUILT[0]))
    assert library.vf_params_size() == ctypes.sizeof(Params)
    names = [name for name, _ in Params._fields_ if not name.startswith("_")]
    assert [library.vf_params_offset(name.encode()) for name in names] == [
        getattr(Params, name).offset for name in names
    ]


def test_splits_are_cut_as_planned() -> None:
    library = host_library(sizes(*BUILT[0]))
    for total in (1, 255, 256, 257, 989, 4097, 32768, 131072):
        for splits in (1, 2, 3, 7, 16, 64):
            keys = split_keys(total, splits)
            assert library.vf_split_keys(total, splits) == keys
            assert library.vf_split_count(total, splits) == -(-total // keys) <= splits
