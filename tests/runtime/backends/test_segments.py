"""A segment runs from and to addresses, and the library stumbles over nothing on the way."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import numpy as np
import onnx
from onnx import TensorProto, helper

from vlmforge.backends.cuda.device import Tensor
from vlmforge.backends.cuda.segments import OrtSegment, open_session
from vlmforge.ort import ort


def test_a_run_raises_no_error_inside(tmp_path: Path) -> None:
    """One that the library catches itself takes many times as long as a small run."""
    spec = (TensorProto.FLOAT, ["n"])
    node = helper.make_node("Neg", ["x"], ["y"])
    x, y = (helper.make_tensor_value_info(name, *spec) for name in "xy")
    model = helper.make_model(
        helper.make_graph([node], "g", [x], [y]),
        opset_imports=[helper.make_opsetid("", 23)],
        ir_version=10,
    )
    onnx.save(model, tmp_path / "g.onnx")
    session = open_session(tmp_path / "g.onnx", ["CPUExecutionProvider"], ort.SessionOptions())
    given, found = np.arange(4, dtype=np.float32), np.zeros(4, np.float32)
    tensors = [Tensor(n, "float32", (4,), a.ctypes.data) for n, a in (("x", given), ("y", found))]
    work = OrtSegment(session, "cpu", None).bind(tensors[:1], tensors[1:])
    raised: list[object] = []

    def look(frame: FrameType, event: str, what: object) -> None:
        if event == "c_exception":
            raised.append(what)

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(before)
    assert raised == []
    np.testing.assert_array_equal(found, -given)
