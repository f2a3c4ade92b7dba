"""A loaded engine: its stages, each as a function. Pipeline and verification both run on these."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import PIL.Image

from vlmforge.backends import (
    Backend,
    ClosableDecoder,
    DecoderBatch,
    DecoderSession,
    FloatArray,
    IntArray,
    LikeliestDecoder,
    LoadOptions,
    VisionSession,
    load_backend,
)
from vlmforge.engine.bundle import Bundle, check_sizes
from vlmforge.engine.images.pixels import Colour
from vlmforge.engine.manifest import Manifest
from vlmforge.inputs.history import newest_turns
from vlmforge.inputs.image_names import given_name
from vlmforge.inputs.messages import Conversation, Image, ImageSource, Message, Text
from vlmforge.inputs.render import RenderedPrompt, marked_tokenizer_json, render_prompt
from vlmforge.inputs.template_choice import ActiveTemplate
from vlmforge.inputs.tokenizer import TextTokenizer
from vlmforge.kv.cache import Keys
from vlmforge.runner.clock import PartClock
from vlmforge.vl.decode import upright_size
from vlmforge.vl.image_limits import DEFAULT_LIMITS, ImageLimits
from vlmforge.vl.load import OpenedImage, open_image
from vlmforge.vl.prepared import PreparedImage, features_digest, prepare, row_keys
from vlmforge.vl.preprocess import preprocess


@dataclass(frozen=True, slots=True)
class DecoderInput:
    """A prompt as the decoder takes it.

    Attributes:
        ids: int64 `[tokens]`; an id >= vocab_size is row `id - vocab_size` of `features`.
        features: `[rows, hidden]` of all images, or None without images.
        rotary_level: Of the sequence that the prompt begins (see `PositionPolicy`).
    """

    ids: IntArray
    features: FloatArray | None
    rotary_level: int = 0


@dataclass(frozen=True, slots=True)
class Engine:
    """The parts of an engine, loaded, and the functions of its stages."""

    manifest: Manifest
    tokenizer: TextTokenizer
    template: ActiveTemplate
    vision: VisionSession
    decoder: DecoderSession
    options: LoadOptions
    limits: ImageLimits = DEFAULT_LIMITS
    clock: PartClock = field(default_factory=PartClock)

    def on_background(self, colour: Colour) -> Engine:
        """This engine with transparent images composited on `colour`."""
        image = self.manifest.image
        shown = dataclasses.replace(
            image, format=dataclasses.replace(image.format, background=colour)
        )
        manifest = dataclasses.replace(self.manifest, image=shown)
        return dataclasses.replace(self, manifest=manifest)

    def prepare_image(self, image: PIL.Image.Image, digest: bytes | None = None) -> PreparedImage:
        """Preprocess by the engine's image policy (ImageError otherwise).

        `digest` identifies the image's content; None: its pixel values do.
        """
        rows = self.manifest.image.rows(upright_size(image))
        return prepare(preprocess(image, self.manifest.image), rows, digest)

    def features_digest(self, image: OpenedImage, content: bytes) -> bytes:
        """What `prepare_image(image.decode(), content)` would have as its digest."""
        return features_digest(content, self.manifest.image.rows(image.size))

    @property
    def needs_sizes(self) -> bool:
        """Whether the number of an image's tokens depends on its size."""
        return self.manifest.image.sized

    def image_tokens(self, image: ImageSource) -> int:
        """Tokens that an image takes; its header is read only if that depends on its size.

        Raises:
            ImageError: it had to be opened, and cannot be.
        """
        if not self.needs_sizes:
            return self.manifest.decode.tokens_per_image
        rows = self.manifest.image.rows(self.open_image(image).size)
        return self.manifest.decode.tokens_per_image if rows is None else len(rows)

    def open_image(self, source: ImageSource) -> OpenedImage:
        """The image with its header read, within `limits` (ImageError otherwise).

        One that was opened before is itself.
        """
        if isinstance(source, OpenedImage):
            return source
        return open_image(source, limits=self.limits)

    def opened(self, conversation: Conversation, *, but_pillow: bool = False) -> Conversation:
        """The conversation with its images opened, each under the name that it was given by.

        `but_pillow` leaves Pillow images as they are.
        """

        def block(given: Text | Image) -> Text | Image:
            if isinstance(given, Text):
                return given
            if but_pillow and isinstance(given.source, PIL.Image.Image):
                return given
            return Image(self.open_image(given.source), given_name(given))

        return Conversation(
            tuple(Message(m.role, tuple(map(block, m.blocks))) for m in conversation.messages)
        )

    def render(self, conversation: Conversation, *, do_preprocess: bool = True) -> RenderedPrompt:
        """The prompt's text, ids and image spans; the vision part is not run.

        Raises:
            PromptError: the messages cannot be rendered.
            ImageError: see `image_tokens`.
        """
        return self.fitted(conversation, do_preprocess=do_preprocess)[1]

    def fitted(
        self, conversation: Conversation, *, do_preprocess: bool = True
    ) -> tuple[Conversation, RenderedPrompt]:
        """The conversation without the turns that the engine's policy leaves out, and its prompt.

        Raises: see `render`.
        """
        if self.needs_sizes:
            conversation = self.opened(conversation)  # once, not once for each rendering
        rendered = self._render(conversation, do_preprocess)
        window = self.manifest.prompt.history_window
        if window is None or not do_preprocess or len(conversation.messages) < 2:
            return conversation, rendered
        kept = newest_turns(conversation, rendered, window)
        if kept is not conversation:
            rendered = self._render(kept, do_preprocess)
        return kept, rendered

    def _render(self, conversation: Conversation, do_preprocess: bool) -> RenderedPrompt:
        return render_prompt(
            conversation,
            policy=self.manifest.prompt,
            template=self.template,
            encoder=self.tokenizer,
            image_lengths=[self.image_tokens(image.source) for image in conversation.images],
            preprocess=do_preprocess,
        )

    def keys(self, rendered: RenderedPrompt, images: Sequence[PreparedImage]) -> Keys:
        """int64 `[tokens]`, what identifies each token's content; no image need be encoded."""
        keys = np.array(rendered.token_ids, np.int64)
        for span in rendered.image_spans:
            place = slice(span.start, span.start + span.length)
            keys[place] = row_keys(images[span.image], span.length)
        return keys

    def rotary_level(self, tokens: int) -> int:
        """The level of a sequence whose prompt has that many tokens (see `PositionPolicy`)."""
        return self.manifest.decode.positions.level(tokens)

    def decoder_input(
        self,
        rendered: RenderedPrompt,
        features: Sequence[FloatArray | None],
    ) -> DecoderInput:
        """Point the image positions of a prompt at the rows of its images' features.

        `features`, one for each image span, are None where the tokens will not be run: they are in
        the cache.
        """
        ids = np.array(rendered.token_ids, np.int64)
        row = 0
        for span, known in zip(rendered.image_spans, features, strict=True):
            if known is not None:
                rows = np.arange(row, row + span.length, dtype=np.int64)
                ids[span.start : span.start + span.length] = self.manifest.decode.vocab_size + rows
                row += span.length
        found = [rows for rows in features if rows is not None]
        whole = np.concatenate(found) if found else None
        return DecoderInput(ids, whole, self.rotary_level(len(ids)))

    def prefill(
        self,
        place: Sequence[int],
        chunk: DecoderInput,
        past: int,
        *,
        logits: Literal["none", "last", "all"],
    ) -> FloatArray:
        """Run the next tokens of a sequence that has its first `past` in the cache at `place`.

        Returns logits `[n, vocab_size]`: those after the last token (n = 1), after all, or none.
        """
        vocab = self.manifest.decode.vocab_size
        ids, features = chunk.ids, None
        rows = ids[ids >= vocab]
        if len(rows) and chunk.features is not None:
            # Only the rows of this chunk are handed over.
            first = int(rows[0]) - vocab
            features = chunk.features[first : int(rows[-1]) - vocab + 1]
            ids = np.where(ids >= vocab, ids - first, ids)
        every = np.arange(len(ids), dtype=np.int64)
        wanted = {"none": every[:0], "last": every[-1:], "all": every}[logits]
        levels = self._levels(np.array([chunk.rotary_level], np.int64))
        lengths = np.array([past], np.int64)
        batch = DecoderBatch(
            place[:1], ids[None], lengths, features, wanted[None], levels, (place,)
        )
        found: FloatArray = self._run(batch)[0]
        return found.copy() if len(ids) == 1 else found  # it may be a step of decoding to it

    def decode(
        self,
        places: Sequence[Sequence[int]],
        tokens: IntArray,
        lengths: IntArray,
        levels: IntArray,
        *,
        likeliest: bool = False,
    ) -> FloatArray | IntArray:
        """One step of sequences: `tokens` `[B]` to logits `[B, vocab_size]`.

        With `likeliest` the largest one's ids `[B]` will do, and are given by decoders that can
        (`LikeliestDecoder`).

        `places` `[B]` are where they are (see `KVCache.place`); `lengths` and `levels` `[B]` are
        the tokens before, and each sequence's rotary level.
        """
        zeros = np.zeros((len(tokens), 1), np.int64)
        slots = tuple(place[0] for place in places)
        batch = DecoderBatch(
            slots, tokens[:, None], lengths, None, zeros, self._levels(levels), places
        )
        if likeliest and isinstance(self.decoder, LikeliestDecoder):
            with self.clock.running():
                return self.decoder.likeliest(batch)
        found: FloatArray = self._run(batch)[:, 0]
        return found

    def encode(self, pixel_values: FloatArray) -> FloatArray:
        """Views `[n, 3, H, W]` to features `[n, tokens, hidden]`."""
        with self.clock.running():
            return self.vision.encode(pixel_values)

    def _run(self, batch: DecoderBatch) -> FloatArray:
        with self.clock.running():
            return self.decoder.step(batch)

    def _levels(self, levels: IntArray) -> IntArray | None:
        return levels if self.manifest.decode.positions.has_levels else None


def load_engine(bundle: Bundle, template: ActiveTemplate, options: LoadOptions) -> Engine:
    """Load the parts of an engine directory (EngineError otherwise).

    Parts may be mapped, so that a file which is cut later ends the process: sizes are compared once
    more when all are loaded, and when one cannot be.
    """
    manifest = bundle.manifest
    backend = load_backend(manifest.backend)
    text = marked_tokenizer_json(bundle.text(manifest.tokenizer_file), manifest.prompt)
    tokenizer = TextTokenizer(text)
    with ExitStack() as started:
        try:
            vision = backend.load_vision(bundle.folder, manifest, options)
            decoder = _decoder(backend, bundle, options)
            if isinstance(decoder, ClosableDecoder):
                started.callback(decoder.close)
        finally:
            # It names the file, where a backend would say that it cannot load a part.
            files = [name for part in manifest.parts for name in (part.file, *part.data)]
            check_sizes(bundle, files)
        started.pop_all()
    return Engine(
        manifest=manifest,
        tokenizer=tokenizer,
        template=template,
        vision=vision,
        decoder=decoder,
        options=options,
    )


def _decoder(backend: Backend, bundle: Bundle, options: LoadOptions) -> DecoderSession:
    folder, manifest = bundle.folder, bundle.manifest
    if manifest.parallel.tp == 1:
        return backend.load_decoder(folder, manifest, options)
    from vlmforge.backends.ranks.load import load_ranked  # not before it is known which backend

    return load_ranked(backend, folder, manifest, options)
