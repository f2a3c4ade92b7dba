"""Engines of today's families, divided: their ranks give what one rank gives, in one process."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from divided_decoders import prompts
from live_parity import FAMILIES, engine
from rank_chains import Ranks
from vlmforge.engine import interface
from vlmforge.engine.manifest import load_manifest
from vlmforge.errors import ConfigError
from vlmforge_builder.divide_engine import divide_engine
from vlmforge_builder.progress import Progress

# The engines that other tests build as well.
USUAL = {
    ("internvl", "qwen2", 4),
    ("idefics3", "smolvlm", 2),
    ("qwen2_vl", "windowed", 4),
    ("qwen3_vl", "first", 2),
}
GRID = [
    pytest.param(*case, marks=[pytest.mark.nightly] * (case not in USUAL))
    for family, module in FAMILIES.items()
    for shape in module.SHAPES
    for tp in (2, 3, 4)
    for case in [(family, shape, tp)]
]


@pytest.mark.parametrize(("family", "shape", "tp"), GRID)
def test_a_familys_ranks_are_the_whole(
    shared: Path, tmp_path: Path, family: str, shape: str, tp: int
) -> None:
    whole = engine(shared, family, shape)
    decoder = Ranks.of_engine(whole, 2, 24)
    try:
        with Progress(text=io.StringIO()) as progress:
            divide_engine(whole, tmp_path / "engine", tp, progress, force=False, wait=False)
    except ConfigError as error:  # of two heads, or of four among three
        assert error.found in {f"{heads} attention heads, tp {tp}" for heads in (2, 4)}
        assert error.found[0] == "2" or tp == 3
        return
    shapes = {spec.name: spec.shape for spec in decoder.parts[0].inputs}
    vocab = load_manifest(whole).decode.vocab_size
    ids, features = prompts(vocab, int(shapes[interface.IMAGE_FEATURES][-1]))
    expected, tokens = decoder.greedy(ids, features, 6)
    found, same = Ranks.of_engine(tmp_path / "engine", 2, 24).greedy(ids, features, 6)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(same, tokens)
    assert len(np.unique(tokens)) > 2
