"""Ops that blocks emit and targets lower, one file each; the next one is one new file here.

A file holds what traces the op (a function on tensors), what it means (ONNX functions in standard
ops: its documentation, and the oracle that lowerings are tested with), and how passes see it: a
typed record of a node (`vlmforge_builder.ops.node.OpNode`). Nothing needs to be registered.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator

import onnx_ir as ir
from onnxscript.values import OnnxFunction

from vlmforge_builder.ops.node import DOMAIN, VERSION, OpNode


def functions() -> tuple[ir.Function, ...]:
    """The meaning of every op of our domain, for a model that is to run with ops left in it."""
    found = [body for body in _defined() if isinstance(body, OnnxFunction)]
    made = (ir.serde.deserialize_function(body.to_function_proto()) for body in found)
    return tuple({function.identifier(): function for function in made}.values())


def kinds() -> tuple[type[OpNode], ...]:
    """The records of all ops."""
    found = [kind for kind in _defined() if isinstance(kind, type) and issubclass(kind, OpNode)]
    return tuple(kind for kind in dict.fromkeys(found) if kind is not OpNode)


def read(node: ir.Node) -> OpNode | None:
    """The record of a node of our domain, or None (BuildError: not as the op's file says)."""
    of_node = (kind for kind in kinds() if node.domain == DOMAIN and kind.is_of(node))
    return next((kind.read(node) for kind in of_node), None)


def _defined() -> Iterator[object]:
    """All that the files of this package define or import."""
    for module in sorted(pkgutil.iter_modules(__path__), key=lambda m: m.name):
        yield from vars(importlib.import_module(f"{__name__}.{module.name}")).values()


__all__ = ["DOMAIN", "VERSION", "functions", "kinds", "read"]
