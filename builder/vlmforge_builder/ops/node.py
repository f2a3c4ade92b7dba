"""What the file of an op is made of: the typed record of its nodes, and how one is traced."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Self,
    TypeAlias,
    get_args,
    get_origin,
    get_type_hints,
)

import onnx_ir as ir
import torch
from onnxscript import FLOAT, INT32, INT64, opset23
from onnxscript.values import Opset
from torch import Tensor

from vlmforge.errors import BuildError

DOMAIN = "vlmforge"
VERSION = 1
OPSET = Opset(DOMAIN, VERSION)

In: TypeAlias = Annotated[ir.Value, "input"]
"""An input of the engine's dtype, or of integers."""
Table: TypeAlias = Annotated[ir.Value, "table"]
"""An input that keeps its own type whatever the engine's dtype."""
Out: TypeAlias = Annotated[ir.Value, "output"]

op: Any = opset23
"""The standard ops, in which functions are written: graphs in Python's syntax, never called."""

# Tensors of any shape in the signature of a function.
if TYPE_CHECKING:
    Floats: TypeAlias = Any
    Int32s: TypeAlias = Any
    Int64s: TypeAlias = Any
else:
    Floats, Int32s, Int64s = FLOAT[...], INT32[...], INT64[...]

_ATTRIBUTES: Mapping[type, ir.AttributeType] = {
    int: ir.AttributeType.INT,
    float: ir.AttributeType.FLOAT,
    str: ir.AttributeType.STRING,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OpNode:
    """A node by the names of its inputs, outputs and attributes; a subclass is the list of them.

    Fields annotated `In`, `Table` and `Out` are inputs and outputs in the order of the op; the
    others (int, float, str) are attributes. A field with a default may be missing.

    Attributes:
        op_types: Types of node that the record is of. Several differ in which inputs there are.
        domain: Theirs.
    """

    op_types: ClassVar[tuple[str, ...]] = ()
    domain: ClassVar[str] = DOMAIN

    @property
    def op_type(self) -> str:
        """The one of `op_types` that these inputs make."""
        return self.op_types[0]

    @property
    def node(self) -> ir.Node:
        """What the record was read from, or written to."""
        made = self.outputs[0].producer()
        assert made is not None
        return made

    @property
    def inputs(self) -> tuple[ir.Value | None, ...]:
        """In the order of the op, as far as there are any."""
        values: list[ir.Value | None] = self._values("input", "table")
        while values and values[-1] is None:
            values.pop()
        return tuple(values)

    @property
    def tables(self) -> tuple[ir.Value, ...]:
        """Inputs that keep their own type."""
        return tuple(value for value in self._values("table") if value is not None)

    @property
    def outputs(self) -> tuple[ir.Value, ...]:
        """In the order of the op, as far as there are any."""
        return tuple(value for value in self._values("output") if value is not None)

    def _values(self, *roles: str) -> list[Any]:
        return [getattr(self, name) for name in _names(type(self), *roles)]

    @classmethod
    def is_of(cls, node: ir.Node) -> bool:
        """Whether the node's type is one of the record's."""
        return node.domain == cls.domain and node.op_type in cls.op_types

    @classmethod
    def all_in(cls, graph: ir.Graph) -> tuple[Self, ...]:
        """The records of all its nodes of this op, in order (BuildError as `read`)."""
        return tuple(cls.read(node) for node in graph if cls.is_of(node))

    @classmethod
    def read(cls, node: ir.Node) -> Self:
        """The record of a node.

        Raises:
            BuildError: the node is of another op, or has other inputs, outputs or attributes.
        """
        if not cls.is_of(node):
            raise misread(cls, node, f"{node.domain}::{node.op_type}", " or ".join(cls.op_types))
        values = {
            **_placed(cls, node, node.inputs, "input", "table"),
            **_placed(cls, node, node.outputs, "output"),
            **_attributes(cls, node),
        }
        required = (f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING)
        if missing := [name for name in required if name not in values]:
            raise misread(cls, node, f"no {', '.join(missing)}", "all that it requires")
        record = cls(**values)
        if record.op_type != node.op_type:
            raise misread(cls, node, node.op_type, f"{record.op_type}, by the inputs that it has")
        return record

    def write(self, name: str | None) -> ir.Node:
        """A new node of the record, whose outputs nobody has made yet."""
        return ir.node(
            self.op_type,
            self.inputs,
            {key: getattr(self, key) for key in _names(type(self), "attribute")},
            domain=self.domain,
            outputs=self.outputs,
            name=name,
        )


def emit(
    op_type: str,
    inputs: Sequence[Tensor],
    attributes: Mapping[str, int | float | str],
    *,
    like: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Trace a node of our domain whose outputs have the dtypes and shapes of `like`."""
    made = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{op_type}",
        inputs,
        attrs=dict(attributes),
        dtypes=[tensor.dtype for tensor in like],
        shapes=[tensor.shape for tensor in like],
        version=VERSION,
    )
    return tuple(made)


def _hints(kind: type[OpNode]) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _names(kind: type[OpNode], *roles: str) -> tuple[str, ...]:
    """Names of the fields that are "input", "table", "output" or "attribute"."""
    return tuple(name for name, hint in _hints(kind).items() if _role(hint) in roles)


def _role(hint: object) -> object:
    for part in (hint, *get_args(hint)):  # of a union
        if get_origin(part) is Annotated:
            return part.__metadata__[0]
    return "attribute"


def _placed(
    kind: type[OpNode], node: ir.Node, values: Sequence[ir.Value | None], *roles: str
) -> dict[str, Any]:
    """The values that are there, by the names of their places."""
    names = _names(kind, *roles)
    if len(values) > len(names):
        raise misread(kind, node, f"{len(values)} {roles[0]}s", f"at most {len(names)}")
    places = zip(names, values, strict=False)
    return {name: value for name, value in places if value is not None}


def _attributes(kind: type[OpNode], node: ir.Node) -> dict[str, Any]:
    known, found = _names(kind, "attribute"), {}
    types = {name: hint for name, hint in _hints(kind).items() if name in known}
    for name, attribute in node.attributes.items():
        if name not in types or attribute.type != _ATTRIBUTES[types[name]]:
            expected = ", ".join(f"{n}: {t.__name__}" for n, t in types.items()) or "none"
            raise misread(kind, node, f"an attribute {name}: {attribute.type.name}", expected)
        found[name] = attribute.value
    return found


def misread(kind: type[OpNode], node: ir.Node, found: str, expected: str) -> BuildError:
    """What to raise for a node that is not as its record says."""
    return BuildError(
        f"The node {node.name!r} cannot be read as {kind.op_types[0]}.",
        found=found,
        expected=expected,
        fix="change the block or pass that made the node; this is an error of the builder",
    )
