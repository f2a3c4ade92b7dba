"""Refuse graphs that the GPU compilers take and then run wrongly, or die of; and say why.

Each rule is a trap that was met: the compilers say nothing, or end the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

import onnx_ir as ir
from typing_extensions import override

from vlmforge.errors import BuildError

_CAPACITY_AXIS = 2

Finding = tuple[str, str]
"""What was found, and what to do instead."""


class LintPass(ir.passes.PassBase):
    """Raises BuildError for the first node that falls into a known trap; changes nothing."""

    @property
    @override
    def in_place(self) -> Literal[True]:
        return True

    @property
    @override
    def changes_input(self) -> Literal[False]:
        return False

    @override
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for node in model.graph:
            for rule in _RULES.get(node.op_type, ()):
                for found, instead in rule(node):
                    raise BuildError(
                        f"The graph would be compiled wrongly at the node {node.name!r}.",
                        found=found,
                        expected=instead,
                        fix="change the pass that made the node; this is an error of the builder",
                    )
        return ir.passes.PassResult(model, modified=False)


def _inputs(node: ir.Node, *names: str) -> Mapping[str, ir.Value]:
    """The inputs that are there, by the names of their places."""
    places = zip(names, node.inputs, strict=False)
    return {name: value for name, value in places if value is not None}


def _of_attention(node: ir.Node) -> Mapping[str, ir.Value]:
    past = ("past_key", "past_value", "nonpad_kv_seqlen")
    return _inputs(node, "query", "key", "value", "mask", *past)


def _lengths(node: ir.Node) -> Iterator[Finding]:
    if "nonpad_kv_seqlen" in _of_attention(node):
        yield (
            "Attention with nonpad_kv_seqlen, which the parser drops without a word: queries "
            "would see the stale end of the cache",
            "an explicit mask",
        )


def _same_tensor(node: ir.Node) -> Iterator[Finding]:
    given = _of_attention(node)
    sources = {_source(given[name]) for name in ("query", "key", "value")}
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
    if causal is not None and causal.as_int() and "mask" in _of_attention(node):
        yield "Attention with a mask and is_causal", "one of them"


def _softcap(node: ir.Node) -> Iterator[Finding]:
    softcap = node.attributes.get("softcap")
    if softcap is not None and softcap.as_float():
        yield f"Attention with softcap {softcap.as_float()}", "none: the parser refuses it"


def _several_results(node: ir.Node) -> Iterator[Finding]:
    if sum(bool(value.uses()) or value.is_graph_output() for value in node.outputs) > 1:
        yield f"Attention with {len(node.outputs)} results in use", "one"


def _capacity(node: ir.Node) -> Iterator[Finding]:
    cache = _inputs(node, "cache").get("cache")
    shape = cache.shape if cache is not None else None
    if cache is None or not cache.is_graph_input():
        yield "TensorScatter into a value that is no input of the graph", "the cache's input"
    elif shape is None or not isinstance(shape[_CAPACITY_AXIS], int):
        yield "TensorScatter into a cache whose capacity varies", "a fixed capacity"


def _zero_point(node: ir.Node) -> Iterator[Finding]:
    point = _inputs(node, "numbers", "scales", "zero_point").get("zero_point")
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
