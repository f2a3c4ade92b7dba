"""Engines of TensorRT-RTX for several ranks, each a chain of plans, by a stand-in for the library.

Ranks are processes; they meet between the plans by what ranks on the processor meet by.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import pytest
from msgspec import structs

from conftest import HF, IMAGES
from golden_models import TOLERANCES, Golden, cases_of, check_answer, check_prompt
from plan_engines import plan_engine
from vlmforge import EngineConfig, GenerationConfig, Pipeline, pipeline
from vlmforge.backends import Communicator, LoadOptions, load_backend
from vlmforge.backends.fake_plans import graph_of, plans_on_cpu
from vlmforge.backends.plan_program import PlanProgram
from vlmforge.backends.ranks.calls import RankedDecoder
from vlmforge.cli import main
from vlmforge.engine.manifest import decoder_name, load_manifest
from vlmforge.errors import BackendUnavailableError

pytestmark = pytest.mark.usefixtures("patient_ranks")
WINDOW = ("--session-len", "1024")
PICTURE = str(IMAGES / "tall_300x900.png")
# None of whose tokens is chosen by less than what sums in another order change.
PROMPTS = ["hi", ("What is this?", PICTURE), "Tell me a story about cats", "Another one."]
GREEDY = GenerationConfig(max_new_tokens=12, ignore_eos=True)
CONFIG = EngineConfig(max_batch_size=4)


@pytest.fixture(scope="module")
def engine(shared: Path) -> Path:
    return plan_engine(shared, HF.name, *WINDOW, "--tp", "2")


@pytest.fixture(scope="module")
def two(engine: Path) -> Iterator[Pipeline]:
    with plans_on_cpu("tensorrt_rtx"), pipeline(engine, CONFIG) as pipe:
        yield pipe


@pytest.mark.parametrize("name", [case["id"] for case in cases_of(HF.name)][:3])
def test_golden_cases(two: Pipeline, name: str) -> None:
    golden = Golden(HF.name, two)
    check_prompt(golden, name)
    check_answer(golden, name, TOLERANCES["float16"])


def test_tokens_are_those_of_one_rank(shared: Path, two: Pipeline) -> None:
    with plans_on_cpu("tensorrt_rtx"), pipeline(plan_engine(shared, HF.name, *WINDOW)) as one:
        expected = [answer.token_ids for answer in one(PROMPTS, GREEDY)]
    assert [answer.token_ids for answer in two(PROMPTS, GREEDY)] == expected
    assert [two(prompt, GREEDY).token_ids for prompt in PROMPTS] == expected


def test_all_ranks_take_a_step_for_each_logit_of_a_prompt(two: Pipeline) -> None:
    """Plans give those of one place in a step."""
    config = GenerationConfig(max_new_tokens=2, output_logits="all")
    answer = two("a b", gen_config=config)
    assert answer.logits is not None and np.isfinite(answer.logits).all()
    assert len(answer.logits) == answer.input_token_len + 1


def test_plans_of_a_rank_share_what_they_calculate_in(two: Pipeline) -> None:
    decoder = two._engine.decoder
    assert isinstance(decoder, RankedDecoder)
    program = decoder.own._program  # type: ignore[attr-defined]
    assert isinstance(program, PlanProgram)
    assert len({id(plan._scratch) for plan in program._plans.values()}) == 1


def test_what_the_engine_says_of_itself(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = load_manifest(engine)
    layers = manifest.kv.layers
    for rank in range(2):
        chain = manifest.part(decoder_name(rank)).chain
        assert chain is not None and chain.meetings and not chain.attention
        assert len(chain.segments) == 2 * layers + 2
        kinds = [meeting.kind for meeting in chain.collectives]
        assert kinds == ["all_reduce"] * 2 * layers + ["all_gather"]
        # Shapes come from the step's ids, not from what another plan has calculated.
        taken = [{spec.name for spec in segment.inputs} for segment in chain.segments]
        assert not taken[1] & {"input_ids", "past_lengths", "block_table"}
        held = [names & {f"past_key.{layer}" for layer in range(layers)} for names in taken]
        assert [len(names) for names in held] == [1, 0] * layers + [0, 0]
        assert carrying(engine, [segment.file for segment in chain.segments]) == [0]
    assert main(["verify", str(engine), "--static"]) == 0
    assert f"meets 1 others {2 * layers + 1} times" in capsys.readouterr().out
    assert main(["inspect", str(engine)]) == 0
    shown = capsys.readouterr().out
    words = f"{2 * layers + 2} segments, {2 * layers + 1} meetings of the ranks between them"
    assert shown.count(words) == 2
    assert shown.count(f"{layers} PagedAttention") == 2


def carrying(engine: Path, files: list[str]) -> list[int]:
    """Which plans carry the attention's kernels."""
    found = []
    for index, file in enumerate(files):
        graph = onnx.load_from_string(graph_of((engine / file).read_bytes())).graph
        kept = [a.i for node in graph.node for a in node.attribute if a.name == "holds_kernels"]
        found += [index] * sum(kept)
    return found


def test_the_librarys_own_attention_is_not_run_on_ranks(engine: Path) -> None:
    manifest = load_manifest(engine)
    native = structs.replace(manifest, kv=structs.replace(manifest.kv, page_size=None))
    options, nobody = LoadOptions(1, 64), cast("Communicator", None)
    with plans_on_cpu("tensorrt_rtx"), pytest.raises(BackendUnavailableError) as caught:
        load_backend("tensorrt_rtx").load_rank(engine, native, options, nobody)
    assert "whose cache is not in pages" in caught.value.found
