"""The demo model's training: its batches, its text and the checkpoint that it writes."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from configuration_keys import load as understood
from configuration_keys import plan
from vlmforge.evaluation.scenes import COLORS, SHAPES, SIZES, Scene, Thing
from vlmforge.inputs.tokenizer import TextTokenizer
from vlmforge_builder.tensor_check import check_tensors
from vlmforge_builder.tokenizer.convert import convert_tokenizer
from vlmforge_recipes.llava.demo import CHECKPOINT
from vlmforge_recipes.llava.demo import train as training_module
from vlmforge_recipes.llava.demo.data import Batch, Conversations, batches, patch_classes
from vlmforge_recipes.llava.demo.model import DemoModel
from vlmforge_recipes.llava.demo.optimize import optimizers, rate
from vlmforge_recipes.llava.demo.spec import SPEC, Training
from vlmforge_recipes.llava.demo.train import train

TINY = Training(steps=6, batch_size=2, turns=2, warmup=2)


@pytest.fixture(scope="module")
def tokenizer_json() -> str:
    return convert_tokenizer(CHECKPOINT).json.decode()


def test_a_batch_depends_on_its_index_and_seed_alone(tokenizer_json: str) -> None:
    def made(seed: int, index: int) -> Batch:
        training = dataclasses.replace(TINY, seed=seed)
        return Conversations(training, SPEC.vision, tokenizer_json)[index]

    assert torch.equal(made(0, 3).ids, made(0, 3).ids)
    assert torch.equal(made(0, 3).pixel_values, made(0, 3).pixel_values)
    assert not torch.equal(made(0, 3).pixel_values[:1], made(1, 3).pixel_values[:1])
    conversations = Conversations(TINY, SPEC.vision, tokenizer_json)
    ahead = batches(conversations, workers=1)
    assert torch.equal(next(ahead).ids, conversations[0].ids)


def test_answers_alone_are_labelled_and_rows_count_up(tokenizer_json: str) -> None:
    tokenizer = TextTokenizer(tokenizer_json)
    batch = Conversations(TINY, SPEC.vision, tokenizer_json)[1]
    rows = SPEC.vision.positions - 1
    assert batch.rows[batch.rows >= 0].tolist() == list(range(len(batch.pixel_values) * rows))
    for ids, labels in zip(batch.ids, batch.labels, strict=True):
        places = (labels >= 0).nonzero().flatten()
        assert torch.equal(labels[places], ids[places + 1])
        text = tokenizer.decode(labels[places].tolist(), skip_special_tokens=False)
        assert "USER" not in text
        assert text.count("</s>") == TINY.turns


def test_patches_show_what_is_there() -> None:
    scene = Scene((Thing(0, "large", "red", "star"), Thing(5, "small", "white", "cross")))
    # Wider than high: the first and the last row of patches are mostly padding.
    found = patch_classes(scene, (120, 96), side=8).reshape(8, 8, 4)
    assert (found[0] == 0).all()
    assert (found[7] == 0).all()
    star = (COLORS.index("red") + 1, SHAPES.index("star") + 1, SIZES.index("large") + 1)
    assert tuple(found[1, 0, :3].tolist()) == star
    assert found[..., 3].sum() == 2
    right = np.argwhere(found[..., 0].numpy() == COLORS.index("white") + 1)
    assert right[:, 1].min() >= 5


def test_the_rate_warms_up_and_ends_at_nothing() -> None:
    rates = [rate(step, Training()) for step in range(Training().steps)]
    assert rates[0] < 0.02
    assert max(rates) == 1.0
    assert rates[-1] < 0.001
    assert np.argmax(rates) == Training().warmup - 1


def test_every_parameter_is_optimised_once() -> None:
    model = DemoModel(SPEC)
    chosen = [p for o in optimizers(model, TINY) for g in o.param_groups for p in g["params"]]
    assert len(chosen) == len({id(p) for p in chosen}) == len(list(model.parameters()))


def test_training_lowers_the_loss_and_writes_a_checkpoint_that_builds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_module, "LOG_EVERY", 3)
    folder = train(tmp_path / "checkpoint", TINY, device="cpu", workers=0)
    with (folder / "training_log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [3, 6]
    assert float(rows[1]["words"]) < float(rows[0]["words"])
    assert (folder / "training_loss.png").read_bytes().startswith(b"\x89PNG")
    spec, shipped = understood(folder), understood(CHECKPOINT)
    check_tensors(spec, lambda note: None)
    # So it builds as the one that is shipped, whose engine other tests build and ask.
    assert plan(spec) == plan(shipped)
    places = {path.relative_to(CHECKPOINT) for path in CHECKPOINT.rglob("*")}
    assert {path.relative_to(folder) for path in folder.rglob("*")} <= places
