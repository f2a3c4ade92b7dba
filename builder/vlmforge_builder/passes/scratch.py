"""How much memory a graph needs beside its weights, its inputs and its outputs."""

from __future__ import annotations

from collections import Counter

import onnx_ir as ir

from vlmforge.engine.interface import TOKENS


def token_bytes(graph: ir.Graph) -> int:
    """Bytes for each token of a step that are alive at once, at most, while the graph runs.

    Counted are values that have a row for each token; nodes run in the graph's order.
    """
    left = Counter(value for node in graph for value in node.inputs if value is not None)
    outside = {*graph.inputs, *graph.outputs}
    alive = most = 0
    for node in graph:
        made = [value for value in node.outputs if value not in outside]
        alive += sum(map(_row_bytes, made))
        most = max(most, alive)
        for value in (*made, *dict.fromkeys(node.inputs)):
            if value is None or value in outside or value.producer() is None:
                continue
            if value in made:
                alive -= 0 if left[value] else _row_bytes(value)
                continue
            left[value] -= sum(taken is value for taken in node.inputs)
            if not left[value]:
                alive -= _row_bytes(value)
    return most


def matrix_bytes(graph: ir.Graph) -> int:
    """Bytes of the largest matrix of whole numbers when it is made whole, 0 without one.

    ONNX Runtime's CUDA provider does so to multiply more than a few tokens by it
    (https://github.com/microsoft/onnxruntime/blob/main/onnxruntime/contrib_ops/cuda/quantization/matmul_nbits.cc).
    """
    sizes = [0]
    for node in graph:
        if node.op_type == "MatMulNBits":
            given, scales = node.inputs[0], node.inputs[2]
            assert given is not None and scales is not None and scales.dtype is not None
            rows, columns = (node.attributes[name].as_int() for name in ("K", "N"))
            sizes.append(int(rows * columns * scales.dtype.itemsize))
    return max(sizes)


def _row_bytes(value: ir.Value) -> int:
    """Of `[batch, tokens, ...]`; 0 for what has another form."""
    shape, dtype = value.shape, value.dtype
    if shape is None or dtype is None or len(shape) < 2 or str(shape[1]) != TOKENS:
        return 0
    size = 1
    for dim in shape[2:]:
        if not isinstance(dim, int):
            return 0
        size *= dim
    return int(size * dtype.itemsize)
