"""From a request to a job: the prompt rendered and checked, its images as pixel values.

In the order of cost: nothing is fetched or decoded for a prompt that does not fit the window, and
nothing is decoded whose features are known, or whose tokens are in the cache.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Protocol

from msgspec import Struct, field

from vlmforge.backends.features import Features
from vlmforge.errors import ContextLengthError, TokenLedger
from vlmforge.inputs.messages import Conversation
from vlmforge.inputs.render import RenderedPrompt
from vlmforge.kv.cache import Keys
from vlmforge.outputs.generation_config import TokenFacts
from vlmforge.outputs.grammar import Guides
from vlmforge.outputs.token_generator import TokenGenerator
from vlmforge.runner.job import Job
from vlmforge.runner.stages import Engine
from vlmforge.runner.terms import Terms
from vlmforge.scheduler.request import Request
from vlmforge.vl.boxes import Grounding
from vlmforge.vl.load import OpenedImage
from vlmforge.vl.pixel_room import PIXEL_ROOM
from vlmforge.vl.prepared import PreparedImage, deferred, encoded


class Caches(Protocol):
    """What is known already. From any thread, as hints: it may be gone when the request runs."""

    def known_features(self, digest: bytes) -> Features | None:
        """Features of an image that was encoded before, if they are kept."""

    def cached(self, keys: Keys, terms: Terms) -> int:
        """How many first tokens of a prompt are in the cache now."""


class InFlight:
    """Images that some request has prepared or is preparing: another one that needs it waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._making: weakref.WeakValueDictionary[bytes, threading.Lock] = (
            weakref.WeakValueDictionary()
        )
        self._made: weakref.WeakValueDictionary[bytes, PreparedImage] = (
            weakref.WeakValueDictionary()
        )

    def get(self, digest: bytes, make: Callable[[], PreparedImage]) -> PreparedImage:
        """The image, made unless somebody holds it already."""
        with self._lock:
            making = self._making.setdefault(digest, threading.Lock())
        with making:
            found = self._made.get(digest)
            if found is None:
                found = make()
                with self._lock:
                    self._made[digest] = found
            return found


class Preparation(Struct, frozen=True):
    """Makes the jobs of an engine. From any thread.

    Attributes:
        engine: Whose prompts and images.
        caches: Of the worker.
        facts: Of the engine, see `token_facts`.
    """

    engine: Engine
    caches: Caches
    facts: TokenFacts
    _in_flight: InFlight = field(default_factory=InFlight)

    def job(self, request: Request) -> Job:
        """The job of a request.

        Raises:
            PromptError, ConfigError, ContextLengthError, ImageError: it cannot be run.
            CancelledError: nobody wants it any more.
        """
        watch = request.watch
        conversation = request.conversation
        if self.engine.needs_sizes:
            with watch.stage("load"):
                conversation = self.engine.opened(conversation)
        with watch.stage("preprocess"):
            conversation, rendered = self.engine.fitted(
                conversation, do_preprocess=request.do_preprocess
            )
            plan = request.config.resolved(self.facts)
            budget = self._budget(rendered, plan.max_new_tokens)
        request.check()
        if conversation.images:
            with watch.stage("load"):
                conversation = self.engine.opened(conversation)
        fresh = plan.wants_prompt_logits
        images = self._images(opened_images(conversation), rendered, request, fresh=fresh)
        request.check()
        grounding = self._grounding(conversation, request)
        generators = [
            TokenGenerator(
                self.engine.tokenizer,
                self.engine.manifest.decode.vocab_size,
                plan.choice(answer.choice),
                rendered,
                budget,
                answer,
                grounding,
            )
            for answer in request.expect(plan.n)
        ]
        likeliest = plan.sampling.likeliest and plan.output_logits is None
        first, *others = (
            Job(
                rendered,
                (),
                generator,
                terms=request.terms,
                cancelled=request.cancelled,
                likeliest=likeliest,
            )
            for generator in generators
        )
        first.images, first.siblings = images, others
        return first

    def _images(
        self,
        images: Sequence[OpenedImage],
        rendered: RenderedPrompt,
        request: Request,
        *,
        fresh: bool,
    ) -> list[PreparedImage]:
        """Those with pixels or features whose tokens are not in the cache, or are wanted `fresh`.

        Should tokens leave the cache before the request runs, the worker makes the others itself.
        """
        if not images:
            return []
        with request.watch.stage("load"):
            contents = [request.terms.content(image.digest) for image in images]
        made = [
            deferred(
                self.engine.features_digest(image, content),
                functools.partial(self._image, image, content),
            )
            for image, content in zip(images, contents, strict=True)
        ]
        there = 0
        if not fresh:
            there = self.caches.cached(self.engine.keys(rendered, made), request.terms)
        needed = {s.image for s in rendered.image_spans if s.start + s.length > there}
        for index in sorted(needed):
            with request.watch.stage("image_wait"):  # for whoever is making it just now
                made[index] = self._image(images[index], contents[index], request)
        return made

    def _image(
        self, image: OpenedImage, content: bytes, request: Request | None = None
    ) -> PreparedImage:
        """With pixels or features; `request` is whose preparation it is a part of."""
        digest = self.engine.features_digest(image, content)
        stage = nullcontext if request is None else request.watch.stage
        ended = _never if request is None else request.cancelled.is_set

        def make() -> PreparedImage:
            known = self.caches.known_features(digest)
            if known is not None:
                return encoded(digest, known, functools.partial(self._image, image, content))
            with PIXEL_ROOM.hold(image.size, image.name, ended):
                with stage("load"):
                    pixels = image.decode(ended)
                with stage("preprocess"):
                    return self.engine.prepare_image(pixels, content, image.pixel_range)

        return self._in_flight.get(digest, make)

    def _grounding(self, kept: Conversation, request: Request) -> Grounding | None:
        """`kept` is what is left of the request's conversation: the latest of its images."""
        box_format = self.engine.manifest.prompt.box_format
        if box_format is None or not (images := opened_images(kept)):
            return None
        return Grounding(box_format, images[-1].size, len(request.conversation.images) - 1)

    def _budget(self, rendered: RenderedPrompt, asked: int | None) -> int:
        """Tokens that may be generated: what was asked for (None: all), cut to what fits."""
        window, prompt = self.engine.options.capacity, len(rendered.token_ids)
        requested = max(1, window - prompt) if asked is None else asked
        if prompt >= window:
            raise ContextLengthError(
                TokenLedger(rendered.text_tokens, rendered.image_tokens, requested, window)
            )
        return min(requested, window - prompt)


def _never() -> bool:
    return False


def opened_images(conversation: Conversation) -> list[OpenedImage]:
    """The images of a conversation whose images are open, in order."""
    sources = [image.source for image in conversation.images]
    return [source for source in sources if isinstance(source, OpenedImage)]


def token_facts(engine: Engine) -> TokenFacts:
    """What a generation plan needs to know of an engine."""
    return TokenFacts(
        vocab_size=engine.manifest.decode.vocab_size,
        eos_ids=engine.manifest.decode.eos_ids,
        template_stop_words=engine.template.stop_words,
        special_tokens=engine.tokenizer.special_tokens,
        encode=engine.tokenizer.encode,
        guides=Guides(
            engine.tokenizer.json, engine.manifest.decode.vocab_size, engine.manifest.decode.eos_ids
        ),
    )
