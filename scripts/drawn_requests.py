"""Requests of every form, good and bad, drawn by a seed.

`fuzz.py` and `soak.py` send them. A request is drawn by its number alone, so that one that failed
can be sent again: whichever caller sends it, and whatever runs beside it.
"""

from __future__ import annotations

import base64
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from vlmforge.vl.constants import IMAGE_TOKEN

FORMS = ("call", "list", "stream", "chat", "chat_stream", "generate", "generate_whole", "look")
WORDS = ("what", "is", "the", "colour", "of", "a", "star", "größer", "星", "🙂", "\n", "where?")


@dataclass(frozen=True)
class Pictures:
    """Files of all sizes: `usual` ones, `large` ones of up to 100 megapixels, and `bad` ones.

    `loaded` are some of the usual ones as arrays: what callers decode is their own memory.
    """

    usual: tuple[Path, ...]
    large: tuple[Path, ...]
    bad: tuple[Path, ...]
    loaded: dict[Path, np.ndarray[Any, np.dtype[np.uint8]]]


def draw_pictures(folder: Path, *, large: bool = True) -> Pictures:
    """Draw them once; the same ones each time. Without `large`, none that costs much."""
    draw = np.random.default_rng(0)
    sizes = [(1, 1), (1, 3000), (3000, 1), (2, 2)]
    sizes += [(1920, 1080), (4000, 3000)] if large else [(3, 2), (2, 3)]
    sizes += [tuple(map(int, draw.integers(1, 700, 2))) for _ in range(54 if large else 12)]
    kinds = ("png", "jpg", "webp", "gif", "bmp")
    usual = tuple(
        _picture(folder / f"{i}.{kinds[i % 5 if i > 5 else 0]}", size, i)
        for i, size in enumerate(sizes)
    )
    huge = [("L", (10_000, 10_000)), ("RGB", (20_000, 5000)), ("1", (10, 10_000_000))]
    files = [(folder / f"large{i}.png", mode, size) for i, (mode, size) in enumerate(huge)]
    for path, mode, size in files if large else ():
        if not path.exists():
            PIL.Image.new(mode, size, 1).save(path, compress_level=1)
    too_large = folder / "too_large.png"
    if not too_large.exists():
        PIL.Image.new("1", (10_001, 10_000)).save(too_large)
    whole = usual[7].read_bytes()
    bad = {"cut.jpg": whole[: len(whole) // 2], "empty.png": b"", "text.png": b"no picture at all"}
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    bad_paths = (too_large, folder / "not_there.png", *(folder / name for name in bad))
    loaded = {path: np.asarray(PIL.Image.open(path).convert("RGB")) for path in usual[6:30]}
    return Pictures(usual, tuple(path for path, *_ in files) if large else (), bad_paths, loaded)


def _picture(path: Path, size: tuple[int, int], seed: int) -> Path:
    if not path.exists():
        small = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
        PIL.Image.fromarray(small).resize(size).save(path)
    return path


@dataclass(frozen=True)
class Drawn:
    """A request that is to be sent.

    Attributes:
        number: Draws it again.
        form: How it is asked, of `FORMS`.
        prompts: One, or for "list" and "stream" several.
        config: Makes its generation config, which may be refused.
        leave: The caller goes after so many pieces; None: never.
    """

    number: int
    form: str
    prompts: tuple[object, ...]
    config: dict[str, Any]
    leave: int | None
    do_preprocess: bool


class Drawing:
    """Draws requests for an engine with `window` tokens.

    `bad` is the share of requests with something wrong, `large` that of those with large pictures;
    the first `largest_first` requests take as much memory as any, and after them each thing that is
    seldom drawn comes once: what it takes at its first use is taken by then.
    """

    def __init__(
        self,
        seed: int,
        pictures: Pictures,
        window: int,
        *,
        bad: float = 0.25,
        large: float = 0.004,
        largest_first: int = 0,
    ) -> None:
        self._largest_first = largest_first
        self._seed, self._pictures, self._window = seed, pictures, window
        self._bad, self._large = bad, large if pictures.large else 0.0
        files = [("what is this?", file) for file in (*pictures.large, *pictures.bad)]
        self._seldom: list[tuple[object, dict[str, Any]]] = [
            *((prompt, {"max_new_tokens": 1}) for prompt in (*BAD_PROMPTS, *files)),
            *(("hello", config) for config in BAD_CONFIGS),
            *(("hello", {"max_new_tokens": 2, name: value}) for name, value in OPTIONS),
        ]

    def request(self, number: int) -> Drawn:
        """The request of that number."""
        draw = random.Random(self._seed * 1_000_003 + number)
        if number < self._largest_first:
            return self._largest(number, draw)
        if self._largest_first and number - self._largest_first < len(self._seldom):
            prompt, config = self._seldom[number - self._largest_first]
            return Drawn(number, "call", (prompt,), config, None, True)
        form = draw.choice(FORMS)
        count = draw.randint(1, 5) if form in ("list", "stream") else 1
        return Drawn(
            number,
            form,
            tuple(self._prompt(draw) for _ in range(count)),
            self._config(draw),
            draw.randint(0, 6) if draw.random() < 0.3 else None,
            draw.random() < 0.9,
        )

    def _largest(self, number: int, draw: random.Random) -> Drawn:
        """A list of the longest text and of many images, with answers as long as may be.

        All of them together fill the cache of features, with the pictures in each of their forms.
        """
        text = " ".join(draw.choices(WORDS, k=2 * self._window))
        arrays = self._pictures.loaded.values()
        forms = [*self._pictures.usual, *arrays, *map(PIL.Image.fromarray, arrays)]
        images = [draw.choices(forms, k=12) for _ in range(4)]
        prompts = (text, *(("what is this?", some) for some in images))
        return Drawn(number, "list", prompts, {"max_new_tokens": 2 * self._window}, None, True)

    def _prompt(self, draw: random.Random) -> object:
        if draw.random() < self._bad / 3:
            return draw.choice(BAD_PROMPTS)
        text = self._text(draw)
        count = draw.choice((0, 0, 0, 1, 1, 1, 1, 2, 3, draw.randint(4, 16), draw.randint(0, 64)))
        if count == 0:
            return draw.choice([text, [{"role": "user", "content": text}]])
        images = [self._image(draw, f) for f in self._files(draw, count)]
        if draw.random() < 0.1:  # not always as many as there are images
            text = f"{IMAGE_TOKEN} {text}" * draw.choice((1, count))
        if draw.random() < 0.4 and all(isinstance(image, Path | str) for image in images):
            parts = [{"type": "image_url", "image_url": {"url": str(image)}} for image in images]
            place = draw.randint(0, count)
            content = [*parts[:place], {"type": "text", "text": text}, *parts[place:]]
            return [{"role": "user", "content": content}]
        return text, images[0] if count == 1 else images

    def _text(self, draw: random.Random) -> str:
        """Mostly short; up to twice the window."""
        words = draw.choice((1, 3, 8, 20, 20, draw.randint(0, 2 * self._window)))
        return " ".join(draw.choices(WORDS, k=words))

    def _files(self, draw: random.Random, count: int) -> list[Path]:
        files = draw.choices(self._pictures.usual, k=count)
        if draw.random() < self._large:
            files[0] = draw.choice(self._pictures.large)
        if draw.random() < self._bad / 3:
            files[-1] = draw.choice(self._pictures.bad)
        return files

    def _image(self, draw: random.Random, path: Path) -> object:
        """One of the forms that an image may have."""
        small = path.exists() and path.stat().st_size < 300_000
        pixels = self._pictures.loaded.get(path)
        match draw.choice(("path", "text", "url", "bytes", "data", "pillow", "array")):
            case "bytes" if path.exists():
                return path.read_bytes()
            case "data" if small:
                return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
            case "pillow" if pixels is not None:
                return PIL.Image.fromarray(pixels)
            case "array" if pixels is not None:
                return pixels
            case "text":
                return str(path)
            case "url":
                return path.absolute().as_uri()
            case _:
                return path

    def _config(self, draw: random.Random) -> dict[str, Any]:
        if draw.random() < self._bad / 3:
            return draw.choice(BAD_CONFIGS)
        fields: dict[str, Any] = {"max_new_tokens": draw.choice((1, 2, 5, 12, 30))}
        if draw.random() < 0.02:
            fields["max_new_tokens"] = draw.choice((None, 2 * self._window))
        if draw.random() < 0.5:
            fields |= {
                "top_k": draw.choice((0, 1, 40)),
                "top_p": draw.choice((0.0, 0.8, 1.0)),
                "temperature": draw.choice((0.0, 0.6, 2.0)),
                "random_seed": draw.randint(0, 99),
            }
        for name, value in OPTIONS:
            if draw.random() < 0.04:
                fields[name] = value
        return fields


# Beside the usual fields, each now and then.
OPTIONS: tuple[tuple[str, Any], ...] = (
    ("ignore_eos", True),
    ("min_new_tokens", 4),
    ("stop_words", ["star", "the", "."]),
    ("bad_words", ["circle"]),
    ("stop_token_ids", [10, 11]),
    ("repetition_penalty", 1.3),
    ("logprobs", 3),
    ("output_logits", "generation"),
    ("output_logits", "all"),
    ("return_ppl", True),
    ("include_stop_str_in_output", True),
    ("response_format", {"type": "choice", "choice": ["yes", "no"]}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "boolean"}}}),
)
BAD_CONFIGS: tuple[dict[str, Any], ...] = (
    {"max_new_tokens": 0},
    {"max_new_tokens": -1},
    {"max_new_tokens": "many"},
    {"temperature": float("nan")},
    {"temperature": -1.0},
    {"top_p": 2.0},
    {"top_k": -3},
    {"top_k": 2**70},
    {"random_seed": -1},
    {"stop_words": [7]},
    {"stop_token_ids": [10**9]},
    {"bad_words": "circle"},
    {"n": 0},
    {"logprobs": -2},
    {"response_format": {"type": "xml"}},
    {"response_format": {"type": "regex", "regex": "(?=a)b"}},
    {"response_format": {"type": "json_schema", "json_schema": {"schema": {"if": {}}}}},
)
BAD_PROMPTS: tuple[object, ...] = (
    None,
    42,
    b"bytes",
    (),
    ("text",),
    ("text", 7),
    ("text", [None]),
    ("text", []),
    (7, "image.png"),
    [],
    [[]],
    [{}],
    [{"role": "user"}],
    [{"role": "king", "content": "hi"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": [{"type": "video"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}],
    {"role": "user", "content": "hi"},
    ("text", "http://127.0.0.1:1/x.png"),
    ("text", "no/such/file.png"),
    ("text", np.zeros((3, 3, 7), np.uint8)),
    ("text", np.zeros((3, 3), np.float64)),
    "\ud800",
    f"{IMAGE_TOKEN} but no image",
)
