"""What is measured on a GPU, without one: the arithmetic, the files, and what is written of it."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from vlmforge.ort import ort
from vlmforge.runner.step import Row, Step, StepRecord

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture(scope="module")
def bench() -> Iterator[Any]:
    """Imports scripts of the folder by their names."""
    sys.path.insert(0, str(BENCH))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(BENCH))


@dataclass(frozen=True)
class Ran:
    """A launched graph."""

    at: float
    seconds: float


def decoding(begun: float, rows: int, *, start: int = 100, prompt: bool = False) -> StepRecord:
    row = Row(99, (1, 2), 0, (), "last")
    decode = tuple(Row(i, (1,), start, (), "last") for i in range(rows))
    return StepRecord(Step((), row if prompt else None, decode), begun, 0, 0.0, 0.25, 0.0)


def test_a_step_is_from_one_begin_to_the_next_where_all_rows_decode(bench: Any) -> None:
    steps = bench("gpu_steps")
    records = [
        decoding(0.0, 1, prompt=True),
        decoding(1.0, 2),
        decoding(1.010, 2, start=101),
        decoding(1.030, 2, start=102),
        decoding(1.040, 1),
    ]
    stamps = [Ran(0.5, 9.0), Ran(1.001, 0.008), Ran(1.012, 0.007), Ran(1.013, 0.003)]
    row = steps.figures(records, [*stamps, Ran(1.031, 9.0)], 2)
    assert (row["step_ms"], row["steps"], row["context"]) == (15.0, 2, round(101.5))
    assert row["gpu_ms"] == 9.0
    assert row["idle"] == pytest.approx(1 - 18 / 30)
    assert row["prompts_s"] == 0.25
    with pytest.raises(AssertionError, match="no two steps of 3 rows"):
        steps.figures(records, stamps, 3)


def test_of_rows_that_say_the_same_of_the_same_the_last_counts(bench: Any, tmp_path: Path) -> None:
    results = bench("gpu_results").Results(tmp_path / "rows.jsonl")
    results.add("decode", engine="a", batch=1, step_ms=1.0)
    results.add("decode", engine="a", batch=8, step_ms=2.0)
    results.add("decode", engine="b", batch=1, step_ms=3.0)
    results.add("decode", engine="a", batch=1, step_ms=4.0)
    assert [row["step_ms"] for row in results.of("decode")] == [4.0, 2.0, 3.0]
    assert results.of("card") == []


def test_what_fails_is_shown_and_ends_nothing_else(
    bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    done = []
    with pytest.raises(SystemExit) as ended:
        bench("gpu_results").attempts([("bad", lambda: 1 // 0), ("good", lambda: done.append(1))])
    assert (ended.value.code, done) == (1, [1])
    said = capsys.readouterr().out
    assert "ZeroDivisionError" in said
    assert "bad: FAILED" in said


def test_tables_stand_between_the_markers_and_say_what_was_missed(
    bench: Any, tmp_path: Path
) -> None:
    tables, results = bench("gpu_tables"), bench("gpu_results").Results(tmp_path / "rows.jsonl")
    common = {"card": "a card", "driver": "1", "onnxruntime": "1.31", "memory_gb": 80.0}
    results.add("card", **common, copy_tb_per_s=3.0, matmul_tflop_per_s=700.0)
    step = {"engine": "7b.float16", "batch": 64, "context": 1000, "gpu_ms": 16.0, "steps": 9}
    step |= {"tokens_per_s": 3800.0, "prompts_s": 1.0}
    results.add("decode", **step, step_ms=17.0, idle=0.06, gb_per_s=0.92 * 3000)
    results.add("yardstick", by="torch", batch=64, context=1000, step_ms=18.7)
    document = tmp_path / "RESULTS.md"
    document.write_text(f"before\n{tables.BEGIN}old\n{tables.END}after\n", "utf-8")
    tables.write(results.file, document)
    text = document.read_text("utf-8")
    assert text.startswith(f"before\n{tables.BEGIN}a card, driver 1")
    assert text.endswith(f"{tables.END}after\n")
    assert "old" not in text
    assert "| 92.0% (>= 91%) |" in text
    assert "| 6.0% (**missed**, <= 5%) |" in text
    assert "| 64 | 17.00 | 18.70 at 1000, 1.10x |" in text


def test_every_part_names_scripts_and_engines_that_it_prepares(bench: Any) -> None:
    figures = bench("gpu_figures")
    for name, part in figures.PARTS.items():
        for script, *arguments in part.commands:
            assert (BENCH / script).is_file(), name
            given = {item.strip("{}") for item in arguments if item.startswith("{")}
            engines = {item for item in given if item.split(".")[0] in ("7b", "13b", "34b")}
            assert engines <= {*part.filled, *part.trusted}, name


@pytest.fixture
def hollow(bench: Any, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module: ModuleType = bench("hollow")
    monkeypatch.setattr(module, "trust", lambda engine: None)
    monkeypatch.setattr(module, "_POOL", 1000)
    return module


def engine(folder: Path, holes: dict[str, Any]) -> Path:
    folder.mkdir()
    (folder / "holes.json").write_text(json.dumps(holes), "utf-8")
    for name in holes:
        (folder / name).write_bytes(bytes(10_000))
    return folder


def test_numbers_fill_the_holes_and_nothing_else(hollow: ModuleType, tmp_path: Path) -> None:
    holes = {"a": [[100, [40, 50], "float16"], [6000, [2500], "uint8"]], "b": [[0, [4], "float16"]]}
    one = engine(tmp_path / "one", holes)
    hollow.fill(one)
    raw = np.frombuffer((one / "a").read_bytes(), np.uint8)
    assert not raw[:100].any()
    assert not raw[4100:6000].any()
    assert not raw[8500:].any()
    numbers = raw[100:4100].view(np.float16).astype(np.float32)
    assert numbers.std() == pytest.approx(40**-0.5, rel=0.2)
    assert (raw[6000:8500] != 0).mean() > 0.9
    other = engine(tmp_path / "other", {**holes, "b": [[2, [4], "float16"]]})
    hollow.fill(other, one)
    assert (other / "a").samefile(one / "a")
    assert not (other / "b").samefile(one / "b")
    assert any((other / "b").read_bytes())


def test_the_graph_that_steps_are_compared_with_runs(bench: Any, tmp_path: Path) -> None:
    yardsticks = bench("gpu_yardsticks")
    path = yardsticks.write(tmp_path, yardsticks.SMALL, 24, "float32")
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    run = yardsticks.bound(ort, session, yardsticks.SMALL, 3, (20, 24), kind="cpu")
    run()
    names = {item.name: item.shape for item in session.get_outputs()}
    assert names["logits"] == ["batch", 1, yardsticks.SMALL.vocab]
    assert len(names) == 1 + 2 * yardsticks.SMALL.layers


def test_what_overlaps_counts_once(bench: Any) -> None:
    class Loads:
        def load(self, name: str) -> str:
            if name == "bad":
                raise ValueError(name)
            return name

    clock = bench("gpu_load").Clock()
    clock.watch(Loads, "load", "loads")
    assert Loads().load("good") == "good"
    with pytest.raises(ValueError, match="bad"):
        Loads().load("bad")
    assert len(clock.each("loads")) == 2
    clock.spans = {"loads": [(5.0, 6.0), (1.0, 3.0), (2.0, 4.0), (2.5, 3.0)], "runs": [(5.5, 7.0)]}
    assert clock.took("loads") == 4.0
    assert clock.took("loads", "runs") == 5.0
    assert clock.each("loads") == [2.0, 2.0, 0.5, 1.0]
    assert clock.took("captures") == 0.0
