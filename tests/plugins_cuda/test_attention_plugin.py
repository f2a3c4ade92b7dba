"""The plugin's own decisions, with a stand-in for the library: what it accepts and launches.

That the real library takes it is shown by `tests/builder/test_tensorrt_builds.py`.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vlmforge_plugins.cached_attention.compile import Binary
from vlmforge_plugins.cached_attention.config import (
    TARGETS,
    Config,
    Target,
    sizes,
    targets,
)
from vlmforge_plugins.cached_attention.kernel_store import KernelStore, Loaded, choose_target
from vlmforge_plugins.cached_attention.launcher import Boxes, Params, Scales
from vlmforge_plugins.cached_attention.plan import Launch, Machine, plan
from vlmforge_plugins.cached_attention.plugin import (
    OPS,
    Attributes,
    _Plugin,
    register,
)
from vlmforge_plugins.errors import UnsupportedError

TYPES = SimpleNamespace(HALF="half", BF16="bf16", FP8="fp8", INT32="int32", FLOAT="float")
TRT = SimpleNamespace(
    DataType=TYPES,
    TensorFormat=SimpleNamespace(LINEAR="linear"),
    PluginFieldType=SimpleNamespace(INT32=1, FLOAT32=2, INT8=3),
    PluginField=lambda name, data, kind: SimpleNamespace(name=name, data=data, type=kind),
    PluginFieldCollection=list,
)
HALF = Config(64, "float16", "float16")
BINARIES = tuple(Binary(target, target.name.encode(), "") for target in targets(HALF))
SCALES = Scales(0.125, 0.5, 2.0)
H200 = Machine(132, 227 << 10)


def made(op: str = "PagedAttention", *, holds_kernels: bool = True) -> Any:
    store = KernelStore({HALF: BINARIES})
    return _Plugin(TRT, op, Attributes(8, 2, SCALES, holds_kernels), store)


def described(op: str, batch: int = 3, rows: int = 5, pages: int = 4) -> list[Any]:
    """Inputs and outputs of a call with heads of 64, pages of 32 and 256 positions."""

    def tensor(kind: str, *dims: int) -> Any:
        return SimpleNamespace(type=kind, dims=dims, format="linear")

    qkv, out = tensor("half", batch, rows, 768), tensor("half", batch, rows, 512)
    pool = tensor("half", 40, 2, 32, 64)
    lengths, table = tensor("int32", batch), tensor("int32", batch, pages)
    tables = [tensor("float", 256, 32)] * 2 if OPS[op] else []
    return [qkv, pool, pool, lengths, lengths, table, *tables, out, pool, pool]


def accepts(op: str, tensors: list[Any], position: int) -> bool:
    wrapped = [SimpleNamespace(desc=tensor) for tensor in tensors]
    return bool(made(op).supports_format_combination(position, wrapped, len(tensors) - 3))


@pytest.mark.parametrize("op", OPS)
def test_the_types_that_it_accepts(op: str) -> None:
    tensors = described(op)
    assert all(accepts(op, tensors, position) for position in range(len(tensors)))
    for position, kind in itertools.product(range(len(tensors)), vars(TYPES).values()):
        changed = [SimpleNamespace(**vars(tensor)) for tensor in tensors]
        changed[position].type = kind
        # Queries may be of both 16-bit types and key pools of fp8 besides; all else follows them.
        free = {0: ("half", "bf16"), 1: ("half", "fp8")}.get(position, (tensors[position].type,))
        assert accepts(op, changed, position) == (kind in free), (position, kind)
    tensors[1].format = "chw4"
    assert not accepts(op, tensors, 1)


def test_the_pools_are_written_in_place() -> None:
    assert [made().get_aliased_input(output) for output in range(3)] == [-1, 1, 2]


@pytest.mark.parametrize("op", OPS)
def test_the_workspace_suffices_for_every_smaller_call(op: str) -> None:
    largest = [
        SimpleNamespace(desc=t, max=t.dims) for t in described(op, batch=4, rows=40, pages=6)
    ]
    asked = made(op).get_workspace_size(largest, [])
    for target, machine, (batch, rows, pages) in itertools.product(
        TARGETS, (H200, Machine(16, 99 << 10)), ((4, 40, 6), (4, 1, 6), (1, 1, 6), (2, 7, 1))
    ):
        shape = made(op)._shape([t.dims for t in described(op, batch, rows, pages)])
        assert plan(shape, sizes(HALF, target), machine).workspace.size <= asked


def serialized(plugin: Any) -> dict[str, Any]:
    """The fields that the plan keeps of a plugin, as the library passes through a build."""
    plugin.configure_plugin([SimpleNamespace(desc=t) for t in described("PagedAttention")], [])
    fields = plugin.clone().get_fields_to_serialize()
    assert all(isinstance(field.data, np.ndarray) for field in fields)
    return {field.name: field.data for field in fields}


def test_the_first_node_carries_the_kernels_of_all() -> None:
    fields = serialized(made())
    assert (fields["num_heads"][0], fields["kv_num_heads"][0]) == (8, 2)
    scales = [fields[name].tolist() for name in ("scale", "key_scale", "value_scale")]
    assert scales == [[0.125], [0.5], [2.0]]
    carried = {n.removeprefix("binary."): d for n, d in fields.items() if n.startswith("binary.")}
    assert {n: d.tobytes() for n, d in carried.items()} == {
        target.name: target.name.encode() for target in targets(HALF)
    }
    others = serialized(made(holds_kernels=False))
    assert others["kernels"].tobytes() == fields["kernels"].tobytes()
    assert not any(name.startswith("binary.") for name in others)


class Registry:
    """Stands in for the library's: keeps the creators."""

    def __init__(self) -> None:
        self.creators: dict[str, Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> None:
        assert namespace == "vlmforge"
        self.creators[creator.name] = creator


def test_a_loaded_plan_shares_the_kernels_of_its_first_node() -> None:
    registry, bases = Registry(), ("", "OneCore", "OneBuildV2", "OneRuntime")
    interfaces = {f"IPluginV3{base}": type(f"Base{base}", (), {}) for base in bases}
    library = SimpleNamespace(
        **vars(TRT),
        **interfaces,
        IPluginCreatorV3One=type("Creator", (), {}),
        get_plugin_registry=lambda: registry,
    )
    kept = register(library, {})
    plan = [serialized(made(holds_kernels=first)) for first in (True, False)]
    create = registry.creators["PagedAttention"].create_plugin
    first, second = (
        create("node", [SimpleNamespace(name=n, data=d) for n, d in fields.items()], "runtime")
        for fields in plan
    )
    assert len(kept) == 2
    assert first._store is second._store
    names = {target.name: target.name.encode() for target in targets(HALF)}
    assert second._store.binaries(second._key) == names
    assert second._attributes == Attributes(8, 2, SCALES, holds_kernels=False)


def test_kernels_are_told_apart_by_their_contents() -> None:
    store = KernelStore({})
    keys = {
        store.add(binaries)
        for binaries in (
            {"sm_80": b"a", "sm_90": b"b"},
            {"sm_90": b"b", "sm_80": b"a"},
            {"sm_80": b"b", "sm_90": b"a"},
            {"sm_80": b"ab"},
        )
    }
    assert len(keys) == 3


def test_head_sizes_without_kernels_are_refused_at_the_build() -> None:
    tensors = described("PagedAttention")
    for tensor in tensors[1:3]:
        tensor.dims = (40, 2, 32, 72)
    with pytest.raises(UnsupportedError) as caught:
        made().configure_plugin([SimpleNamespace(desc=t) for t in tensors], [])
    assert caught.value.found == "head size 72"
    assert "--attention native" in caught.value.fix


class Recorder:
    """Kernels that note what they are launched with."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, Params, int]] = []
        self.pools: list[Boxes] = []

    def tile_map(self, boxes: Boxes) -> bytes:
        self.pools.append(boxes)
        return bytes(128)

    def launch(self, launch: Launch, params: Params, stream: int) -> None:
        self.launches.append((launch.kernel, params, stream))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("target", [TARGETS[0], TARGETS[3]], ids=lambda target: target.name)
def test_enqueue_launches_the_plan(op: str, rows: int, target: Target) -> None:
    plugin, tensors = made(op), described(op, rows=rows)
    recorder = Recorder()
    plugin._loaded = Loaded(recorder, sizes(HALF, target), H200)
    shape = plugin._shape([tensor.dims for tensor in tensors])
    plugin._planned = plan(shape, sizes(HALF, target), H200)
    addresses = [4096 * (i + 1) for i in range(len(tensors))]
    inputs, outputs = addresses[:-3], addresses[-3:]
    plugin.enqueue(tensors[:-3], tensors[-3:], inputs, outputs, 1 << 20, 77)
    kernels = [name for name, _, _ in recorder.launches]
    assert kernels == [launch.kernel for launch in plugin._planned.launches]
    assert kernels[0] == "vf_write"
    assert ("vf_decode" in kernels) == (rows == 1)
    pages, kv_heads, page_size, head_size = tensors[1].dims
    described_as = [Boxes(at, pages * kv_heads * page_size, head_size, page_size) for at in inputs]
    assert recorder.pools == (described_as[1:3] if plugin._planned.tiled else [])
    assert plugin._planned.tiled == (rows > 1 and target.name == "sm_90")
    _, params, stream = recorder.launches[-1]
    assert stream == 77
    starts = [address - inputs[0] for address in (params.query, params.key, params.value)]
    assert starts == [0, 2 * 512, 2 * (512 + 128)]  # in bytes: eight heads, then two, of 64
    assert [params.key_pool, params.value_pool] == inputs[1:3]
    lengths = [params.past_lengths, params.query_lengths, params.block_table]
    assert lengths == inputs[3:6]
    assert [params.cos, params.sin] == (inputs[6:] if OPS[op] else [None, None])
    assert params.out == outputs[0]
    assert (params.query_row, params.key_row, params.out_row) == (768, 768, 512)
    assert (params.query_batch, params.key_batch) == (rows * 768, rows * 768)
    assert (params.batch, params.max_query, params.heads, params.kv_heads) == (3, rows, 8, 2)
    assert (params.max_pages, 1 << params.page_shift) == (4, 32)


@pytest.mark.parametrize(
    ("capability", "chosen"),
    [
        (80, "sm_80"),
        (86, "sm_86"),
        (87, "sm_86"),
        (89, "sm_89"),
        (90, "sm_90"),
        (100, "ptx"),
        (120, "sm_120"),
        (121, "sm_120"),
    ],
)
def test_whose_kernels_run_where(capability: int, chosen: str) -> None:
    available = [*(target.name for target in TARGETS), "ptx"]
    assert choose_target(HALF, available, capability).name == chosen


def test_a_gpu_without_kernels() -> None:
    for capability, available in ((75, ["sm_80", "ptx"]), (90, ["sm_80"]), (90, [])):
        with pytest.raises(UnsupportedError) as caught:
            choose_target(HALF, available, capability)
        assert caught.value.found == f"compute capability {capability / 10:.1f}"
