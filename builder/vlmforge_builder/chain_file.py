"""A chain as files: each piece of a cut graph one, and the steps that run them in order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

import onnx_ir as ir

from vlmforge.engine.chain import AttentionCall, ChainStep, GatedActivation, Segment
from vlmforge_builder.onnx_file import tensor_specs
from vlmforge_builder.passes.cut_chain import Between
from vlmforge_builder.passes.scratch import matrix_bytes, token_bytes


def save_segments(pieces: Iterable[ir.Model], stem: str, folder: Path) -> tuple[Segment, ...]:
    """Write the pieces as `<stem>.<number>.onnx` and describe them."""
    segments = []
    for index, piece in enumerate(pieces):
        name = f"{stem}.{index:03d}.onnx"
        ir.save(piece, folder / name)
        segments.append(describe_piece(piece, name))
    return tuple(segments)


def describe_piece(piece: ir.Model, name: str) -> Segment:
    """What the manifest says of a piece in the file `name`."""
    graph = piece.graph
    return Segment(
        name,
        tensor_specs(graph.inputs),
        tensor_specs(graph.outputs),
        token_bytes(graph),
        matrix_bytes(graph),
    )


def chain_steps(segments: Sequence[Segment], between: Sequence[Between]) -> tuple[ChainStep, ...]:
    """What stands between after a segment each; segments that are left follow."""
    steps: list[ChainStep] = []
    for segment, step in zip_longest(segments, between):
        if segment is not None:
            steps.append(ChainStep(segment=segment))
        if isinstance(step, AttentionCall):
            steps.append(ChainStep(attention=step))
        elif isinstance(step, GatedActivation):
            steps.append(ChainStep(gated=step))
        elif step is not None:
            steps.append(ChainStep(collective=step))
    return tuple(steps)
