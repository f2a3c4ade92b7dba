"""A loaded engine: its stages, each as a function. Pipeline and verification both run on these."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import numpy as np
import PIL.Image
from msgspec import structs

from vlmforge.backends import (
    DecoderBatch,
    DecoderSession,
    FloatArray,
    IntArray,
    LikeliestDecoder,
    LoadOptions,
    VisionSession,
)
from vlmforge.backends.choice import (
    BegunFirst,
    BegunPrompts,
    BegunTokens,
    Choice,
    ChoosingDecoder,
    FirstTokenDecoder,
    Found,
    OverlappingDecoder,
)
from vlmforge.backends.features import Features, ManyViews, joined
from vlmforge.engine.images import ImagePolicy
from vlmforge.engine.images.patch_inputs import NO_ARRAYS, Grid
from vlmforge.engine.images.pixels import AS_ENGINE, Colour, Layout, PixelRange, Size
from vlmforge.engine.manifest import Manifest
from vlmforge.engine.positions.in_graph import AXES, PlacedGrid, Places
from vlmforge.inputs.history import newest_turns
from vlmforge.inputs.image_names import given_name
from vlmforge.inputs.messages import Conversation, Image, ImageSource, Message, Text
from vlmforge.inputs.pixel_range import policy_within
from vlmforge.inputs.render import RenderedPrompt, render_prompt
from vlmforge.inputs.template_choice import ActiveTemplate
from vlmforge.inputs.tokenizer import TextTokenizer
from vlmforge.kv.cache import Keys
from vlmforge.runner.clock import PartClock
from vlmforge.runner.decoder_input import DecoderInput as DecoderInput
from vlmforge.runner.decoder_input import PromptPart, alone, together
from vlmforge.vl.decode import upright_size
from vlmforge.vl.image_limits import DEFAULT_LIMITS, ImageLimits
from vlmforge.vl.load import OpenedImage, open_image
from vlmforge.vl.prepared import PreparedImage, features_digest, prepare, row_keys
from vlmforge.vl.preprocess import preprocess


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
    _sparing: LikeliestDecoder | None = field(init=False, repr=False)
    choosing: ChoosingDecoder | None = field(init=False, repr=False)
    overlapping: OverlappingDecoder | None = field(init=False, repr=False)
    first: FirstTokenDecoder | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Asked once: to ask whether something fulfils a protocol takes as long as half a step's
        # bookkeeping.
        decoder = self.decoder
        for name, able in (
            ("_sparing", isinstance(decoder, LikeliestDecoder)),
            ("choosing", isinstance(decoder, ChoosingDecoder) and decoder.chooses),
            ("overlapping", isinstance(decoder, OverlappingDecoder)),
            ("first", isinstance(decoder, FirstTokenDecoder)),
        ):
            object.__setattr__(self, name, decoder if able else None)

    def let_go(self) -> None:
        """Let the loaded parts go, which nothing runs any more, whoever still has this engine."""
        for name in ("vision", "decoder", "_sparing", "choosing", "overlapping", "first"):
            object.__setattr__(self, name, None)

    def on_background(self, colour: Colour) -> Engine:
        """This engine with transparent images composited on `colour`."""
        image = self.manifest.image
        shown = structs.replace(image, format=structs.replace(image.format, background=colour))
        manifest = structs.replace(self.manifest, image=shown)
        return dataclasses.replace(self, manifest=manifest)

    def with_pixels(self, limits: PixelRange) -> Engine:
        """This engine with other limits of an image's pixels.

        Raises:
            ConfigError: see `ImagePolicy.within`.
        """
        if limits == AS_ENGINE:
            return self
        image = self.manifest.image.within(limits, self.options.capacity)
        tokens = image.most_tokens(self.manifest.decode.tokens_per_image)
        decode = structs.replace(self.manifest.decode, tokens_per_image=tokens)
        manifest = structs.replace(self.manifest, image=image, decode=decode)
        return dataclasses.replace(self, manifest=manifest)

    def prepare_image(
        self, image: PIL.Image.Image, digest: bytes | None = None, asked: PixelRange = AS_ENGINE
    ) -> PreparedImage:
        """Preprocess by the engine's image policy (ImageError, PromptError otherwise).

        `digest` identifies the image's content; None: its pixel values do.
        """
        policy, size = policy_within(self.manifest.image, asked), upright_size(image)
        rows, grid = policy.rows(size), policy.grid(size)
        return prepare(preprocess(image, policy), rows, digest, grid)

    def features_digest(self, image: OpenedImage, content: bytes) -> bytes:
        """What `prepare_image(image.decode(), content, ...)` would have as its digest."""
        policy, size = self._sized(image)
        return features_digest(content, policy.rows(size), policy.grid(size))

    @property
    def views(self) -> int:
        """Views that the vision part runs at once as cheaply as it can."""
        return self.vision.views if isinstance(self.vision, ManyViews) else 1

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
        policy, size = self._sized(image)
        rows = policy.rows(size)
        return self.manifest.decode.tokens_per_image if rows is None else len(rows)

    def _sized(self, image: ImageSource) -> tuple[ImagePolicy, Size]:
        opened = self.open_image(image)
        return policy_within(self.manifest.image, opened.pixel_range), opened.size

    def image_layout(self, image: ImageSource) -> Layout:
        """What stands for an image in a prompt (errors as `image_tokens`)."""
        size = self.open_image(image).size if self.needs_sizes else (0, 0)
        return self.manifest.image.layout(size, self.image_tokens(image))

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
            opened = self.open_image(given.source)
            if given.pixel_range != opened.pixel_range:
                opened = dataclasses.replace(opened, pixel_range=given.pixel_range)
            return Image(opened, given_name(given))

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
        for image in conversation.images:
            policy_within(self.manifest.image, image.pixel_range)
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
        rendered = render_prompt(
            conversation,
            policy=self.manifest.prompt,
            template=self.template,
            encoder=self.tokenizer,
            layouts=[self.image_layout(image.source) for image in conversation.images],
            preprocess=do_preprocess,
        )
        if not self.manifest.decode.positions.turn_width:
            return rendered
        grids = [self._grid(image.source) for image in conversation.images]
        spans = (dataclasses.replace(span, grid=grids[span.image]) for span in rendered.image_spans)
        return dataclasses.replace(rendered, image_spans=tuple(spans))

    def _grid(self, image: ImageSource) -> Grid | None:
        policy, size = self._sized(image)
        return policy.grid(size)

    def keys(self, rendered: RenderedPrompt, images: Sequence[PreparedImage]) -> Keys:
        """int64 `[tokens]`, what identifies each token's content; no image need be encoded."""
        keys = np.array(rendered.token_ids, np.int64)
        for span in rendered.image_spans:
            place = slice(span.start, span.start + span.length)
            last = span.first + span.length
            keys[place] = row_keys(images[span.image], last)[span.first :]
        return keys

    def rotary_level(self, tokens: int) -> int:
        """The level of a sequence whose prompt has that many tokens (see `PositionPolicy`)."""
        return self.manifest.decode.positions.level(tokens)

    def decoder_input(
        self,
        rendered: RenderedPrompt,
        features: Sequence[Features | None],
    ) -> DecoderInput:
        """Point the image positions of a prompt at the rows of its images' features.

        `features`, one for each image, are None where the tokens will not be run: they are in the
        cache.
        """
        ids = np.array(rendered.token_ids, np.int64)
        begins = [self.manifest.decode.vocab_size]
        begins += [0 if known is None else len(known) for known in features]
        rows_of = [*itertools.accumulate(begins)]
        for span in rendered.image_spans:
            if features[span.image] is not None:
                rows = np.arange(span.first, span.first + span.length, dtype=np.int64)
                ids[span.start : span.start + span.length] = rows_of[span.image] + rows
        found = [rows for rows in features if rows is not None]
        whole = joined(found) if found else None
        places = self._places(rendered)
        lag = 0 if places is None else len(ids) - 1 - int(places.max(initial=-1))
        return DecoderInput(ids, whole, self.rotary_level(len(ids)), places, lag)

    def _places(self, rendered: RenderedPrompt) -> Places | None:
        spans = rendered.image_spans
        grids = [PlacedGrid(span.start, *(span.grid or (1, span.length))) for span in spans]
        return self.manifest.decode.positions.places(len(rendered.token_ids), grids)

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
        found: FloatArray = self._run(
            alone(PromptPart(place, chunk, past), logits, self.manifest.decode)
        )[0]
        # It may be a step of decoding to the decoder.
        return found.copy() if len(chunk.ids) == 1 else found

    def begin_prompts(
        self, parts: Sequence[PromptPart], logits: Literal["none", "last"]
    ) -> BegunPrompts:
        """As `prefill` (`prefill_together`: "last") for who is `overlapping`."""
        assert self.overlapping is not None
        return self.overlapping.begin_prompts(self._parts(parts, logits))

    def begin_first(
        self, parts: Sequence[PromptPart], choices: Sequence[Choice | None] | None
    ) -> BegunFirst:
        """The same for who chooses the `first` tokens (see `FirstTokenDecoder`)."""
        assert self.first is not None
        return self.first.begin_first(self._parts(parts, "last"), choices)

    def _parts(self, parts: Sequence[PromptPart], logits: Literal["none", "last"]) -> DecoderBatch:
        if len(parts) > 1:
            return together(parts, self.manifest.decode)
        return alone(parts[0], logits, self.manifest.decode)

    def prefill_together(self, parts: Sequence[PromptPart]) -> FloatArray:
        """Run the next tokens of several sequences at once; logits `[n, vocab_size]` after each.

        As `prefill` of each alone, where `LoadOptions.prompts` are as many, and not `apart`.
        """
        return self._run(together(parts, self.manifest.decode))[:, 0].copy()

    def decode(
        self,
        places: Sequence[Sequence[int]],
        tokens: IntArray,
        lengths: IntArray,
        levels: IntArray,
        lags: IntArray | None = None,
        *,
        likeliest: bool = False,
        choices: Sequence[Choice | None] | None = None,
    ) -> Sequence[Found]:
        """One step of sequences: `tokens` `[B]` to logits `[B, vocab_size]`.

        With `likeliest` the largest one's ids `[B]` will do, and are given by decoders that can
        (`LikeliestDecoder`). `choices` `[B]` are for who is `choosing`.

        `places` `[B]` are where they are (see `KVCache.place`); `lengths` and `levels` `[B]` are
        the tokens before, and each sequence's rotary level; `lags` `[B]` see `DecoderInput.lag`.
        """
        batch = self._next_tokens(places, tokens, lengths, levels, lags)
        with self.clock.running():
            if choices is not None and self.choosing is not None:
                return self.choosing.choose(batch, choices)
            if likeliest and self._sparing is not None:
                return cast("Sequence[Found]", self._sparing.likeliest(batch))
            return cast("Sequence[Found]", self.decoder.step(batch)[:, 0])

    def begin(
        self,
        places: Sequence[Sequence[int]],
        tokens: IntArray,
        lengths: IntArray,
        levels: IntArray,
        lags: IntArray,
        choices: Sequence[Choice] | None,
        ahead: IntArray,
    ) -> BegunTokens:
        """As `decode`, for who is `overlapping` (see `OverlappingDecoder.begin`)."""
        assert self.overlapping is not None
        batch = self._next_tokens(places, tokens, lengths, levels, lags)
        return self.overlapping.begin(batch, choices, ahead)

    def _next_tokens(
        self,
        places: Sequence[Sequence[int]],
        tokens: IntArray,
        lengths: IntArray,
        levels: IntArray,
        lags: IntArray | None,
    ) -> DecoderBatch:
        turns, positions = None, self.manifest.decode.positions
        if positions.turn_width:
            behind = lengths if lags is None else lengths - lags
            turns = positions.turns(np.repeat(behind[:, None, None], AXES, axis=2))
        zeros = np.zeros((len(tokens), 1), np.int64)
        slots = tuple([place[0] for place in places])
        levels_given = levels if positions.has_levels else None
        return DecoderBatch(
            slots, tokens[:, None], lengths, None, zeros, levels_given, places, turns
        )

    def encode(
        self, pixel_values: FloatArray, grid: Grid | None = None
    ) -> FloatArray | Sequence[Features]:
        """Pixel values of images, all of one grid if they have one, to features `[n, rows, width]`.

        See `VisionSession.encode`.
        """
        arrays = NO_ARRAYS if grid is None else self.manifest.image.arrays(grid)
        with self.clock.running():
            return self.vision.encode(pixel_values, arrays)

    def _run(self, batch: DecoderBatch) -> FloatArray:
        with self.clock.running():
            return self.decoder.step(batch)
