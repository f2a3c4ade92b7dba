"""The paged attention kernels as a plugin of TensorRT and TensorRT-RTX.

Both libraries have the same interfaces under two names, so the imported module is an argument. A
network's first node carries the compiled kernels as fields of the plan: a machine that runs the
engine compiles nothing. `enqueue` neither allocates nor synchronises nor copies, so that it can be
captured into a CUDA graph; what it knows of lengths on the host are the shapes of its inputs, which
bound them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlmforge_plugins.cached_attention.config import (
    PTX_TARGETS,
    Activation,
    Config,
    Stored,
    sizes,
    targets,
)
from vlmforge_plugins.cached_attention.kernel_store import Compiled, KernelStore, Loaded
from vlmforge_plugins.cached_attention.launcher import Rows, Scales, Tensors, run
from vlmforge_plugins.cached_attention.plan import Machine, Plan, Shape, max_workspace, plan
from vlmforge_plugins.errors import UnsupportedError

NAMESPACE = "vlmforge"
VERSION = "1"
OPS: Mapping[str, bool] = {"PagedAttention": True, "PlainPagedAttention": False}
"""Op type, and whether it rotates query and key by tables that it is given.

The input QKV holds query, key and value of a token one after the other, as one product makes them;
the rows of OUT are those of all sequences one after the other, as the next product takes them.
"""

QKV, KEY_POOL, VALUE_POOL, PAST, QUERY_LENGTHS, TABLE, COS, SIN = range(8)
OUT, KEY_POOL_OUT, VALUE_POOL_OUT = range(3)
_ALIASES = {KEY_POOL_OUT: KEY_POOL, VALUE_POOL_OUT: VALUE_POOL}
_NUMBERS = ("num_heads", "kv_num_heads", "holds_kernels")
_SCALES = ("scale", "key_scale", "value_scale")
_ITEM_BYTES = 2  # of both 16-bit types
_BINARY_FIELD, _KEY_FIELD = "binary.", "kernels"
# Every machine that plans are made for has at most as many; more only ask for less workspace.
_LARGEST_MACHINE = Machine(multiprocessors=192, shared_bytes=227 << 10)


@dataclass(frozen=True)
class Attributes:
    """What a node says of itself; one of a network's holds the kernels for all of them."""

    heads: int
    kv_heads: int
    scales: Scales
    holds_kernels: bool


def register(trt: Any, compiled: Compiled) -> tuple[object, ...]:
    """Register the creators of both ops with the library `trt`.

    Args:
        trt: The imported module `tensorrt` or `tensorrt_rtx`.
        compiled: What the plugins put into plans; empty where plans are only run.

    Returns:
        The creators. The registry does not keep them alive: keep them as long as it is used.
    """
    store = KernelStore(compiled)
    creators = tuple(_creator(trt, op, store) for op in OPS)
    registry = trt.get_plugin_registry()
    for creator in creators:
        registry.register_creator(creator, NAMESPACE)
    return creators


def _creator(trt: Any, op: str, store: KernelStore) -> object:
    plugin = _plugin_class(trt)

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.name, self.plugin_namespace, self.plugin_version = op, NAMESPACE, VERSION
            kinds = dict.fromkeys(_NUMBERS, "INT32") | dict.fromkeys(_SCALES, "FLOAT32")
            # The library keeps their addresses.
            self._empty = np.array([], np.int32)
            self._fields = [
                trt.PluginField(name, self._empty, getattr(trt.PluginFieldType, kind))
                for name, kind in kinds.items()
            ]
            self.field_names = trt.PluginFieldCollection(self._fields)

        def create_plugin(self, name: str, fields: Any, phase: Any) -> object:
            del name, phase
            given = {field.name: np.asarray(field.data) for field in fields}
            heads, kv_heads, holds_kernels = (int(given[name].item()) for name in _NUMBERS)
            scales = Scales(*(float(given[name].item()) for name in _SCALES))
            attributes = Attributes(heads, kv_heads, scales, bool(holds_kernels))
            binaries = {
                key.removeprefix(_BINARY_FIELD): data.tobytes()
                for key, data in given.items()
                if key.startswith(_BINARY_FIELD)
            }
            if binaries:
                store.add(binaries)
            key = given[_KEY_FIELD].tobytes().decode() if _KEY_FIELD in given else ""
            return plugin(trt, op, attributes, store, key)

    return Creator()


def _plugin_class(trt: Any) -> Any:
    """The plugin as a class of the library's: its interfaces, behind our methods."""
    bases = trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuildV2, trt.IPluginV3OneRuntime

    class PagedAttentionPlugin(_Plugin, *bases):  # type: ignore[misc]
        def __init__(self, *arguments: Any) -> None:
            for base in bases:
                base.__init__(self)
            _Plugin.__init__(self, *arguments)

    return PagedAttentionPlugin


class _Plugin:
    """What the library calls; see the module. `key` is that of its kernels in the `store`.

    Without the library's interfaces, so that it is one class for both flavours.
    """

    def __init__(
        self,
        trt: Any,
        op: str,
        attributes: Attributes,
        store: KernelStore,
        key: str = "",
    ) -> None:
        self.plugin_name, self.plugin_namespace, self.plugin_version = op, NAMESPACE, VERSION
        self.num_outputs = 3
        self._trt, self._op, self._attributes = trt, op, attributes
        self._store, self._key = store, key
        self._loaded: Loaded | None = None
        self._planned: Plan | None = None
        self._serialized: tuple[Any, ...] = ()

    def get_capability_interface(self, kind: object) -> object:
        del kind
        return self

    def clone(self) -> object:
        made = type(self)(self._trt, self._op, self._attributes, self._store, self._key)
        made.__dict__.update(self.__dict__)
        return made

    # --- what goes in and comes out ---

    def get_output_data_types(self, types: Sequence[object]) -> list[object]:
        return [types[QKV], types[KEY_POOL], types[VALUE_POOL]]

    def get_output_shapes(self, inputs: Sequence[Any], shapes: object, builder: Any) -> Any:
        del shapes
        batch, rows, _ = inputs[QKV]
        heads, head_size = builder.constant(self._attributes.heads), inputs[KEY_POOL][3]
        width = builder.operation(self._trt.DimensionOperation.PROD, heads, head_size)
        exprs = self._trt.DimsExprs
        flat = builder.operation(self._trt.DimensionOperation.PROD, batch, rows)
        return [exprs([flat, width]), exprs(inputs[KEY_POOL]), exprs(inputs[VALUE_POOL])]

    def get_aliased_input(self, output: int) -> int:
        return _ALIASES.get(output, -1)

    def supports_format_combination(
        self, position: int, tensors: Sequence[Any], inputs: int
    ) -> bool:
        del inputs
        described = [tensor.desc for tensor in tensors]
        if described[position].format != self._trt.TensorFormat.LINEAR:
            return False
        return described[position].type in _allowed(self._trt, position, described, OPS[self._op])

    def configure_plugin(self, inputs: Sequence[Any], outputs: object) -> None:
        del outputs
        config = _config(self._trt, [tensor.desc for tensor in inputs])
        config.check()
        self._key = self._key or self._store.key_of(config)

    def get_workspace_size(self, inputs: Sequence[Any], outputs: object) -> int:
        del outputs
        config = _config(self._trt, [tensor.desc for tensor in inputs])
        largest = self._shape([tuple(tensor.max) for tensor in inputs])
        kinds = (*targets(config), PTX_TARGETS[config.fp8])
        return max(max_workspace(largest, sizes(config, kind), _LARGEST_MACHINE) for kind in kinds)

    def _shape(self, dims: Sequence[tuple[int, ...]]) -> Shape:
        """The call's metadata by its inputs' shapes, which bound all lengths."""
        batch, rows = dims[QKV][:2]
        page_size, pages = dims[KEY_POOL][2], dims[TABLE][1]
        rotary = OPS[self._op]
        limit = pages * page_size
        return Shape(
            batch=batch,
            max_query=rows,
            max_total=min(limit, dims[COS][0]) if rotary else limit,
            heads=self._attributes.heads,
            kv_heads=self._attributes.kv_heads,
            page_size=page_size,
            max_pages=pages,
            rotary=rotary,
            **({"positions": dims[COS][0]} if rotary else {}),
        )

    # --- what the plan keeps ---

    def get_fields_to_serialize(self) -> object:
        attributes, kind = self._attributes, self._trt.PluginFieldType
        scales = (attributes.scales.score, attributes.scales.key, attributes.scales.value)
        numbers = (attributes.heads, attributes.kv_heads, int(attributes.holds_kernels))
        held = self._store.binaries(self._key) if attributes.holds_kernels else {}
        values = [
            *(
                (name, np.array([n], np.int32), kind.INT32)
                for name, n in zip(_NUMBERS, numbers, strict=True)
            ),
            *(
                (name, np.array([scale], np.float32), kind.FLOAT32)
                for name, scale in zip(_SCALES, scales, strict=True)
            ),
            (_KEY_FIELD, np.frombuffer(self._key.encode(), np.int8), kind.INT8),
            *(
                (_BINARY_FIELD + target, np.frombuffer(code, np.int8), kind.INT8)
                for target, code in held.items()
            ),
        ]
        # The library keeps addresses: of arrays, names and fields.
        fields = [self._trt.PluginField(*value) for value in values]
        self._serialized = values, fields, self._trt.PluginFieldCollection(fields)
        return self._serialized[-1]

    # --- running ---

    def get_valid_tactics(self) -> list[int]:
        return []

    def set_tactic(self, tactic: int) -> None:
        del tactic

    def attach_to_context(self, context: object) -> object:
        del context
        return self.clone()

    def on_shape_change(self, inputs: Sequence[Any], outputs: object) -> None:
        """Plan the launches; the first time, also load the kernels."""
        del outputs
        if self._loaded is None:
            self._loaded = self._store.load(self._key, _config(self._trt, inputs))
        shape = self._shape([tuple(tensor.dims) for tensor in inputs])
        self._planned = plan(shape, self._loaded.sizes, self._loaded.machine)

    def enqueue(
        self,
        input_desc: Sequence[Any],
        output_desc: Sequence[Any],
        inputs: Sequence[int],
        outputs: Sequence[int],
        workspace: int,
        stream: int,
    ) -> None:
        del output_desc
        assert self._planned is not None and self._loaded is not None
        rotary, head_size = OPS[self._op], input_desc[KEY_POOL].dims[3]
        heads, kv_heads = self._attributes.heads, self._attributes.kv_heads
        _, rows, width = input_desc[QKV].dims
        query, key, value = (
            Rows(inputs[QKV] + first * head_size * _ITEM_BYTES, rows * width, width)
            for first in (0, heads, heads + kv_heads)
        )
        tensors = Tensors(
            query=query,
            key=key,
            value=value,
            out=Rows(outputs[OUT], rows * heads * head_size, heads * head_size),
            key_pool=inputs[KEY_POOL],
            value_pool=inputs[VALUE_POOL],
            pages=input_desc[KEY_POOL].dims[0],
            cos=inputs[COS] if rotary else 0,
            sin=inputs[SIN] if rotary else 0,
            past_lengths=inputs[PAST],
            query_lengths=inputs[QUERY_LENGTHS],
            block_table=inputs[TABLE],
            workspace=workspace,
        )
        run(self._planned, tensors, self._attributes.scales, self._loaded.kernels, stream)


def _allowed(trt: Any, position: int, described: Sequence[Any], rotary: bool) -> tuple[object, ...]:
    """Types that the tensor at `position`, inputs then outputs, may have."""
    inputs = 8 if rotary else 6
    if position == QKV:
        return (trt.DataType.HALF, trt.DataType.BF16)
    if position == inputs + OUT:
        return (described[QKV].type,)
    if position == KEY_POOL:
        return (described[QKV].type, trt.DataType.FP8)
    if position in (VALUE_POOL, inputs + KEY_POOL_OUT, inputs + VALUE_POOL_OUT):
        return (described[KEY_POOL].type,)
    if position in (PAST, QUERY_LENGTHS, TABLE):
        return (trt.DataType.INT32,)
    return (trt.DataType.FLOAT,)


def _config(trt: Any, described: Sequence[Any]) -> Config:
    """The kernels' configuration by the inputs' descriptions (UnsupportedError: no such types)."""
    names = {
        trt.DataType.HALF: "float16",
        trt.DataType.BF16: "bfloat16",
        trt.DataType.FP8: "float8_e4m3fn",
    }
    activation, stored = (names.get(described[i].type) for i in (QKV, KEY_POOL))
    if activation not in ("float16", "bfloat16") or stored is None:
        raise UnsupportedError(
            "The attention plugin has no kernels for these types.",
            found=f"queries in {described[QKV].type}, pools in {described[KEY_POOL].type}",
            expected="float16 or bfloat16",
            fix="build with --dtype float16 or bfloat16",
        )
    head_size = tuple(described[KEY_POOL].dims)[3]
    kinds: tuple[Activation, Stored] = (activation, stored)  # type: ignore[assignment]
    return Config(head_size, *kinds)
