"""Passes over a traced graph, one file each. A target names its sequence and runs it here."""

from __future__ import annotations

import onnx_ir as ir

from vlmforge.errors import VlmforgeError


def run(sequence: ir.passes.Sequential, model: ir.Model) -> None:
    """Run passes one after the other on `model`.

    Raises:
        VlmforgeError: what one of them raised, without onnx_ir's wrapping.
    """
    try:
        sequence(model)
    except ir.passes.PassError as error:
        if isinstance(error.__cause__, VlmforgeError):
            raise error.__cause__ from None
        raise
