"""Goldens: what each stage gave when the engine was built, and whether it still does here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlmforge.backends import ClosableDecoder, LoadOptions
from vlmforge.engine.bundle import open_bundle
from vlmforge.errors import EngineFormatError
from vlmforge.inputs.messages import Conversation, parse_prompt
from vlmforge.inputs.template_choice import choose_template
from vlmforge.runner.features import FeatureCache
from vlmforge.runner.stages import DecoderInput, Engine, load_engine
from vlmforge.vl import load_image

FOLDER = "goldens"
CASES_FILE = "cases.json"
STAGES = ("pixels", "tokens", "features", "logits", "greedy")
GREEDY_TOKENS = 4
# Largest absolute difference; what another CPU's order of additions may change, with a margin.
TOLERANCES: Mapping[str, float] = {"pixels": 1e-5, "features": 2e-3, "logits": 5e-3}
_SAMPLES = 4096

Values = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True, slots=True)
class GoldenCase:
    """A prompt with images (files in the goldens' folder, in order)."""

    name: str
    messages: list[dict[str, object]]
    images: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StageResult:
    """The comparison of one stage of one case. `detail` says by how much it differs."""

    case: str
    stage: str
    passed: bool
    detail: str


def read_cases(folder: Path) -> tuple[GoldenCase, ...]:
    """The cases of a goldens' folder (EngineFormatError when they cannot be read)."""
    try:
        rows = json.loads((folder / CASES_FILE).read_text("utf-8"))
        return tuple(GoldenCase(row["name"], row["messages"], tuple(row["images"])) for row in rows)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineFormatError(
            f"{folder / CASES_FILE} cannot be read.",
            found=f"{type(error).__name__}: {error}",
            expected="the goldens that build-engine wrote",
            fix="copy the engine again, or rebuild it with build-engine --force",
        ) from error


def conversation(case: GoldenCase, folder: Path) -> Conversation:
    """The case's messages with its images in place of `{'type': 'image', 'image': index}`."""
    # By their bytes: where the engine lies must not become part of a prompt that spells paths.
    images = [load_image((folder / name).read_bytes()) for name in case.images]

    def block(item: dict[str, object]) -> dict[str, object]:
        if item["type"] != "image":
            return item
        return {"type": "image", "image": images[int(str(item["image"]))]}

    messages = []
    for message in case.messages:
        content = message["content"]
        blocks = [block(item) for item in content] if isinstance(content, list) else content
        messages.append({"role": message["role"], "content": blocks})
    return parse_prompt(messages)


def run_case(engine: Engine, case: GoldenCase, folder: Path) -> Values:
    """The values of every stage; pixels and features are sampled evenly, to keep goldens small."""
    prompt = conversation(case, folder)
    images = [engine.prepare_image(engine.open_image(i.source).decode()) for i in prompt.images]
    features, _ = FeatureCache(engine.encode, batch=1).get(images)
    rendered = engine.render(prompt)
    given = engine.decoder_input(rendered, features)
    logits = engine.prefill(engine.options.whole_place, given, 0, logits="last")[0]
    return {
        "pixels": _sample([image.pixel_values for image in images]),
        "tokens": np.array(rendered.token_ids, np.int64),
        "features": _sample(features),
        "logits": logits,
        "greedy": _greedy(engine, given, logits),
    }


def _greedy(engine: Engine, given: DecoderInput, logits: NDArray[np.float32]) -> NDArray[np.int64]:
    tokens, length, levels = [int(logits.argmax())], len(given.ids), np.array([given.rotary_level])
    place, lags = engine.options.whole_place, np.array([given.lag])
    while len(tokens) < GREEDY_TOKENS:
        done = np.array([length + len(tokens) - 1])
        step = engine.decode([place], np.array(tokens[-1:]), done, levels, lags)
        tokens.append(int(step[0].argmax()))
    return np.array(tokens, np.int64)


def _sample(arrays: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """At most `_SAMPLES` values of each array, evenly spaced."""
    flat = [array.reshape(-1) for array in arrays]
    kept = [values[:: -(-len(values) // _SAMPLES)] for values in flat]
    return np.concatenate(kept) if kept else np.empty(0, np.float32)


def compare(case: str, stage: str, found: NDArray[np.generic], golden: Values) -> StageResult:
    """Compare one stage with its golden: exact for ids, within the tolerance for numbers."""
    expected = golden[stage]
    if found.shape != expected.shape:
        return StageResult(case, stage, False, f"shape {found.shape}, golden {expected.shape}")
    if stage in TOLERANCES:
        gap = np.abs(found.astype(np.float64) - expected.astype(np.float64))
        difference = float(gap.max(initial=0.0))
        limit = TOLERANCES[stage]
        detail = f"largest difference {difference:.2e}, tolerance {limit:.0e}"
        # Written so that a NaN fails.
        return StageResult(case, stage, difference <= limit, detail)
    differs = np.flatnonzero(found != expected)
    detail = (
        f"{len(expected)} ids equal"
        if not len(differs)
        else (f"first differs at {differs[0]}: {found[differs[0]]}, golden {expected[differs[0]]}")
    )
    return StageResult(case, stage, not len(differs), detail)


@contextmanager
def loaded_for_goldens(folder: Path, *, checked: bool = True) -> Iterator[Engine]:
    """The engine with one slot and mapped weights: verification needs no speed, but little memory.

    Ranks that were started for it end with the block. `checked=False` is for the builder, whose
    engine has no checksums yet.
    """
    from vlmforge.engine.bundle import Bundle
    from vlmforge.engine.manifest import load_manifest

    bundle = open_bundle(folder) if checked else Bundle(folder, load_manifest(folder))
    manifest = bundle.manifest
    frozen = bundle.text(manifest.prompt.template_file)
    kv, window = manifest.kv, manifest.decode.session_len
    paged = kv.page_size is not None
    options = LoadOptions(1, window, pack=False, block_size=kv.page_size or 64, paged=paged)
    engine = load_engine(bundle, choose_template(manifest.prompt, frozen, None), options)
    try:
        yield engine
    finally:
        if isinstance(engine.decoder, ClosableDecoder):
            engine.decoder.close()


def verify(folder: Path, announce: Callable[[str], None] | None = None) -> Iterator[StageResult]:
    """Rerun the goldens of an engine, yielding each stage's result as it comes.

    Raises:
        EngineError: the engine cannot be opened or loaded.
    """
    goldens = folder / FOLDER
    with loaded_for_goldens(folder) as engine:
        for case in read_cases(goldens):
            if announce is not None:
                announce(case.name)
            values = run_case(engine, case, goldens)
            with np.load(goldens / f"{case.name}.npz", allow_pickle=False) as golden:
                for stage in STAGES:
                    yield compare(case.name, stage, values[stage], golden)
