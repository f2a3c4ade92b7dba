"""Goldens: what each stage gave when the engine was built, and whether it still does here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from vlmforge.backends import ClosableDecoder, LoadOptions
from vlmforge.engine.bundle import open_bundle
from vlmforge.engine.manifest import Manifest
from vlmforge.errors import EngineFormatError
from vlmforge.inputs.messages import Conversation, parse_prompt
from vlmforge.inputs.template_choice import choose_template
from vlmforge.runner.features import FeatureCache
from vlmforge.runner.load import load_engine
from vlmforge.runner.stages import DecoderInput, Engine
from vlmforge.vl import load_image

FOLDER = "goldens"
CASES_FILE = "cases.json"
STAGES = ("pixels", "tokens", "features", "logits", "greedy")
GREEDY_TOKENS = 4
_MARGINS = "margins"
Limits = Mapping[str, float]
# Largest absolute differences, by what is calculated in: what another processor's order of
# additions may change, with a margin; goldens of 16 bits were recorded in float32.
_LIMITS: Mapping[str, Limits] = {
    "float32": {"pixels": 1e-5, "features": 2e-3, "logits": 5e-3},
    "float16": {"pixels": 1e-5, "features": 3e-2, "logits": 0.1},
    "bfloat16": {"pixels": 1e-5, "features": 0.2, "logits": 0.4},
}
_FP8_LOGITS = 0.4  # a rounding that falls on the other side is a step of an eighth
_SAMPLES = 4096

Values = Mapping[str, NDArray[np.generic]]


class GoldenCase(Struct, frozen=True):
    """A prompt with images (files in the goldens' folder, in order)."""

    name: str
    messages: list[dict[str, object]]
    images: tuple[str, ...]


class StageResult(Struct, frozen=True):
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
    rows = _greedy(engine, given, logits)
    return {
        "pixels": _sample([image.pixel_values for image in images]),
        "tokens": np.array(rendered.token_ids, np.int64),
        "features": _sample([np.asarray(rows) for rows in features]),
        "logits": logits,
        "greedy": rows.argmax(-1),
        _MARGINS: np.diff(np.partition(rows, -2)[:, -2:])[:, 0],
    }


def _greedy(
    engine: Engine, given: DecoderInput, logits: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Logits `[GREEDY_TOKENS, vocab_size]` of the likeliest answer; the first are there already."""
    rows, length = [logits], len(given.ids)
    place, levels = engine.options.whole_place, np.array([given.rotary_level])
    while len(rows) < GREEDY_TOKENS:
        last, done = np.array([rows[-1].argmax()]), np.array([length + len(rows) - 1])
        (step,) = engine.decode([place], last, done, levels, np.array([given.lag]))
        rows.append(np.array(step, np.float32))
    return np.stack(rows)


def _sample(arrays: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """At most `_SAMPLES` values of each array, evenly spaced."""
    flat = [array.reshape(-1) for array in arrays]
    kept = [values[:: -(-len(values) // _SAMPLES)] for values in flat]
    return np.concatenate(kept) if kept else np.empty(0, np.float32)


def limits_of(manifest: Manifest) -> Limits:
    """The largest differences, by stage, that another machine may make."""
    limits = _LIMITS[manifest.compute_dtype]
    if manifest.kv.dtype != "float8_e4m3fn":
        return limits
    return {**limits, "logits": max(limits["logits"], _FP8_LOGITS)}


def compare(
    case: str, stage: str, found: NDArray[np.generic], golden: Values, limits: Limits
) -> StageResult:
    """Compare one stage with its golden: exact for ids, within the limit for numbers.

    Greedy tokens count up to the first that two logits within the limit could decide otherwise.
    """
    expected = golden[stage]
    if found.shape != expected.shape:
        return StageResult(case, stage, False, f"shape {found.shape}, golden {expected.shape}")
    if stage in limits:
        gap = np.abs(found.astype(np.float64) - expected.astype(np.float64))
        difference = float(gap.max(initial=0.0))
        limit = limits[stage]
        detail = f"largest difference {difference:.2e}, tolerance {limit:.0e}"
        # Written so that a NaN fails.
        return StageResult(case, stage, difference <= limit, detail)
    decided = _decided(golden, limits) if stage == "greedy" else len(expected)
    differs = np.flatnonzero(found[:decided] != expected[:decided])
    detail = (
        f"{decided} ids equal"
        if not len(differs)
        else (f"first differs at {differs[0]}: {found[differs[0]]}, golden {expected[differs[0]]}")
    )
    return StageResult(case, stage, not len(differs), detail)


def _decided(golden: Values, limits: Limits) -> int:
    """How many of the greedy tokens no difference within the limits can change."""
    if _MARGINS not in golden:  # of an engine of before
        return len(golden["greedy"])
    margins = golden[_MARGINS].astype(np.float64)
    close = np.flatnonzero(margins <= 2 * limits["logits"])
    return int(close[0]) if len(close) else len(golden["greedy"])


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
    # Prompts are run whole, so that one call gives all that is compared.
    options = LoadOptions(
        1, window, pack=False, block_size=kv.page_size or 64, paged=paged, chunk=window
    )
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
        limits = limits_of(engine.manifest)
        for case in read_cases(goldens):
            if announce is not None:
                announce(case.name)
            values = run_case(engine, case, goldens)
            with np.load(goldens / f"{case.name}.npz", allow_pickle=False) as golden:
                for stage in STAGES:
                    yield compare(case.name, stage, values[stage], golden, limits)
