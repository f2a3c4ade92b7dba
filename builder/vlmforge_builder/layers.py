"""An engine against what it was made of, tensor by tensor: which is the first that parts?

    python -m vlmforge_builder.layers ENGINE --against CHECKPOINT|ENGINE

What `vlmforge verify ENGINE --layers` runs. Both sides are run by the processor, in float32, on the
same drawn inputs, with all that they calculate as outputs (Polygraphy); tensors are told by their
names, which passes keep. Of a checkpoint that is the traced graph, our ops by what they mean.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from polygraphy.comparator import IterationResult, SimpleCompareFunc
from polygraphy.logger import G_LOGGER

from vlmforge.engine.bundle import Bundle
from vlmforge.engine.manifest import MANIFEST_FILE, load_manifest
from vlmforge.errors import ConfigError, VlmforgeError
from vlmforge_builder.watched_graphs import (
    Inputs,
    Watched,
    draw,
    watch_checkpoint,
    watch_engine,
)
from vlmforge_builder.widened_graphs import WIDENED

# Of the largest value of a tensor, by what weights are stored in; measured, with a margin.
_LIMITS: Mapping[str, float] = {
    "float32": 1e-3,
    "float16": 2e-2,
    "bfloat16": 1e-1,
    "int8": 2e-1,
    "int4": 1.5,
}


@dataclass(frozen=True, slots=True)
class TensorResult:
    """A tensor that both sides have.

    Attributes:
        part: "vision" or "decoder".
        name: Of the tensor.
        op: What makes it, in the engine.
        error: The largest difference, as a share of the largest value of the reference.
        passed: Whether that is within the limit.
    """

    part: str
    name: str
    op: str
    error: float
    passed: bool


def compare_engine(
    engine: Path, against: Path, limit: float | None = None
) -> Iterator[TensorResult]:
    """Every tensor of `engine` that its reference has too, in the order of the calculation.

    Args:
        engine: An engine directory; its files are not checked.
        against: The checkpoint that it was built of, or another engine of the same.
        limit: On `TensorResult.error`; None: by what the engine's weights are stored in.

    Raises:
        VlmforgeError: one of them cannot be run here, or they are of different models.
    """
    bundle = Bundle(engine, load_manifest(engine))
    manifest = bundle.manifest
    limit = _LIMITS[manifest.quantisation or manifest.dtype] if limit is None else limit
    for part in ("vision", "decoder"):
        inputs = draw(manifest, part)
        found = watch_engine(bundle, part, inputs)
        yield from _compare(part, found, _reference(bundle, against, part, inputs), limit)


def _reference(bundle: Bundle, against: Path, part: str, inputs: Inputs) -> Watched:
    if (against / MANIFEST_FILE).exists():
        return watch_engine(Bundle(against, load_manifest(against)), part, inputs)
    with TemporaryDirectory() as scratch:
        return watch_checkpoint(bundle.manifest, against, part, inputs, Path(scratch))


def _compare(part: str, found: Watched, reference: Watched, limit: float) -> Iterator[TensorResult]:
    """By Polygraphy, whose thresholds are absolute: one for each tensor."""
    common = {
        name: (array, reference.tensors[name])
        for name, array in found.tensors.items()
        if _comparable(array, reference.tensors.get(name))
    }
    if not common:
        raise ConfigError(
            f"The two have no tensor of the part {part} in common.",
            found=f"{len(found.tensors)} tensors and {len(reference.tensors)} others",
            expected="the checkpoint that the engine was built of, or an engine of the same",
            fix="vlmforge inspect ENGINE tells its source",
        )
    largest = {name: float(np.abs(b).max(initial=0)) or 1.0 for name, (_, b) in common.items()}
    judge = SimpleCompareFunc(
        atol={name: limit * size for name, size in largest.items()},
        rtol=0.0,
        check_error_stat="max",
        fail_fast=False,
        infinities_compare_equal=True,
    )
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        verdicts = judge(
            IterationResult({name: a for name, (a, _) in common.items()}, runner_name="engine"),
            IterationResult({name: b for name, (_, b) in common.items()}, runner_name="reference"),
        )
    for name, size in largest.items():
        verdict = verdicts[name]
        error = float(verdict.max_absdiff) / size
        made_by = found.ops.get(name, "attention")
        yield TensorResult(part, name.removesuffix(WIDENED), made_by, error, bool(verdict))


def _comparable(found: NDArray[np.generic], other: NDArray[np.generic] | None) -> bool:
    return (
        other is not None
        and found.shape == other.shape
        and found.size > 0
        and found.dtype.kind == other.dtype.kind == "f"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print what parts; 0 where nothing does, 1 otherwise, and on an error."""
    parser = argparse.ArgumentParser(prog="vlmforge verify --layers", description=__doc__)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--against", type=Path, required=True)
    parser.add_argument("--limit", type=float)
    values = parser.parse_args(argv)
    try:
        return _report(list(compare_engine(values.engine, values.against, values.limit)))
    except VlmforgeError as error:
        print(f"vlmforge: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


def _report(results: Sequence[TensorResult]) -> int:
    for part in dict.fromkeys(result.part for result in results):
        own = [result for result in results if result.part == part]
        worst = max(own, key=lambda result: result.error)
        print(f"{part}: {len(own)} tensors; the worst is {_line(worst)}")
    first = next((result for result in results if not result.passed), None)
    if first is None:
        print("Every tensor is that of the reference.")
        return 0
    parted = sum(not result.passed for result in results)
    print(f"The first tensor that parts, of {parted}, is in the part {first.part}: {_line(first)}")
    return 1


def _line(result: TensorResult) -> str:
    return f"{result.name!r} of {result.op}, off by {result.error:.1e} of its largest value"


if __name__ == "__main__":
    sys.exit(main())
