"""Record what every stage of a new engine gives, for `vlmforge verify` to compare with elsewhere.

The engine must also run once before it is published.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vlmforge.engine.manifest import MANIFEST_FILE, Manifest, dump_manifest
from vlmforge.errors import BuildError, ConfigError
from vlmforge.evaluation.verify import (
    CASES_FILE,
    FOLDER,
    GREEDY_TOKENS,
    GoldenCase,
    conversation,
    loaded_for_goldens,
    run_case,
)
from vlmforge.runner.stages import Engine
from vlmforge_builder.progress import Progress

_ASK = "What is shown in this picture? 画像には何が写っていますか？"


def golden_cases() -> tuple[GoldenCase, ...]:
    """Text alone, one image, and two images over two turns."""
    return (
        GoldenCase("text", [_user("Write one line about cats 🐈 and café terraces.")], ()),
        GoldenCase("image", [_user(_ASK, 0)], ("wide.png",)),
        GoldenCase(
            "two_images",
            [
                _user("What is this?", 0),
                {"role": "assistant", "content": "A drawing."},
                _user("And this?", 1),
            ],
            ("tall.png", "gray.png"),
        ),
    )


def _user(text: str, *images: int) -> dict[str, object]:
    content: list[dict[str, object]] = [{"type": "text", "text": text}]
    content += [{"type": "image", "image": image} for image in images]
    return {"role": "user", "content": content}


def record_goldens(folder: Path, manifest: Manifest, progress: Progress) -> None:
    """Run the cases on the engine in `folder` and write their values below `goldens/`.

    Raises:
        BuildError: the engine gives values that are not finite.
        ConfigError: not even the shortest case fits the window.
    """
    target = folder / FOLDER
    target.mkdir()
    for name, pixels in _drawings().items():
        Image.fromarray(pixels).save(target / name)
    (folder / MANIFEST_FILE).write_text(dump_manifest(manifest), "utf-8")
    with loaded_for_goldens(folder, checked=False) as engine:
        _record(engine, target, progress)
    (folder / MANIFEST_FILE).unlink()


def _record(engine: Engine, target: Path, progress: Progress) -> None:
    cases = _fitting(engine, target)
    rows = [{"name": c.name, "messages": c.messages, "images": list(c.images)} for c in cases]
    text = json.dumps(rows, ensure_ascii=False, indent=1)
    (target / CASES_FILE).write_text(text, "utf-8")
    for index, case in enumerate(cases):
        values = run_case(engine, case, target)
        for stage in ("features", "logits"):
            if not np.isfinite(values[stage]).all():
                raise BuildError(
                    f"The engine gives {stage} that are not finite.",
                    found=f"NaN or infinity in the golden {case.name!r}",
                    expected="finite numbers",
                    fix="check the checkpoint; after --dtype float16, try bfloat16",
                )
        np.savez_compressed(target / f"{case.name}.npz", **values)  # type: ignore[arg-type]
        progress.report(index + 1, len(cases))


def _fitting(engine: Engine, folder: Path) -> list[GoldenCase]:
    """The cases that the window holds, with the tokens that they generate."""
    window = engine.options.capacity
    lengths = {
        case.name: len(engine.render(conversation(case, folder)).token_ids) + GREEDY_TOKENS
        for case in golden_cases()
    }
    if min(lengths.values()) > window:
        raise ConfigError(
            "The window is too small for a prompt.",
            found=f"session_len {window}",
            expected=f"at least {min(lengths.values())} tokens, for the shortest golden",
            fix="--session-len 2048",
        )
    return [case for case in golden_cases() if lengths[case.name] <= window]


def _drawings() -> dict[str, NDArray[np.uint8]]:
    """Pictures that are the same on every machine: gradients, rings and stripes."""
    return {
        "wide.png": _rings(240, 400),
        "tall.png": _rings(330, 150),
        "gray.png": _rings(191, 257)[..., 0],
    }


def _rings(height: int, width: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[:height, :width].astype(np.int64)
    radius = (x - width // 3) ** 2 + (y - height // 2) ** 2
    red = (radius // 97) % 256
    green = (x * 255 // width + (y // 16 % 2) * 60) % 256
    blue = (y * 255 // height) ^ (x // 8 % 2 * 32)
    return np.stack((red, green, blue), axis=-1).astype(np.uint8)
