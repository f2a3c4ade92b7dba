"""What BENCH.md says is worked out from what was measured."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "plugins_cuda"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_report", ROOT / "bench" / "gpu_report.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def measured() -> Any:
    return json.loads((FOLDER / "bench_results.json").read_text("utf-8"))


def test_the_document_is_made_of_the_results(report: ModuleType, measured: Any) -> None:
    assert (FOLDER / "BENCH.md").read_text("utf-8") == report.document(measured)


def test_a_point_behind_torch_is_told(report: ModuleType, measured: Any) -> None:
    """Two per cent are noise; more is a miss, with the point's name."""
    row = next(r for r in measured["decode"] if (r["batch"], r["past"]) == (16, 8191))
    best = min(row["seconds"][name] for name in ("flash", "cudnn"))
    said = {}
    for times in (1.0, 1.01, 1.05):
        slower = copy.deepcopy(measured)
        slower["decode"] = [{**row, "seconds": {**row["seconds"], "ours": best * times}}]
        lines = list(report.targets(slower))
        first = next(i for i, line in enumerate(lines) if "decode not slower" in line)
        said[times] = lines[first : first + 2]
    reached = "decode not slower than the best of torch's SDPA (by over 2 %); reached at"
    assert said[1.0][0] == said[1.01][0] == f"- Target **met**: {reached} 1 of 1 points."
    assert said[1.05][0] == f"- Target **missed**: {reached} 0 of 1 points."
    assert "batch 16, 8192 tokens" in said[1.05][1]
    assert said[1.05][1].endswith("0.95x.")


def test_shares_are_of_the_ceilings(report: ModuleType, measured: Any) -> None:
    decode, prefill = measured["decode"][0], measured["prefill"][0]
    limits = measured["ceilings"]
    moved = decode["bytes"] / decode["seconds"]["ours"]
    assert report.share(measured, decode) == moved / limits["copy_bytes_per_second"]
    done = prefill["operations"] / prefill["seconds"]["ours"]
    assert report.share(measured, prefill) == done / limits[f"matmul_{prefill['activation']}"]
