"""The arguments of `vlmforge plan`; apart, so that reading them imports nothing of a pipeline."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmforge.cli.plan import Asked

# As build-engine has them, which is not imported for its lists.
_TARGETS = ("onnxruntime", "cuda", "tensorrt", "tensorrt_rtx")
_DTYPES = ("float32", "float16", "bfloat16")
_WEIGHTS, _KV_DTYPES = ("int8", "int4"), ("fp8",)

_OF_A_BUILD = ("target", "dtype", "weights", "kv_dtype")


def add_plan(commands: Any) -> None:
    """Add the command to the subparsers of `vlmforge`."""
    add = commands.add_parser(
        "plan", help="does a model fit a GPU, or this machine? nothing is built"
    ).add_argument
    add("model", metavar="CHECKPOINT|ENGINE", help="a folder, or a hub id such as org/name")
    size = "such as 80GiB; without a unit, bytes (default: what is free here)"
    add("--gpu-memory", metavar="SIZE", help=f"of the GPU, {size}")
    add("--memory", metavar="SIZE", help=f"for engines of processors, {size}")
    add("--target", choices=_TARGETS, help="default: cuda with --gpu-memory, else onnxruntime")
    add("--dtype", choices=_DTYPES, help="of weights (default: float16 on GPUs, else float32)")
    add("--weights", choices=_WEIGHTS, help="of the decoder (default: as --dtype says)")
    add("--kv-dtype", choices=_KV_DTYPES, help="of a GPU's cache (default: --dtype)")
    add("--session-len", type=int, metavar="N", help="tokens of a sequence (default: the model's)")
    add("--max-batch-size", type=int, metavar="N", help="sequences at once (default: 8)")
    add("--tp", type=int, default=1, metavar="N", help="GPUs that share it; the plan is of one")
    add("--json", action="store_true", help="print it as JSON")


def asked_of(values: argparse.Namespace) -> Asked:
    """What the command line says."""
    from vlmforge.cli.plan import Asked

    build = {name.replace("_", "-"): getattr(values, name) for name in _OF_A_BUILD}
    return Asked(
        model=values.model,
        gpu_memory=values.gpu_memory,
        memory=values.memory,
        build={name: value for name, value in build.items() if value is not None},
        session_len=values.session_len,
        max_batch_size=values.max_batch_size,
        tp=values.tp,
        as_json=values.json,
    )
