"""The interface that users call: prompts in, responses out."""

from __future__ import annotations

import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, closing, contextmanager, nullcontext

from vlmforge.api.arguments import (
    GenConfigs,
    check_call,
    one_for_each,
    refuse_adapter,
    refuse_choices,
    refuse_state,
)
from vlmforge.api.calls import Call, progress, terms_of
from vlmforge.api.session import Sent, Session
from vlmforge.api.session_cache import SessionCache
from vlmforge.engine.manifest import Manifest
from vlmforge.inputs.messages import parse_prompt, parse_prompts
from vlmforge.inputs.render import RenderedPrompt
from vlmforge.inputs.tokenizer import TextTokenizer
from vlmforge.outputs.events import GenOut, error_response, gen_out, piece_of
from vlmforge.outputs.generation_config import GenerationConfig
from vlmforge.outputs.metrics import Metrics
from vlmforge.outputs.response import Response
from vlmforge.runner.stages import Engine
from vlmforge.scheduler.intake import Intake
from vlmforge.scheduler.loop import Loop
from vlmforge.scheduler.prepare import Preparation, token_facts
from vlmforge.scheduler.request import Request


class Pipeline:
    """Serves one engine. Thread-safe. Made by `pipeline(...)`.

    All calls take these, for each of their requests:

    - `priority`: Higher goes first, and takes the place of lower ones when none is free; equal ones
      in the order in which they came.
    - `salt`: Requests with another salt share no cache with these, neither of prompts nor of
      images: nobody can tell by the time that it takes whether others have asked the same.
    - `timeout`: Seconds for the whole call, waiting and fetching of images included. What is not
      finished then ends with `RequestTimeoutError`; the work stops with the step that is being run.

    Close it, or use it in a `with`. One that is dropped frees its engine too, and one that is left
    open when the interpreter ends is closed then. A process that is forked from the one that made
    it cannot use it (PipelineError), nor can a logits processor that it is calling.
    """

    def __init__(self, engine: Engine, loop: Loop, *, max_queued_requests: int) -> None:
        self._engine, self._scheduler = engine, loop
        self.session_cache = SessionCache(engine, loop)
        self._ahead = 2 * engine.options.slots
        preparation = Preparation(engine, loop, token_facts(engine))
        self._intake = Intake(preparation.job, loop, ahead=self._ahead, most=max_queued_requests)
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
        *,
        priority: int = 0,
        salt: str = "",
        timeout: float | None = None,
    ) -> Response | list[Response]:
        """Answer a prompt, or a list of them.

        Args:
            prompts: Text, (text, image), (text, [images]), OpenAI messages, or a list of these. Of
                an iterator, prompts are taken as they are needed: it may be of any length.
            gen_config: How to generate; one for all or one for each prompt. None is greedy.
            do_preprocess: False sends text verbatim, without the chat template.
            adapter_name: Not supported; must be None.
            use_tqdm: Show on standard error how many prompts are done.
            priority, salt, timeout: See the class.

        Returns:
            A `Response`, or for several a list in the same order. In a list, an item that fails
            becomes a response with `finish_reason='error'` and its siblings go on. Of `n` answers
            it is the first, and `Response.choices` has them all; one of them that fails alone is
            such a response too.

        Raises:
            VlmforgeError: a single prompt fails, a configuration is out of range, or the pipeline
                cannot be used here.
            Exception: what a logits processor of a single prompt raised, as it is. In a list it is
                an error response.
        """
        check_call("pipe", do_preprocess=do_preprocess, use_tqdm=use_tqdm)
        call = self._call("pipe", do_preprocess, priority=priority, salt=salt, timeout=timeout)
        parsed = parse_prompts(prompts)
        configs = one_for_each(gen_config, parsed.count)
        refuse_adapter(adapter_name)
        responses: list[Response] = []
        ends = progress(parsed.count) if use_tqdm else nullcontext()
        with ends as bar, closing(call.events(parsed.items, configs, together=True)) as events:
            for event in events:
                while len(responses) <= event.index:
                    responses.append(Response(index=len(responses), session_id=len(responses)))
                response = responses[event.index]
                if event.error is not None:
                    response.extend(error_response(event.index, event.error, event.choice))
                    failed = all(choice.finish_reason == "error" for choice in response.choices)
                    if parsed.single and (event.whole or (event.last and failed)):
                        raise event.error
                elif event.delta is not None:
                    response.extend(event.delta)
                if bar is not None and event.last:
                    bar.update()
        return responses[0] if parsed.single else responses

    infer = batch_infer = __call__

    def stream_infer(
        self,
        prompts: object,
        gen_config: GenConfigs = None,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
        *,
        priority: int = 0,
        salt: str = "",
        timeout: float | None = None,
    ) -> Iterator[Response]:
        """Answer as `__call__` does, yielding pieces as they come.

        Each piece is a `Response` with the new text and ids only; `index` says of which prompt,
        `choice` of which of its `n` answers. The last piece of an answer has a `finish_reason`
        and the timings. Nothing is run, or refused, before the first piece is asked for.

        Raises: as `__call__`; in a list, an item that fails is a piece that says so.
        """
        call = self._call(
            "stream_infer", do_preprocess, priority=priority, salt=salt, timeout=timeout
        )
        parsed = parse_prompts(prompts)
        configs = one_for_each(gen_config, parsed.count)
        refuse_adapter(adapter_name)
        with closing(call.events(parsed.items, configs)) as events:
            for event in events:
                if event.delta is not None:
                    yield event.delta
                elif event.error is not None:
                    if parsed.single and event.whole:
                        raise event.error
                    yield error_response(event.index, event.error, event.choice)

    def chat(
        self,
        prompt: object,
        session: Session | None = None,
        gen_config: GenerationConfig | None = None,
        stream_response: bool = False,
        do_preprocess: bool = True,
        adapter_name: str | None = None,
        *,
        priority: int = 0,
        salt: str = "",
        timeout: float | None = None,
    ) -> Session | Iterator[Response]:
        """One turn of a conversation; `session=None` begins one.

        Returns:
            The session, with `session.response` and `session.history`. With `stream_response`, an
            iterator of pieces; the session is updated when it is exhausted, so pass your own.

        Raises:
            VlmforgeError: the turn fails; the session is as before.
        """
        check_call("chat", session=session, stream_response=stream_response)
        call = self._call("chat", do_preprocess, priority=priority, salt=salt, timeout=timeout)
        refuse_adapter(adapter_name)
        refuse_choices(gen_config)
        session = Session() if session is None else session
        pieces = self._turn(prompt, session, gen_config, call, together=not stream_response)
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
        call: Call,
        *,
        together: bool,
    ) -> Iterator[Response]:
        self._scheduler.check()
        opened = self._engine.opened(parse_prompt(prompt), but_pillow=True)  # files: read once
        asked = session.with_prompt(opened)
        whole = Response(session_id=session.session_id)
        configs = one_for_each(gen_config, 1)
        with closing(call.events((asked,), configs, together=together)) as events:
            for event in events:
                if event.error is not None:
                    raise event.error
                if event.delta is not None:
                    event.delta.session_id = session.session_id
                    whole.extend(event.delta)
                    yield event.delta
        session.gen_config = gen_config
        sent = Sent(asked, call.do_preprocess, call.terms)
        session.finish_turn(prompt, sent, whole, self.session_cache)

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
        *,
        priority: int = 0,
        salt: str = "",
        timeout: float | None = None,
    ) -> AsyncIterator[GenOut]:
        """Answer one prompt without blocking the event loop.

        Yields pieces, or with `stream_response=False` one whole; of `n` answers each, with its
        `choice`. Leaving the loop early cancels the request, and so does cancelling the task, also
        while images are still loading. Sessions are stateless: send the whole conversation.
        Requests may share a `session_id`: `stop_session` then stops all of them.

        Raises:
            QueueFullError: as many requests wait as may (`EngineConfig.max_queued_requests`).
            VlmforgeError: the prompt fails, or the pipeline cannot be used here.
            Exception: what a logits processor raised, as it is.
        """
        refuse_adapter(adapter_name)
        check_call("generate", session_id=session_id, stream_response=stream_response)
        refuse_state(sequence_start, sequence_end, step)
        whole = Response()
        pieces = self.astream(
            messages,
            gen_config,
            do_preprocess,
            session_id=session_id,
            priority=priority,
            salt=salt,
            timeout=timeout,
        )
        async with aclosing(pieces):
            async for piece in pieces:
                answer = whole.extend(piece).choices[piece.choice]
                if stream_response or piece.finish_reason is not None:
                    yield gen_out(piece if stream_response else answer, answer)

    async def astream(
        self,
        prompt: object,
        gen_config: GenerationConfig | None = None,
        do_preprocess: bool = True,
        *,
        session_id: int = 0,
        priority: int = 0,
        salt: str = "",
        timeout: float | None = None,
    ) -> AsyncGenerator[Response, None]:
        """Answer one prompt without blocking the event loop: pieces as of `stream_infer`.

        Closing it early, or cancelling the task, cancels the request, also while its images are
        still loading.

        Raises: as `generate`.
        """
        check_call("astream", session_id=session_id)
        call = self._call("astream", do_preprocess, priority=priority, salt=salt, timeout=timeout)
        (config,) = one_for_each(gen_config, 1)
        with (
            call.in_event_loop(parse_prompt(prompt), config) as (request, next_event),
            self._known_as(session_id, request),
        ):
            self._intake.submit(request, refuse=True)
            last = False
            while not last:
                event = await next_event()
                last, piece = event.last, piece_of(event)
                if piece is not None:
                    yield piece

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

        Raises:
            PromptError: of a form that is not known.
            ImageError: an image that had to be opened cannot be.
        """
        check_call("render", do_preprocess=do_preprocess)
        return self._engine.render(parse_prompt(prompt), do_preprocess=do_preprocess)

    def count_tokens(self, prompt: object, do_preprocess: bool = True) -> int:
        """Length of one prompt in tokens, image tokens included."""
        return len(self.render(prompt, do_preprocess).token_ids)

    def metrics(self) -> Metrics:
        """What has been done since the pipeline was made, and what is going on; after `close` too.

        Takes microseconds and no lock that answers wait for: ask as often as you like.
        """
        return self._scheduler.metrics()

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
        """Cancel what is in flight, end the worker thread and let the engine go.

        Its memory goes back, though the pipeline is still held. May be called more than once.
        """
        self._intake.close()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- inside ------------------------------------------------------------------------------

    def _call(
        self, call: str, do_preprocess: bool, *, priority: int, salt: str, timeout: float | None
    ) -> Call:
        """A call that begins now (ConfigError for an argument of a wrong type)."""
        check_call(call, do_preprocess=do_preprocess, priority=priority, salt=salt, timeout=timeout)
        terms = terms_of(priority, salt, timeout)
        return Call(self._intake, self._scheduler, terms, do_preprocess, self._ahead)

    @contextmanager
    def _known_as(self, session_id: int, request: Request) -> Iterator[None]:
        """The request can be stopped by the id of its session; what leaves the block cancels it."""
        self._requests[request] = session_id
        try:
            yield
        finally:
            self._intake.cancel(request)
            del self._requests[request]
