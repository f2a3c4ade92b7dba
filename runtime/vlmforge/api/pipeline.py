"""The interface that users call: prompts in, responses out."""

from __future__ import annotations

import queue
import sys
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from contextlib import closing, contextmanager

from vlmforge.api.arguments import (
    GenConfigs,
    check_call,
    one_for_each,
    refuse_adapter,
    refuse_state,
)
from vlmforge.api.session import Session
from vlmforge.engine.manifest import Manifest
from vlmforge.errors import VlmforgeError
from vlmforge.inputs.messages import Prompts, parse_prompt, parse_prompts
from vlmforge.inputs.render import RenderedPrompt
from vlmforge.inputs.tokenizer import TextTokenizer
from vlmforge.outputs.events import Event, GenOut, error_response, gen_out
from vlmforge.outputs.generation_config import GenerationConfig
from vlmforge.outputs.response import Response
from vlmforge.runner.stages import Engine
from vlmforge.scheduler.intake import Intake
from vlmforge.scheduler.loop import Loop
from vlmforge.scheduler.prepare import Preparation, token_facts
from vlmforge.scheduler.request import Request


class Pipeline:
    """Serves one engine. Thread-safe. Made by `pipeline(...)`.

    Close it, or use it in a `with`. One that is dropped frees its engine too, and one that is left
    open when the interpreter ends is closed then. A process that is forked from the one that made
    it cannot use it (PipelineError), nor can a logits processor that it is calling.
    """

    def __init__(self, engine: Engine, loop: Loop) -> None:
        self._engine, self._scheduler = engine, loop
        self._ahead = 2 * engine.options.slots
        preparation = Preparation(engine, loop.known_features, token_facts(engine))
        self._intake = Intake(preparation.job, loop, ahead=self._ahead)
        self._requests: dict[Request, int] = {}  # of `generate`, and each one's session id
        # No thread holds the pipeline: once nobody does, they end, and the engine goes with them.
        weakref.finalize(self, self._intake.stop).atexit = False

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
            VlmforgeError: a single prompt fails, a configuration is out of range, or the pipeline
                cannot be used here.
            Exception: what a logits processor of a single prompt raised, as it is. In a list it is
                an error response.
        """
        check_call("pipe", do_preprocess=do_preprocess, use_tqdm=use_tqdm)
        parsed = parse_prompts(prompts)
        configs = one_for_each(gen_config, len(parsed.items))
        refuse_adapter(adapter_name)
        responses = [Response(index=i, session_id=i) for i in range(len(parsed.items))]
        done = 0
        with closing(self._events(parsed, configs, do_preprocess)) as events:
            for event in events:
                if event.error is not None:
                    if parsed.single:
                        raise event.error
                    responses[event.index] = error_response(event.index, event.error)
                elif event.delta is not None:
                    responses[event.index].extend(event.delta)
                done += event.last
                if use_tqdm and event.last:
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
        check_call("stream_infer", do_preprocess=do_preprocess)
        parsed = parse_prompts(prompts)
        configs = one_for_each(gen_config, len(parsed.items))
        refuse_adapter(adapter_name)
        with closing(self._events(parsed, configs, do_preprocess)) as events:
            for event in events:
                if event.delta is not None:
                    yield event.delta
                elif event.error is not None:
                    if parsed.single:
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
        check_call(
            "chat",
            session=session,
            stream_response=stream_response,
            do_preprocess=do_preprocess,
        )
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
        self._scheduler.check()
        opened = self._engine.opened(parse_prompt(prompt), but_pillow=True)  # files: read once
        asked = session.with_prompt(opened)
        whole = Response(session_id=session.session_id)
        configs = one_for_each(gen_config, 1)
        with closing(self._events(Prompts((asked,), True), configs, do_preprocess)) as events:
            for event in events:
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
        the request, and so does cancelling the task, also while images are still loading.
        Sessions are stateless: send the whole conversation. Requests may share a `session_id`:
        `stop_session` then stops all of them.

        Raises:
            VlmforgeError: the prompt fails, or the pipeline cannot be used here.
            Exception: what a logits processor raised, as it is.
        """
        import asyncio  # not at the top: it would be a sixth of the time of `import vlmforge`

        refuse_adapter(adapter_name)
        check_call(
            "generate",
            session_id=session_id,
            stream_response=stream_response,
            do_preprocess=do_preprocess,
        )
        refuse_state(sequence_start, sequence_end, step)
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        cancelled = threading.Event()

        def sink(event: Event) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop is gone, and with it who would read this
                cancelled.set()

        config = one_for_each(gen_config, 1)[0]
        request = Request(
            parse_prompt(messages), config, sink, do_preprocess=do_preprocess, cancelled=cancelled
        )
        whole = Response()
        with self._known_as(session_id, request):
            self._intake.submit(request)
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

    async def astream(
        self, prompt: object, gen_config: GenerationConfig | None = None, do_preprocess: bool = True
    ) -> AsyncGenerator[Response, None]:
        """X"""
        import asyncio

        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()
        cancelled = threading.Event()

        def sink(event: Event) -> None:
            try:
                loop.call_soon_threadsafe(events.put_nowait, event)
            except RuntimeError:  # the loop is gone, and with it who would read this
                cancelled.set()

        config = one_for_each(gen_config, 1)[0]
        request = Request(
            parse_prompt(prompt), config, sink, do_preprocess=do_preprocess, cancelled=cancelled
        )
        with self._known_as(0, request):
            self._intake.submit(request)
            while True:
                event = await events.get()
                if event.error is not None:
                    raise event.error
                if event.delta is not None:
                    yield event.delta
                if event.last:
                    return

    @property
    def manifest(self) -> Manifest:
        """What the engine is, as its `engine.json` says."""
        return self._engine.manifest

    @property
    def tokenizer(self) -> TextTokenizer:
        """The engine's."""
        return self._engine.tokenizer

    @property
    def session_len(self) -> int:
        """Tokens that a conversation may have, images and answers included."""
        return self._engine.options.capacity

    # --- looking without running -------------------------------------------------------------

    def render(self, prompt: object, do_preprocess: bool = True) -> RenderedPrompt:
        """The exact text, token ids and image spans of one prompt; nothing is run.

        Images are loaded only where their sizes decide how many tokens they take.
        """
        check_call("render", do_preprocess=do_preprocess)
        return self._engine.render(parse_prompt(prompt), do_preprocess=do_preprocess)

    def count_tokens(self, prompt: object, do_preprocess: bool = True) -> int:
        """Length of one prompt in tokens, image tokens included."""
        return len(self.render(prompt, do_preprocess).token_ids)

    # --- sessions and the end ----------------------------------------------------------------

    def session(self) -> Session:
        """A new, empty session."""
        return Session()

    async def stop_session(self, session_id: int) -> None:
        """Cancel every request that `generate` runs for this session, if there are any.

        Each ends with what it has, which may be nothing, and `finish_reason='abort'`.
        """
        check_call("stop_session", session_id=session_id)
        for request in list(self._requests):
            if self._requests.get(request) == session_id:
                self._intake.cancel(request)

    async def end_session(self, session_id: int) -> None:
        """As `stop_session`: nothing else is kept for a session."""
        await self.stop_session(session_id)

    def close(self) -> None:
        """Cancel what is in flight and end the worker thread. May be called more than once."""
        self._intake.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside ------------------------------------------------------------------------------

    def _events(
        self, prompts: Prompts, configs: Sequence[GenerationConfig], do_preprocess: bool
    ) -> Generator[Event, None, None]:
        """Events of all items as they come.

        No more items are under way than the engine can take soon, so a long list of images needs
        no more memory than a short one. An abandoned iterator cancels its requests.
        """
        self._scheduler.check()
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        waiting = list(enumerate(zip(prompts.items, configs, strict=True)))[::-1]
        requests: dict[int, Request] = {}
        try:
            while waiting or requests:
                while waiting and len(requests) < self._ahead:
                    index, (item, config) = waiting.pop()
                    try:
                        if isinstance(item, Exception):
                            raise item
                        request = Request(item, config, events.put, index, do_preprocess)
                        requests[index] = request
                        self._intake.submit(request)
                    except VlmforgeError as error:
                        requests.pop(index, None)
                        yield Event(index, error=error)
                if requests:
                    event = self._next(events)
                    if event.last:
                        del requests[event.index]
                    yield event
        finally:
            for request in requests.values():
                self._intake.cancel(request)

    def _next(self, events: queue.SimpleQueue[Event]) -> Event:
        """The next event; a process that was forked while one was awaited gets no more of them."""
        self._scheduler.check_process()
        return events.get()

    @contextmanager
    def _known_as(self, session_id: int, request: Request) -> Iterator[None]:
        """The request can be stopped by the id of its session; what leaves the block cancels it."""
        self._requests[request] = session_id
        try:
            yield
        finally:
            self._intake.cancel(request)
            del self._requests[request]
