"""From a request to a job: the prompt rendered and checked, its images as pixel values.

In the order of cost: nothing is fetched or decoded for a prompt that does not fit the window, and
nothing is decoded whose features are known.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from vlmforge.backends import FloatArray
from vlmforge.errors import ContextLengthError, TokenLedger
from vlmforge.inputs.messages import Conversation
from vlmforge.inputs.render import RenderedPrompt
from vlmforge.outputs.generation_config import TokenFacts
from vlmforge.outputs.grammar import Guides
from vlmforge.outputs.token_generator import TokenGenerator
from vlmforge.runner.job import Job
from vlmforge.runner.stages import Engine
from vlmforge.scheduler.request import Request
from vlmforge.vl.boxes import Grounding
from vlmforge.vl.load import OpenedImage
from vlmforge.vl.prepared import PreparedImage, encoded


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


@dataclass(frozen=True, slots=True)
class Preparation:
    """Makes the jobs of an engine. From any thread.

    Attributes:
        engine: Whose prompts and images.
        known_features: Features by their digest, where they are kept.
        facts: Of the engine, see `token_facts`.
    """

    engine: Engine
    known_features: Callable[[bytes], FloatArray | None]
    facts: TokenFacts
    _in_flight: InFlight = field(default_factory=InFlight)

    def job(self, request: Request) -> Job:
        """The job of a request.

        Raises:
            PromptError, ConfigError, ContextLengthError, ImageError: it cannot be run.
            CancelledError: nobody wants it any more.
        """
        watch = request.watch
        with watch.stage("load"):
            conversation = request.conversation
            if self.engine.needs_sizes:
                conversation = self.engine.opened(conversation)
        with watch.stage("preprocess"):
            conversation, rendered = self.engine.fitted(
                conversation, do_preprocess=request.do_preprocess
            )
            plan = request.config.resolved(self.facts)
            budget = self._budget(rendered, plan.max_new_tokens)
        request.check()
        with watch.stage("load"):
            conversation = self.engine.opened(conversation)
        images = [self._image(image, request) for image in opened_images(conversation)]
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
        first, *others = (
            Job(rendered, (), generator, terms=request.terms, cancelled=request.cancelled)
            for generator in generators
        )
        first.images, first.siblings = images, others
        return first

    def _image(self, image: OpenedImage, request: Request) -> PreparedImage:
        with request.watch.stage("load"):
            content = request.terms.content(image.digest)
            digest = self.engine.features_digest(image, content)

        def make() -> PreparedImage:
            known = self.known_features(digest)
            if known is not None:
                return encoded(digest, known)
            with request.watch.stage("load"):
                pixels = image.decode(request.cancelled.is_set)
            with request.watch.stage("preprocess"):
                return self.engine.prepare_image(pixels, content)

        with request.watch.stage("image_wait"):  # for whoever is making it just now
            return self._in_flight.get(digest, make)

    def _grounding(self, kept: Conversation, request: Request) -> Grounding | None:
        """`kept` is what is left of the request's conversation: the latest of its images."""
        box_format, images = self.engine.manifest.prompt.box_format, opened_images(kept)
        if box_format is None or not images:
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
