"""The graph behind a decoder's last: logits to the id of the largest, the lowest of equals.

So that a step whose tokens are the likeliest ones gives ids, and not all logits, to the host.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from vlmforge.engine.interface import BATCH, LIKELIEST, LOGITS, OUTPUTS

_OPSET = 23
_ROW = 256


def likeliest_token(vocab_size: int) -> ir.Model:
    """Logits float32 `[batch, outputs, vocab_size]` to ids int64 `[batch, outputs]`.

    -1 where logits are not finite. The largest by TopK, which needs no library but the provider;
    of those that equal it, the one with the most ids behind it, by TopK again.
    """
    tape = Tape()
    shape = ir.Shape((BATCH, OUTPUTS, vocab_size))
    logits = ir.Value(name=LOGITS, type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
    one, last = _constant("one", [1], np.int64), _constant("last", [-1], np.int64)
    zero, size = _constant("zero", 0, np.float32), _constant("size", vocab_size, np.float32)
    none, width = _constant("none", -1, np.float32), _width(vocab_size)
    starts = _constant("starts", np.arange(vocab_size, 0, -width), np.float32)
    weights, values, behind = [one, last, zero, size, none, starts], logits, starts
    if width > 1:
        cut = _constant("cut", [0, 0, -1, width], np.int64)
        weights.append(cut)
        pieces = tape.op("Reshape", [logits, cut])
        # Of equals the first, as ONNX has it; RadixTopK, of long rows, gives any of them.
        best, inside = tape.op_multi_out("TopK", [pieces, one], num_outputs=2)
        values, inside = (tape.op("Squeeze", [value, last]) for value in (best, inside))
        behind = tape.op("Sub", [starts, tape.op("Cast", [inside], {"to": ir.DataType.FLOAT})])
    largest = tape.op_multi_out("TopK", [values, one], num_outputs=2)[0]
    places = tape.op("Where", [tape.op("Equal", [values, largest]), behind, zero])
    first = tape.op_multi_out("TopK", [places, one], num_outputs=2)[0]
    # The sum of nothing but zeros, unless one of them is no number.
    total = tape.op("ReduceSum", [tape.op("Mul", [logits, zero]), last], {"keepdims": 1})
    found = tape.op("Where", [tape.op("IsNaN", [total]), none, tape.op("Sub", [size, first])])
    ids = tape.op("Cast", [tape.op("Squeeze", [found, last])], {"to": ir.DataType.INT64})
    ids.name, ids.shape = LIKELIEST.name, ir.Shape(LIKELIEST.shape)
    ids.type = ir.TensorType(ir.DataType.INT64)
    graph = ir.Graph(
        [logits],
        [ids],
        nodes=tape.nodes,
        initializers=weights,
        opset_imports={"": _OPSET},
        name=LIKELIEST.name,
    )
    return ir.Model(graph, ir_version=10, producer_name="vlmforge")


def _width(vocab_size: int) -> int:
    """Logits of a piece whose largest is found first; 1: of all at once.

    ONNX Runtime's CUDA provider has a block of threads for each row that TopK is asked for, and
    rows of up to 256 are sorted in one go. A row of 32,000 has two blocks: 20 us of an H100.
    """
    fits = (w for w in range(_ROW, 1, -1) if vocab_size % w == 0 and vocab_size // w <= _ROW)
    return next(fits, 1) if vocab_size > _ROW else 1


def _constant(name: str, values: object, dtype: type[np.generic]) -> ir.Value:
    array = np.array(values, dtype)
    tensor, shape = ir.tensor(array, name=name), ir.Shape(array.shape)
    return ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
