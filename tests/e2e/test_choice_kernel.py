"""Tokens that our kernel chooses, compiled for the processor, are those that the graphs choose."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from conftest import HF, IMAGES, cuda_engine
from host_choice import HostChoice
from late_device import late_cuda_on_cpu
from vlmforge import EngineConfig, GenerationConfig, pipeline
from vlmforge.backends.fake import HostDevice, HostMemory, cuda_on_cpu
from vlmforge.engine.interface import chosen_by_kernel
from vlmforge.engine.manifest import load_manifest
from vlmforge_plugins.cached_attention.config import TARGETS
from vlmforge_plugins.cached_attention.plan import Launch
from vlmforge_plugins.token_choice import launcher as choice

PROMPTS: list[Any] = [
    "one",
    ("What is shown in this image?", str(IMAGES / "photo_640x480.png")),
    "open the door please",
    "seven small stones",
    "tell me more about it",
    "the end of all of this",
]
WAYS: list[dict[str, Any]] = [
    {"do_sample": True, "top_k": 0, "temperature": 1.1, "random_seed": 7},
    {"repetition_penalty": 1.3, "bad_words": ["a"]},
    {"presence_penalty": 0.7, "do_sample": True, "temperature": 0.8, "random_seed": 2},
    {"do_sample": True, "top_k": 40, "top_p": 0.8, "random_seed": 5, "logprobs": 2},
    {"n": 2, "do_sample": True, "min_p": 0.1, "random_seed": 9},
    {"logprobs": 3},
]


class _Counted(HostChoice):
    """Attributes: rows of each launch, and whether each tells more than ids."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []
        self.told: list[bool] = []

    @override
    def launch(self, launch: Launch, params: choice.Params, stream: int) -> None:
        self.rows.append(launch.grid[0])
        self.told.append(bool(params.chosen_logit))
        super().launch(launch, params, stream)


@pytest.fixture(scope="module")
def engine(shared: Path) -> Path:
    return cuda_engine(shared, HF.name)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Counted]:
    """Devices in the block have the kernel."""
    kernels = _Counted()

    def choosers(device: HostDevice, files: Mapping[str, Path]) -> choice.Kernels:
        del device
        assert set(files) == {*(target.name for target in TARGETS), "ptx"}
        return kernels

    monkeypatch.setattr(HostDevice, "choosers", choosers)
    yield kernels


def answers(engine: Path, *, late: bool = False) -> list[Any]:
    """Of all prompts at once: greedy ones, and each in its way."""
    found: list[Any] = []
    with late_cuda_on_cpu() if late else cuda_on_cpu(), pipeline(engine) as pipe:
        for ways in ([{}] * len(PROMPTS), WAYS):
            configs = [
                GenerationConfig(max_new_tokens=6 + index, ignore_eos=True, **way)
                for index, way in enumerate(ways)
            ]
            for response in pipe(PROMPTS, gen_config=configs):  # type: ignore[union-attr]
                found += [(one.token_ids, _ids(one.logprobs)) for one in response.choices]
    return found


def _ids(logprobs: list[dict[int, float]] | None) -> list[list[tuple[int, float]]]:
    """What is told, as far as it is the same whichever way it was calculated."""
    return [[(token, round(value, 4)) for token, value in row.items()] for row in logprobs or []]


@pytest.mark.parametrize("late", [False, True])
def test_answers_are_those_of_the_graphs(
    engine: Path, counted: _Counted, late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = answers(engine, late=late)
    assert max(counted.rows) > 1 and set(counted.told) == {True, False}
    with monkeypatch.context() as patch:
        patch.setattr(HostDevice, "choosers", lambda device, files: None)
        launched = len(counted.rows)
        assert found == answers(engine)
        assert len(counted.rows) == launched


def test_the_kernel_takes_the_place_of_graphs(engine: Path) -> None:
    chain = load_manifest(engine).part("decoder").chain
    assert chain is not None and chain.sampler is not None
    replaced = [s for s in chain.segments if chosen_by_kernel(chain, s)]
    assert [[spec.name for spec in s.outputs] for s in replaced] == [["likeliest"]]
    assert set(chain.choosers) == {*(target.name for target in TARGETS), "ptx"}


def test_memory_for_edits_is_taken_once(
    engine: Path, counted: _Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it is counted (`PartChain.sampler`): the likeliest tokens are those of logits as given."""
    taken, allocate = list[int](), HostDevice.allocate

    def counting(device: HostDevice, size: int) -> HostMemory:
        taken.append(size)
        return allocate(device, size)

    monkeypatch.setattr(HostDevice, "allocate", counting)
    with cuda_on_cpu(), pipeline(engine, EngineConfig(max_batch_size=3)) as pipe:
        pipe("one", gen_config=GenerationConfig(max_new_tokens=2, repetition_penalty=1.3))
    chain = load_manifest(engine).part("decoder").chain
    assert counted.rows and chain is not None and chain.sampler is not None
    assert taken.count(3 * chain.sampler.token_bytes) == 1
