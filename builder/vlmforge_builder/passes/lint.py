"""Refuse graphs that the GPU compilers take and then run wrongly, or die of; and say why.

Each rule is a trap that was met: the compilers say nothing, or end the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from vlmforge.errors import BuildError

_LENGTHS_INPUT = 6  # nonpad_kv_seqlen of Attention
_CAPACITY_AXIS = 2

Finding = tuple[str, str]
"""What was found, and what to do instead."""


def lint(model: ir.Model) -> None:
    """Raises BuildError for the first node that falls into a known trap."""
    for node in model.graph:
        for rule in _RULES.get(node.op_type, ()):
            for found, instead in rule(node):
                raise BuildError(
                    f"The graph would be compiled wrongly at the node {node.name!r}.",
                    found=found,
                    expected=instead,
                    fix="change the pass that made the node; this is an error of the builder",
                )


def _lengths(node: ir.Node) -> Iterator[Finding]:
    if len(node.inputs) > _LENGTHS_INPUT and node.inputs[_LENGTHS_INPUT] is not None:
        yield (
            "Attention with nonpad_kv_seqlen, which the parser drops without a word: queries "
            "would see the stale end of the cache",
            "an explicit mask",
        )


def _same_tensor(node: ir.Node) -> Iterator[Finding]:
    sources = {_source(value).name for value in node.inputs[:3] if value is not None}
    if len(sources) == 1:
        yield (
            "Attention whose query, key and value are one tensor, which ends the builder's process",
            "three tensors, such as the results of a Split",
        )


def _source(value: ir.Value) -> ir.Value:
    producer = value.producer()
    while producer is not None and producer.op_type == "Identity":
        first = producer.inputs[0]
        assert first is not None
        value, producer = first, first.producer()
    return value


def _mask_and_causal(node: ir.Node) -> Iterator[Finding]:
    causal = node.attributes.get("is_causal")
    if causal is not None and causal.as_int() and len(node.inputs) > 3 and node.inputs[3]:
        yield "Attention with a mask and is_causal", "one of them"


def _softcap(node: ir.Node) -> Iterator[Finding]:
    softcap = node.attributes.get("softcap")
    if softcap is not None and softcap.as_float():
        yield f"Attention with softcap {softcap.as_float()}", "none: the parser refuses it"


def _several_results(node: ir.Node) -> Iterator[Finding]:
    if sum(bool(value.uses()) or value.is_graph_output() for value in node.outputs) > 1:
        yield f"Attention with {len(node.outputs)} results in use", "one"


def _capacity(node: ir.Node) -> Iterator[Finding]:
    cache = node.inputs[0]
    shape = cache.shape if cache is not None else None
    if cache is None or not cache.is_graph_input():
        yield "TensorScatter into a value that is no input of the graph", "the cache's input"
    elif shape is None or not isinstance(shape[_CAPACITY_AXIS], int):
        yield "TensorScatter into a cache whose capacity varies", "a fixed capacity"


def _zero_point(node: ir.Node) -> Iterator[Finding]:
    point = node.inputs[2] if len(node.inputs) > 2 else None
    if point is None:
        return
    values = point.const_value
    if values is None or values.numpy().any():
        yield "DequantizeLinear with a zero point", "symmetric weights: the compilers refuse others"


_RULES: dict[str, tuple[Callable[[ir.Node], Iterator[Finding]], ...]] = {
    "Attention": (_lengths, _same_tensor, _mask_and_causal, _softcap, _several_results),
    "TensorScatter": (_capacity,),
    "DequantizeLinear": (_zero_point,),
}
