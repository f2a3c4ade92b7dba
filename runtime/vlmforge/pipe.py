"""The interface that users call: prompts in, responses out."""

from __future__ import annotations

import queue
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress

from vlmforge.boxes import Grounding
from vlmforge.calls import (
    Event,
    GenConfigs,
    GenOut,
    error_response,
    gen_out,
    one_for_each,
    refuse_adapter,
)
from vlmforge.engine import Engine
from vlmforge.errors import ConfigError, ContextLengthError, TokenLedger, VlmforgeError
from vlmforge.features import PreparedImage
from vlmforge.generate import TokenGenerator
from vlmforge.generation import GenerationConfig, TokenFacts
from vlmforge.grammar import Guides
from vlmforge.prompt.messages import (
    Conversation,
    Image,
    Message,
    Prompts,
    parse_prompt,
    parse_prompts,
)
from vlmforge.prompt.names import given_name
from vlmforge.prompt.render import RenderedPrompt
from vlmforge.response import Response, Stopwatch
from vlmforge.scheduler import Job, Scheduler
from vlmforge.session import Session
from vlmforge.vl import load_image
from vlmforge.vl.decode import upright_size


class Pipeline:
    """Serves one engine. Thread-safe. Made by `pipeline(...)`; close it, or use it in a `with`."""

    def __init__(self, engine: Engine, scheduler: Scheduler) -> None:
        self._engine = engine
        self._scheduler = scheduler
        decode = engine.manifest.decode
        self._facts = TokenFacts(
            vocab_size=decode.vocab_size,
            eos_ids=decode.eos_ids,
            template_stop_words=engine.template.stop_words,
            special_tokens=engine.tokenizer.special_tokens,
            encode=engine.tokenizer.encode,
            guides=Guides(engine.tokenizer.json, decode.vocab_size, decode.eos_ids),
        )
        self._jobs: dict[int, Job] = {}  # by session id, for stop_session

    # --- calls -------------------------------------------------------------------------------

    def __call__(
        self,
        prompts: object,
        gen_config: GenConfigs = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
        use_tqdm: bool = False,
    ) -> Response | list[Response]:
        """Answer a prompt, or a list of them.

        Args:
            prompts: Text, (text, image), (text, [images]), OpenAI messages, or a list of these.
            gen_config: How to generate; one for all or one for each prompt. None is greedy.
            do_preprocess: False sends text verbatim, without the chat template.
            adapter_name: Not supported; must be None.
            use_tqdm: Show how many prompts are done.

        Returns:
            A `Response`, or for a list a list in the same order. In a list, an item that fails
            becomes a response with `finish_reason='error'` and its siblings go on.

        Raises:
            VlmforgeError: a single prompt fails, or a configuration is out of range.
        """
        parsed = parse_prompts(prompts)
        configs = one_for_each(gen_config, len(parsed.items))
        refuse_adapter(adapter_name)
        responses = [Response(index=i, session_id=i) for i in range(len(parsed.items))]
        done = 0
        for event in self._events(parsed, configs, do_preprocess):
            if event.error is not None:
                if parsed.single or not isinstance(event.error, VlmforgeError):
                    raise event.error
                responses[event.index] = error_response(event.index, event.error)
            elif event.delta is not None:
                responses[event.index].extend(event.delta)
            if event.last:
                done += 1
                if use_tqdm:
                    print(f"\r{done}/{len(responses)} prompts", end="", file=sys.stderr, flush=True)
        if use_tqdm:
            print(file=sys.stderr)
        return responses[0] if parsed.single else responses

    infer = batch_infer = __call__

    def stream_infer(
        self,
        prompts: object,
        gen_config: GenConfigs = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
    ) -> Iterator[Response]:
        """Answer as `__call__` does, yielding pieces as they come.

        Each piece is a `Response` with the new text and ids only; `index` says of which prompt.
        The last piece of a prompt has a `finish_reason` and the timings.
        """
        parsed = parse_prompts(prompts)
        configs = one_for_each(gen_config, len(parsed.items))
        refuse_adapter(adapter_name)
        for event in self._events(parsed, configs, do_preprocess):
            if event.delta is not None:
                yield event.delta
            elif event.error is not None:
                if parsed.single or not isinstance(event.error, VlmforgeError):
                    raise event.error
                yield error_response(event.index, event.error)

    def chat(
        self,
        prompt: object,
        session: Session | None = None,
        gen_config: GenerationConfig | None = None,
        stream_response: bool = False,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
    ) -> Session | Iterator[Response]:
        """One turn of a conversation; `session=None` begins one.

        Returns:
            The session, with `session.response` and `session.history`. With `stream_response`, an
            iterator of pieces; the session is updated when it is exhausted, so pass your own.

        Raises:
            VlmforgeError: the turn fails; the session is as before.
        """
        refuse_adapter(adapter_name)
        session = Session() if session is None else session
        pieces = self._turn(prompt, session, gen_config, do_preprocess)
        if stream_response:
            return pieces
        for _ in pieces:
            pass
        return session

    def _turn(
        self,
        prompt: object,
        session: Session,
        gen_config: GenerationConfig | None,
        do_preprocess: bool,
    ) -> Iterator[Response]:
        # Loaded once, so that later turns neither fetch nor decode the images again.
        asked = session.with_prompt(_load(parse_prompt(prompt)))
        whole = Response(session_id=session.session_id)
        configs = one_for_each(gen_config, 1)
        for event in self._events(Prompts((asked,), single=True), configs, do_preprocess):
            if event.error is not None:
                raise event.error
            if event.delta is not None:
                event.delta.session_id = session.session_id
                whole.extend(event.delta)
                yield event.delta
        session.gen_config = gen_config
        session.finish_turn(prompt, asked, whole)

    async def generate(
        self,
        messages: object,
        session_id: int = 0,
        gen_config: GenerationConfig | None = None,
        stream_response: bool = True,
        sequence_start: bool = True,
        sequence_end: bool = True,
        step: int = 0,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
    ) -> AsyncIterator[GenOut]:
        """Answer one prompt without blocking the event loop.

        Yields pieces, or with `stream_response=False` one whole. Leaving the loop early cancels
        the request. Sessions are stateless: send the whole conversation.

        Raises:
            VlmforgeError: the prompt fails.
        """
        import asyncio  # not at the top: it would be a sixth of the time of `import vlmforge`

        refuse_adapter(adapter_name)
        if not (sequence_start and sequence_end and step == 0):
            raise ConfigError(
                "generate() keeps no state between calls.",
                found=f"sequence_start={sequence_start}, sequence_end={sequence_end}, step={step}",
                expected="sequence_start=True, sequence_end=True, step=0",
                fix="send the whole conversation as OpenAI messages, or use chat()",
            )
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def sink(event: Event) -> None:
            with suppress(RuntimeError):  # the loop is gone, and with it who would read this
                loop.call_soon_threadsafe(events.put_nowait, event)

        conversation, config = parse_prompt(messages), one_for_each(gen_config, 1)[0]
        job = await asyncio.to_thread(self._submit, conversation, config, 0, do_preprocess, sink)
        self._jobs[session_id] = job
        whole = Response()
        try:
            while True:
                event = await events.get()
                if event.error is not None:
                    raise event.error
                if event.delta is not None:
                    whole.extend(event.delta)
                    if stream_response or event.last:
                        yield gen_out(event.delta if stream_response else whole, whole)
                if event.last:
                    return
        finally:
            self._scheduler.cancel(job)
            self._jobs.pop(session_id, None)

    # --- looking without running -------------------------------------------------------------

    def render(self, prompt: object, do_preprocess: bool = True) -> RenderedPrompt:
        """The exact text, token ids and image spans of one prompt; nothing is run.

        Images are loaded only where their sizes decide how many tokens they take.
        """
        return self._engine.render(parse_prompt(prompt), do_preprocess=do_preprocess)

    def count_tokens(self, prompt: object, do_preprocess: bool = True) -> int:
        """Length of one prompt in tokens, image tokens included."""
        return len(self.render(prompt, do_preprocess).token_ids)

    # --- sessions and the end ----------------------------------------------------------------

    def session(self) -> Session:
        """A new, empty session."""
        return Session()

    async def stop_session(self, session_id: int) -> None:
        """Cancel the request that `generate` runs for this session, if there is one."""
        job = self._jobs.get(session_id)
        if job is not None:
            self._scheduler.cancel(job)

    async def end_session(self, session_id: int) -> None:
        """As `stop_session`: nothing else is kept for a session."""
        await self.stop_session(session_id)

    def close(self) -> None:
        """Cancel what is in flight and end the worker thread."""
        self._scheduler.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside ------------------------------------------------------------------------------

    def _events(
        self, prompts: Prompts, configs: Sequence[GenerationConfig], do_preprocess: bool
    ) -> Iterator[Event]:
        """Events of all items as they come.

        No more items are prepared ahead than the engine can take soon, so a long list of images
        needs no more memory than a short one. An abandoned iterator cancels its jobs.
        """
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        window = 2 * self._engine.options.slots
        waiting = list(enumerate(zip(prompts.items, configs, strict=True)))[::-1]
        jobs: dict[int, Job] = {}
        try:
            while waiting or jobs:
                while waiting and len(jobs) < window:
                    index, (item, config) = waiting.pop()
                    try:
                        if isinstance(item, Exception):
                            raise item
                        jobs[index] = self._submit(item, config, index, do_preprocess, events.put)
                    except VlmforgeError as error:
                        yield Event(index, error=error)
                if jobs:
                    event = events.get()
                    if event.last:
                        del jobs[event.index]
                    yield event
        finally:
            for job in jobs.values():
                self._scheduler.cancel(job)

    def _submit(
        self,
        conversation: Conversation,
        config: GenerationConfig,
        index: int,
        do_preprocess: bool,
        sink: Callable[[Event], None],
    ) -> Job:
        watch = Stopwatch()
        given = len(conversation.images)
        with watch.stage("load"):
            conversation = _load(self._engine.kept(conversation, do_preprocess=do_preprocess))
        with watch.stage("preprocess"):
            images = [self._prepare(image) for image in conversation.images]
            rendered = self._engine.render(conversation, do_preprocess=do_preprocess)
        plan = config.resolved(self._facts)
        generator = TokenGenerator(
            self._engine,
            plan,
            rendered,
            self._budget(rendered, plan.max_new_tokens),
            watch,
            lambda delta, error: sink(Event(index, delta, error)),
            index,
            self._grounding(conversation, given),
        )
        job = Job(rendered, images, generator)
        self._scheduler.submit(job)
        return job

    def _grounding(self, loaded: Conversation, given: int) -> Grounding | None:
        """`loaded` is what is left of a conversation with `given` images: the latest of them."""
        box_format, images = self._engine.manifest.prompt.box_format, loaded.images
        if box_format is None or not images:
            return None
        return Grounding(box_format, upright_size(load_image(images[-1].source)), given - 1)

    def _prepare(self, image: Image) -> PreparedImage:
        return self._engine.prepare_image(load_image(image.source))

    def _budget(self, rendered: RenderedPrompt, asked: int | None) -> int:
        """Tokens that may be generated: what was asked for (None: all), cut to what fits."""
        window, prompt = self._engine.options.capacity, len(rendered.token_ids)
        requested = max(1, window - prompt) if asked is None else asked
        if prompt >= window:
            raise ContextLengthError(
                TokenLedger(rendered.text_tokens, rendered.image_tokens, requested, window)
            )
        return min(requested, window - prompt)


def _load(conversation: Conversation) -> Conversation:
    """The conversation with its images loaded (ImageError names the one that fails)."""

    def loaded(message: Message) -> Message:
        blocks = tuple(
            Image(load_image(block.source), given_name(block))
            if isinstance(block, Image)
            else block
            for block in message.blocks
        )
        return Message(message.role, blocks)

    return Conversation(tuple(loaded(message) for message in conversation.messages))
