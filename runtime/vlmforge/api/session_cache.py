"""What an engine keeps of a conversation: keys and values, and features of its images."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from functools import cached_property

import numpy as np
from msgspec import Struct

from vlmforge.backends import FloatArray, KeyValues
from vlmforge.engine.manifest import Manifest
from vlmforge.engine.schema import to_data, to_json
from vlmforge.errors import PromptError, SessionError
from vlmforge.inputs.messages import Conversation, Message, Text
from vlmforge.inputs.pixel_range import policy_within
from vlmforge.kv.cache import Keys
from vlmforge.runner.stages import Engine
from vlmforge.runner.terms import Terms
from vlmforge.scheduler.jobs import Jobs
from vlmforge.scheduler.loop import Loop
from vlmforge.scheduler.prepare import opened_images
from vlmforge.vl.image_limits import ImageLimits
from vlmforge.vl.prepared import encoded

logger = logging.getLogger("vlmforge")

_NEXT = Message("user", (Text("?"),))
_NO_FEATURES: FloatArray = np.empty((0, 0), np.float32)


class Kept(Struct, frozen=True):
    """What the caches have of a conversation.

    Attributes:
        pixels: Digest of how images become pixel values: of other ones, nothing here is of use.
        keys: int64 `[tokens]` of the tokens whose keys and values are in `rows`.
        salt: What these depend on beside the keys.
        rows: Keys and values; empty: of no token.
        features: `[tokens, hidden]` of images, by their digest.
    """

    pixels: str
    keys: Keys
    salt: bytes
    rows: KeyValues
    features: Mapping[bytes, FloatArray]


class SessionCache:
    """The caches of one pipeline, as sessions see them. Thread-safe."""

    def __init__(self, engine: Engine, loop: Loop) -> None:
        self._engine, self._loop = engine, loop

    @cached_property
    def engine_digest(self) -> str:
        """See the function of this name."""
        return engine_digest(self._engine.manifest)

    @cached_property
    def _pixels(self) -> str:
        return _digest(to_data(self._engine.manifest.image))

    @property
    def limits(self) -> ImageLimits:
        """What images may be here."""
        return self._engine.limits

    def check_images(self, turns: Conversation) -> None:
        """SessionError: an image asks for limits of pixels that images do not have here."""
        for image in turns.images:
            try:
                policy_within(self._engine.manifest.image, image.pixel_range)
            except PromptError as error:
                raise SessionError(
                    "A saved session has an image of other limits of pixels than this pipeline's.",
                    found=error.found,
                    expected=error.expected,
                    fix="load it into a pipeline with the VisionConfig and the session_len of the "
                    "one that it was saved from",
                ) from error

    def read(self, turns: Conversation, terms: Terms, *, do_preprocess: bool) -> Kept:
        """What is kept of some turns, their images opened, as the turn after them would find it.

        Args:
            turns: From the first on.
            terms: Of the next one, which decide whose cache it shares.
            do_preprocess: Whether it will use the chat template.

        Raises:
            BackendUnavailableError: the backend does not hand it out.
            PipelineError, CancelledError: see `Loop.check`.
        """
        engine = self._engine
        asked = Conversation((*turns.messages, _NEXT))
        conversation, rendered = engine.fitted(asked, do_preprocess=do_preprocess)
        digests = [
            engine.features_digest(image, terms.content(image.digest))
            for image in opened_images(conversation)
        ]
        images = [encoded(digest, _NO_FEATURES) for digest in digests]
        keys = engine.keys(rendered, images)

        def ask(jobs: Jobs) -> tuple[bytes, KeyValues, Mapping[bytes, FloatArray]]:
            salt = jobs.salt(len(keys), terms)
            known = {digest: self._loop.known_features(digest) for digest in digests}
            found = {digest: np.asarray(rows) for digest, rows in known.items() if rows is not None}
            return salt, jobs.read(keys, salt), found

        salt, rows, features = self._loop.ask(ask)
        return Kept(self._pixels, keys[: _tokens(rows)], salt, rows, features)

    def write(self, kept: Kept) -> None:
        """Put it back; what has no room, or was made of other pixels, is computed again.

        Raises:
            SessionError: it is of another engine's shape.
            BackendUnavailableError, PipelineError, CancelledError: see `read`.
        """
        self._check(kept)
        if kept.pixels != self._pixels:
            logger.warning("the session's cache is of other image settings: it is computed again")
            return
        if len(kept.keys) and not self._loop.ask(
            lambda jobs: jobs.write(kept.keys, kept.salt, kept.rows)
        ):
            logger.warning("no room for the session's cache now: it is computed again")
        for digest, features in kept.features.items():
            self._loop.keep_features(digest, features)

    def _check(self, kept: Kept) -> None:
        decode = self._engine.manifest.decode
        width = decode.hidden_size * decode.feature_layers
        for features in kept.features.values():
            if features.dtype.kind != "f" or features.shape != (len(features), width):
                raise _misfit(
                    f"features {features.dtype} {list(features.shape)}",
                    f"floats [tokens, {width}]",
                )
        shapes = {rows.shape[1:2] for rows in kept.rows.values()}
        if kept.keys.dtype != np.int64 or shapes - {kept.keys.shape}:
            raise _misfit(
                f"keys {kept.keys.dtype} {list(kept.keys.shape)}", "int64, one for each token"
            )


def engine_digest(manifest: Manifest) -> str:
    """sha256, in hex, of all that decides an engine's answers.

    Not where and when it was built, nor what may be chosen when it is loaded: its window, its
    batch, the colour behind transparent images, and the limits of an image's pixels.
    """
    left = _CHOSEN_AT_LOAD | manifest.image.chosen_at_load
    return _digest(_without(to_data(manifest), left))


_CHOSEN_AT_LOAD = frozenset(
    ("schema_version", "provenance", "session_len", "max_batch_size", "positions", "background")
)


def _without(data: object, names: frozenset[str]) -> object:
    """Plain data without the keys of these names, at whatever depth."""
    if isinstance(data, dict):
        return {key: _without(item, names) for key, item in data.items() if key not in names}
    return [_without(item, names) for item in data] if isinstance(data, list) else data


def _digest(data: object) -> str:
    return hashlib.sha256(to_json(data).encode("utf-8")).hexdigest()


def _tokens(rows: KeyValues) -> int:
    return next((array.shape[1] for array in rows.values()), 0)


def _misfit(found: str, expected: str) -> SessionError:
    return SessionError(
        "A saved session does not fit this engine.",
        found=found,
        expected=expected,
        fix="load it into the engine that it was saved from",
    )
