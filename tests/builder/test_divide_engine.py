"""Dividing an engine that is there gives the ranks' parts that its checkpoint would have given."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from conftest import DATA, HF
from divided_decoders import SETTINGS, compiled, prompts
from rank_chains import Ranks
from vlmforge.cli.inspect import describe
from vlmforge.engine.bundle import open_bundle
from vlmforge.engine.manifest import load_manifest
from vlmforge.engine.static_check import check_static
from vlmforge.errors import BuildError, ConfigError, EngineIntegrityError
from vlmforge_builder import build, command
from vlmforge_builder.divide_engine import divide_engine
from vlmforge_builder.progress import Progress
from vlmforge_builder.traced_file import NEUTRAL_FILE


def divided(engine: Path, output: Path, tp: int, *, force: bool = False) -> tuple[Path, str]:
    """The engine, and what was said."""
    text = io.StringIO()
    with Progress(text=text) as progress:
        made = divide_engine(engine, output, tp, progress, force=force, wait=False)
    return made, text.getvalue()


def test_a_divided_engine_answers_as_the_whole(hf_engine: Path, tmp_path: Path) -> None:
    made, _ = divided(hf_engine, tmp_path / "two", 2)
    whole, manifest = load_manifest(hf_engine), load_manifest(made)
    assert (manifest.parallel.tp, manifest.parallel.kv_heads) == (2, 2)
    assert manifest.kv == whole.kv
    assert manifest.rank_kv.bytes_per_token * 2 == whole.kv.bytes_per_token
    assert [part.name for part in manifest.parts] == ["vision", "decoder", "decoder.rank1"]
    assert all(result.passed for result in check_static(open_bundle(made)))
    vocab, hidden = manifest.decode.vocab_size, manifest.decode.hidden_size
    ids, features = prompts(vocab, hidden)
    expected, tokens = Ranks.of_engine(hf_engine, 2, 24).greedy(ids, features, 6)
    found, same = Ranks.of_engine(made, 2, 24).greedy(ids, features, 6)
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)
    np.testing.assert_array_equal(same, tokens)
    # All else is as it was.
    kept = {entry.path: entry.sha256 for entry in whole.files}
    shared = {e.path: e.sha256 for e in manifest.files if not e.path.startswith("decoder")}
    assert shared.pop("build.log.jsonl") != kept["build.log.jsonl"]
    assert shared.items() <= kept.items()
    assert {path for path in kept if not path.startswith("decoder")} - {"build.log.jsonl"} == set(
        shared
    )


def test_ranks_are_described_and_held_against_each_other(hf_engine: Path, tmp_path: Path) -> None:
    made, _ = divided(hf_engine, tmp_path / "two", 2)
    text = describe(made, batch=2, context=100)
    assert "chain 5 segments, 5 meetings of the ranks between them" in text
    assert "memory of each of 2 ranks at batch 2 and context 100" in text
    assert "1.0 kB a token" in text  # and of one rank 2.0
    bundle = open_bundle(made)
    *others, last = bundle.manifest.parts
    assert last.chain is not None
    *steps, gather = last.chain.steps
    segment = steps[-1].segment
    assert segment is not None
    narrow = structs.replace(segment.outputs[0], shape=("batch", "outputs", 99))
    steps[-1] = structs.replace(steps[-1], segment=structs.replace(segment, outputs=(narrow,)))
    odd = structs.replace(last, chain=structs.replace(last.chain, steps=(*steps, gather)))
    manifest = structs.replace(bundle.manifest, parts=(*others, odd))
    failed = [r for r in check_static(structs.replace(bundle, manifest=manifest)) if not r.passed]
    assert [(r.part, r.check) for r in failed] == [("decoder.rank1", "ranks")]
    assert failed[0].detail.startswith("logits_share is TensorSpec")


def test_its_parts_are_those_that_its_checkpoint_gives(hf_engine: Path, tmp_path: Path) -> None:
    from lowered_decoder import model_spec, part_of

    made, _ = divided(hf_engine, tmp_path / "four", 4)
    spec = model_spec(HF.name)
    part, folder = part_of(spec, "decoder"), tmp_path / "parts"
    folder.mkdir()
    parts = compiled(build.trace(part), part, spec.store, folder, 4, SETTINGS)
    assert load_manifest(made).parts[1:] == parts
    for path in folder.iterdir():
        assert path.read_bytes() == (made / path.name).read_bytes(), path.name


def test_it_is_made_once(hf_engine: Path, tmp_path: Path) -> None:
    target = tmp_path / "two"
    divided(hf_engine, target, 2)
    before = (target / "engine.json").stat().st_mtime_ns
    made, said = divided(hf_engine, target, 2)
    assert "is up to date" in said
    assert (made / "engine.json").stat().st_mtime_ns == before
    with pytest.raises(BuildError, match="is another engine") as caught:
        divided(hf_engine, target, 4)
    assert "--force" in caught.value.fix
    (target / "decoder.rank1.data").write_bytes(b"cut short")
    divided(hf_engine, target, 2)
    open_bundle(target)
    made, _ = divided(hf_engine, target, 4, force=True)
    assert load_manifest(made).parallel.tp == 4


def test_what_cannot_be_divided_is_refused(hf_engine: Path, tmp_path: Path) -> None:
    two, _ = divided(hf_engine, tmp_path / "two", 2)
    with pytest.raises(ConfigError, match="Only an engine of one rank") as caught:
        divided(two, tmp_path / "four", 4)
    assert caught.value.found == "an engine of 2 for onnxruntime, --tp 4"
    with pytest.raises(ConfigError, match="Only an engine of one rank"):
        divided(hf_engine, tmp_path / "one", 1)
    with pytest.raises(ConfigError, match="where it lies"):
        divided(hf_engine, hf_engine, 2)
    with pytest.raises(ConfigError, match="among 3 ranks") as caught:
        divided(hf_engine, tmp_path / "three", 3)
    assert caught.value.found == "4 attention heads, tp 3"
    assert not (tmp_path / "three").exists()
    assert not list(tmp_path.glob(".three.building-*"))


def test_an_engine_of_before_is_told_apart(hf_engine: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(hf_engine, old)
    (old / NEUTRAL_FILE).unlink()
    with pytest.raises(EngineIntegrityError):  # it is listed
        divided(old, tmp_path / "two", 2)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (["--dtype", "float16"], "--dtype"),
        (["--weights", "int8", "--session-len", "64"], "--weights, --session-len"),
        (["--describe"], "--describe"),
    ],
)
def test_an_engine_keeps_what_it_was_built_with(
    hf_engine: Path, tmp_path: Path, options: list[str], found: str
) -> None:
    output = tmp_path / "two"
    with pytest.raises(ConfigError, match="only --tp can be changed") as caught:
        command.run([str(hf_engine), "-o", str(output), "--tp", "2", *options])
    assert caught.value.found == found
    assert not output.exists()


@pytest.mark.parametrize("tp", [0, 1 << 20])
def test_a_number_of_ranks_out_of_range_is_named(tmp_path: Path, tp: int) -> None:
    options = build.BuildOptions(str(DATA / HF.name / "checkpoint"), tmp_path / "engine", tp=tp)
    with pytest.raises(ConfigError, match="tp is out of range") as caught:
        build._check(options)
    assert caught.value.found == str(tp)
