"""SentencePiece's file format, which has no types."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from sentencepiece import sentencepiece_model_pb2

_generated: Any = sentencepiece_model_pb2
ModelProto = _generated.ModelProto
PieceType = ModelProto.SentencePiece
TrainerSpec = _generated.TrainerSpec


def parse_model(data: bytes) -> Any:
    """The `ModelProto` in `data` (ValueError if there is none)."""
    try:
        proto = ModelProto.FromString(data)
    except DecodeError as error:
        raise ValueError(str(error)) from error
    missing = [name for name in ("trainer_spec", "normalizer_spec") if not proto.HasField(name)]
    missing += [] if proto.pieces else ["pieces"]
    if missing:
        raise ValueError("no " + " and no ".join(missing))
    return proto
