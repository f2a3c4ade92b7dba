"""Frames of the choice of tokens, where our kernel makes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs
from typing_extensions import override

from host_choice import HostChoice
from sample_manifest import RICH
from vlmforge.backends.choice import GREEDY, Choice, likeliest_ids
from vlmforge.backends.cuda.choice_kernel import ChoiceKernel, load_choice
from vlmforge.backends.cuda.choosing import TokenSampler
from vlmforge.backends.fake import HostDevice
from vlmforge.engine.interface import BATCH, LOGITS
from vlmforge.engine.tensors import TensorSpec
from vlmforge_builder.chain_file import save_segments
from vlmforge_builder.passes.sample_token import sample_token
from vlmforge_plugins.cached_attention.plan import Launch
from vlmforge_plugins.token_choice.launcher import Params

VOCAB, ROWS = 61, 2


class _Noted(HostChoice):
    """Attributes: whether each launch tells more than ids."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[int] = []

    @override
    def launch(self, launch: Launch, params: Params, stream: int) -> None:
        self.told.append(params.told)
        super().launch(launch, params, stream)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenSampler, HostDevice, _Noted]:
    folder: Path = tmp_path_factory.mktemp("sampler")
    (segment,) = save_segments([sample_token(VOCAB)], "sample", folder)
    device, kernels = HostDevice(), _Noted()
    kernel = ChoiceKernel(device, kernels, VOCAB, ROWS)
    return TokenSampler(device, kernel, segment, ROWS), device, kernels


def test_a_frame_that_tells_of_ids_alone_is_not_taken_for_more(
    made: tuple[TokenSampler, HostDevice, _Noted],
) -> None:
    """Nor one that tells more for those that want ids, who would wait for it."""
    sampler, device, kernels = made
    logits = np.random.default_rng(3).standard_normal((ROWS, VOCAB)).astype(np.float32)
    memory = device.allocate(logits.nbytes)
    device.upload(memory.address, logits)
    best = np.argsort(-logits, axis=1).tolist()
    plain, told = Choice(GREEDY.numbers), Choice(GREEDY.numbers, logprobs=3)
    steps = [[plain, plain], [plain, plain], [plain, told], [told, plain], [plain, plain]]
    for choices in steps:
        frame = sampler.prepare(ROWS, memory.address, choices)
        sampler.run(frame)
        found = sampler.found(frame, choices)
        for choice, one, ids in zip(choices, found, best, strict=True):
            assert one is not None and one.id == ids[0]
            assert list(one.likeliest) == ids[: choice.logprobs]
    assert kernels.told == [0, 0, 1, 1, 0]


class _Asked(HostDevice):
    """Attributes: the files that were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.files: list[Mapping[str, Path]] = []

    @override
    def choosers(self, files: Mapping[str, Path]) -> HostChoice:
        self.files.append(files)
        return HostChoice()


def test_of_an_engine_of_before_no_kernel_is_asked_for() -> None:
    """A GPU would say that there is none for it."""
    chain, folder, device = RICH.part("decoder").chain, Path("engine"), _Asked()
    assert chain is not None and chain.choosers and chain.sampler is not None
    logits = TensorSpec(LOGITS, "float32", (BATCH, 1, VOCAB))
    chain = structs.replace(chain, sampler=structs.replace(chain.sampler, inputs=(logits,)))
    for before in (structs.replace(chain, choosers={}), structs.replace(chain, sampler=None)):
        assert load_choice(device, folder, before, ROWS) is None
    assert device.files == []
    assert load_choice(device, folder, chain, ROWS) is not None
    assert device.files == [{name: folder / file for name, file in chain.choosers.items()}]


def test_the_likeliest_of_logits_that_came_here() -> None:
    """The lowest of equals; none where the largest is no number, or infinite."""
    none, most = np.nan, np.inf
    rows = [[1, 3, 3], [none, 5, 1], [0, 1, none], [-most, 2, 1], [most, 0, 0], [-most] * 3]
    assert likeliest_ids(np.array(rows, np.float32)).tolist() == [1, -1, -1, 1, -1, -1]
