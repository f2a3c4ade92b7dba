"""Answers one question about each picture of a folder or a Parquet file, into Parquet, on Ray.

    python -m deploy.ray.batch ENGINE PICTURES -o ANSWERS --question "Describe the image."

PICTURES is a folder of images, or Parquet with the columns `path` and (unless the paths can be read
where this runs) `bytes`. A job that was killed goes on when it is started again: each picture is
answered once. A picture that cannot be read gets an `error` instead of an `answer`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.data import DataContext, Dataset
from ray.data.checkpoint import CheckpointConfig


class Answerer:
    """One engine, which answers batches."""

    def __init__(self, engine: str, question: str, max_new_tokens: int) -> None:
        from vlmforge import GenerationConfig, pipeline

        self._pipe = pipeline(engine)
        self._question = question
        self._config = GenerationConfig(max_new_tokens=max_new_tokens)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """`path` and `bytes` to `path`, `answer` and `error`."""
        prompts = [(self._question, data) for data in batch["bytes"]]
        answers = self._pipe(prompts, self._config)
        return {
            "path": batch["path"],
            "answer": np.array([answer.text for answer in answers], object),
            "error": np.array([answer.error_message or "" for answer in answers], object),
        }


def read(pictures: Path) -> Dataset:
    """Rows of `path` and `bytes`."""
    if pictures.is_dir():
        return ray.data.read_binary_files(str(pictures), include_paths=True)
    found = ray.data.read_parquet(str(pictures))
    if "bytes" in (found.schema().names or []):
        return found.select_columns(["path", "bytes"])
    return found.map(lambda row: {"path": row["path"], "bytes": Path(row["path"]).read_bytes()})


def run(
    engine: Path,
    pictures: Path,
    answers: Path,
    *,
    question: str,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    engines: int = 1,
    cpus: float = 1,
) -> None:
    """Write the answers that are not there yet."""
    context = DataContext.get_current()
    context.checkpoint_config = CheckpointConfig(
        id_column="path",
        checkpoint_path=str(answers.absolute() / "_done"),
        delete_checkpoint_on_success=False,
    )
    read(pictures).map_batches(
        Answerer,
        fn_constructor_args=(str(engine.absolute()), question, max_new_tokens),
        batch_size=batch_size,
        concurrency=engines,
        num_cpus=cpus,
    ).write_parquet(str(answers.absolute() / "answers"))


def main() -> None:
    """Run a job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("pictures", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="ANSWERS")
    parser.add_argument("--question", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--engines", type=int, default=1, help="replicas of the engine")
    parser.add_argument("--cpus", type=float, default=1, help="of each")
    values = parser.parse_args()
    run(
        values.engine,
        values.pictures,
        values.output,
        question=values.question,
        max_new_tokens=values.max_new_tokens,
        batch_size=values.batch_size,
        engines=values.engines,
        cpus=values.cpus,
    )


if __name__ == "__main__":
    main()
