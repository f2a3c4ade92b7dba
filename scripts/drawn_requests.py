"""Requests of every form, good and bad, drawn by a seed; and what must be true of each answer.

`fuzz.py` and `soak.py` send them. A request is drawn by its number alone, so that one that failed
can be sent again: whichever caller sends it, and whatever runs beside it.
"""

from __future__ import annotations

import asyncio
import base64
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from vlmforge import GenerationConfig, Pipeline, Response, Session
from vlmforge.errors import VlmforgeError
from vlmforge.vl.constants import IMAGE_TOKEN

# What a caller did wrong, or the memory does not hold; anything else is a fault of ours.
EXPECTED_CODES = frozenset(
    {
        "invalid_config",
        "invalid_request",
        "invalid_image",
        "image_fetch_failed",
        "context_length_exceeded",
    }
)
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

    `bad` is the share of requests with something wrong, `large` that of those with large pictures.
    """

    def __init__(
        self, seed: int, pictures: Pictures, window: int, *, bad: float = 0.25, large: float = 0.004
    ) -> None:
        self._seed, self._pictures, self._window = seed, pictures, window
        self._bad, self._large = bad, large if pictures.large else 0.0

    def request(self, number: int) -> Drawn:
        """The request of that number."""
        draw = random.Random(self._seed * 1_000_003 + number)
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


# --- sending --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """How one prompt ended.

    Attributes:
        end: A finish reason, the code of a typed error, "left" or "looked".
        tokens: That were generated.
        fault: What must not be; None: nothing.
    """

    end: str
    tokens: int = 0
    fault: str | None = None


def send(pipe: Pipeline, drawn: Drawn, window: int) -> list[Outcome]:
    """Send a request and judge what comes of each of its prompts; raises nothing."""
    try:
        config = GenerationConfig(**drawn.config)
        found = _SENDERS[drawn.form](pipe, drawn, config)
        return [judged(answer, drawn.config, window) for answer in found]
    except VlmforgeError as error:
        return [_refused(error.code, f"{type(error).__name__}: {error}")]
    except BaseException as error:  # noqa: BLE001 - that is what is looked for
        return [Outcome("untyped", fault=f"{type(error).__name__}: {error}")]


def judged(answer: Response | str, config: dict[str, Any], window: int) -> Outcome:
    """Whether a whole answer may be as it is; a text says what else was done."""
    if isinstance(answer, str):
        return Outcome(answer)
    if answer.finish_reason == "error":
        return _refused(str(answer.error_code), str(answer.error_message))
    tokens, fault = answer.generate_token_len, None
    most = config.get("max_new_tokens", 512)
    room = window - answer.input_token_len
    if answer.finish_reason not in ("stop", "length"):
        fault = f"nobody cancelled it, but it ended with {answer.finish_reason!r}"
    elif answer.finish_reason == "length" and tokens != min(most or window, room):
        fault = f"cut at {tokens} tokens of {most}, with room for {room}"
    elif len(answer.token_ids) != tokens:
        fault = f"{len(answer.token_ids)} ids of {tokens} tokens"
    return Outcome(str(answer.finish_reason), tokens, fault)


def _refused(code: str, message: str) -> Outcome:
    return Outcome(code, fault=None if code in EXPECTED_CODES else message)


def _call(pipe: Pipeline, drawn: Drawn, config: GenerationConfig) -> list[Response | str]:
    answer = pipe(drawn.prompts[0], config, do_preprocess=drawn.do_preprocess)
    return list(answer) if isinstance(answer, list) else [answer]


def _list(pipe: Pipeline, drawn: Drawn, config: GenerationConfig) -> list[Response | str]:
    answers = pipe(list(drawn.prompts), config, do_preprocess=drawn.do_preprocess)
    return list(answers) if isinstance(answers, list) else [answers]


def _stream(pipe: Pipeline, drawn: Drawn, config: GenerationConfig) -> list[Response | str]:
    pieces = pipe.stream_infer(list(drawn.prompts), config, do_preprocess=drawn.do_preprocess)
    return _gathered(pieces, drawn.leave)


def _chat(pipe: Pipeline, drawn: Drawn, config: GenerationConfig) -> list[Response | str]:
    session = pipe.chat("hi", gen_config=GenerationConfig(max_new_tokens=2))
    assert isinstance(session, Session)
    pipe.chat(drawn.prompts[0], session, config, do_preprocess=drawn.do_preprocess)
    assert session.response is not None
    return [session.response]


def _chat_stream(pipe: Pipeline, drawn: Drawn, config: GenerationConfig) -> list[Response | str]:
    pieces = pipe.chat(
        drawn.prompts[0], gen_config=config, stream_response=True, do_preprocess=drawn.do_preprocess
    )
    assert not isinstance(pieces, Session)
    return _gathered(pieces, drawn.leave)


def _look(pipe: Pipeline, drawn: Drawn, _: GenerationConfig) -> list[Response | str]:
    pipe.count_tokens(drawn.prompts[0], do_preprocess=drawn.do_preprocess)
    return ["looked"]


def _generate(pipe: Pipeline, drawn: Drawn, config: GenerationConfig) -> list[Response | str]:
    return asyncio.run(_generated(pipe, drawn, config, stream=True))


def _generate_whole(pipe: Pipeline, drawn: Drawn, config: GenerationConfig) -> list[Response | str]:
    return asyncio.run(_generated(pipe, drawn, config, stream=False))


async def _generated(
    pipe: Pipeline, drawn: Drawn, config: GenerationConfig, *, stream: bool
) -> list[Response | str]:
    """Leaves early by leaving the loop, by stopping the session, or by cancelling the task."""
    whole, left = Response(), drawn.leave
    messages, way = drawn.prompts[0], drawn.number % 3

    async def read() -> bool:
        pieces = pipe.generate(
            messages, drawn.number, config, stream, do_preprocess=drawn.do_preprocess
        )
        count = 0
        async with aclosing(pieces):
            async for piece in pieces:
                whole.extend(Response(**_fields(piece)))
                count += 1
                if left is not None and count > left:
                    if way == 0:
                        return False
                    await pipe.stop_session(drawn.number)
        return True

    if left is None or way < 2:
        ended = await read()
        stopped = whole.finish_reason == "abort" and left is not None
        return ["left" if stopped or not ended else whole]
    try:
        await asyncio.wait_for(read(), 0.003 * left)
    except TimeoutError:
        return ["left"]
    return ["left" if whole.finish_reason == "abort" else whole]


def _fields(piece: Any) -> dict[str, Any]:
    return {
        "text": piece.response,
        "generate_token_len": piece.generate_token_len,
        "input_token_len": piece.input_token_len,
        "finish_reason": piece.finish_reason,
        "token_ids": piece.token_ids or [],
    }


def _gathered(pieces: Iterable[Response], leave: int | None) -> list[Response | str]:
    """Whole answers of a stream; those that had not ended when the caller went are "left"."""
    whole: dict[int, Response] = {}
    for number, piece in enumerate(pieces):
        whole.setdefault(piece.index, Response()).extend(piece)
        if number == leave:
            break
    assert leave is not None or all(one.finish_reason for one in whole.values())
    return [one if one.finish_reason else "left" for one in whole.values()]


_SENDERS: dict[str, Callable[[Pipeline, Drawn, GenerationConfig], Sequence[Response | str]]] = {
    "call": _call,
    "list": _list,
    "stream": _stream,
    "chat": _chat,
    "chat_stream": _chat_stream,
    "generate": _generate,
    "generate_whole": _generate_whole,
    "look": _look,
}
