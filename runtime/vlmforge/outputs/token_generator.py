"""The tokens of one sequence: chosen from logits, turned to text, stopped, handed to the caller."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from typing_extensions import override

from vlmforge.backends import FloatArray
from vlmforge.backends.choice import Choice, Found
from vlmforge.errors import CancelledError, as_exception
from vlmforge.inputs.render import RenderedPrompt
from vlmforge.inputs.tokenizer import TextTokenizer
from vlmforge.outputs.detokenizer import IncrementalDetokenizer
from vlmforge.outputs.generation_config import GenerationPlan
from vlmforge.outputs.logprobs import mean_cross_entropy
from vlmforge.outputs.response import FinishReason, Response, Stopwatch
from vlmforge.outputs.sampling import Sampler
from vlmforge.outputs.stopping import NgramCounter, StopScanner
from vlmforge.outputs.token_chooser import PrefillFacts, TokenChooser
from vlmforge.vl.boxes import Grounding, parse_boxes


class Caller(Protocol):
    """Who waits for the tokens.

    Attributes:
        choice: Which of the answers to the prompt it waits for.
        watch: Of its wall time.
        begun: Set once its answer is being generated.
        index: Its place among the prompts of its call.
    """

    choice: int
    watch: Stopwatch
    begun: bool
    index: int

    def send(self, delta: Response | None, error: Exception | None) -> None:
        """Take a piece, or the error that ends the answer."""


class TokenGenerator(TokenChooser):
    """Follows one request from its first logits to its end.

    Args:
        tokenizer: Of the answer's text.
        vocab_size: Logits of a token.
        plan: How to generate.
        prompt: What was sent.
        budget: Tokens that may be generated, > 0.
        caller: Gets each new piece as a `Response`, or the error that ends it.
        grounding: What boxes in the text refer to; None where there are none to be read.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        vocab_size: int,
        plan: GenerationPlan,
        prompt: RenderedPrompt,
        budget: int,
        caller: Caller,
        grounding: Grounding | None = None,
    ) -> None:
        self._plan, self._prompt, self._budget = plan, prompt, budget
        self._caller, self._watch = caller, caller.watch
        self._grounding, self._text = grounding, ""
        self._text_ids = _text_ids(prompt)
        self._sampler = Sampler(
            plan.sampling, vocab_size, [i for i in self._text_ids if i is not None]
        )
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            skip_special_tokens=plan.skip_special_tokens,
            spaces_between_special_tokens=plan.spaces_between_special_tokens,
        )
        self._scanner, self._ngrams = StopScanner(plan.stop), NgramCounter(plan.stop)
        self._ids: list[int] = []
        self._sent = 0
        self._logprobs: list[dict[int, float]] = []
        self._logits: list[FloatArray] = []
        self._facts: PrefillFacts | None = None
        self._watch.switch("queue")

    @property
    @override
    def wants_prompt_logits(self) -> bool:
        return self._plan.wants_prompt_logits

    @override
    def begin(self, facts: PrefillFacts) -> None:
        self._facts, self._caller.begun = facts, True
        self._watch.split({"encode": facts.encode, "prefill": facts.prefill})
        self._watch.switch("decode")
        if self._plan.output_logits == "all" and facts.prompt_logits is not None:
            # The last row comes with the first token.
            self._logits.append(facts.prompt_logits[:-1])

    @property
    @override
    def left(self) -> int:
        return self._budget - len(self._ids)

    @override
    def choice(self, ahead: int = 0) -> Choice | None:
        return None if self._plan.output_logits is not None else self._sampler.choice(ahead)

    @override
    def accept(self, found: Found) -> int | None:
        token = self._sampler.step(found)
        if self._plan.output_logits is not None and isinstance(found, np.ndarray):
            self._logits.append(found[None].copy())
        stop = self._plan.stop
        ends = token.id in stop.ids and len(self._ids) >= stop.min_new_tokens
        if ends and not stop.include_stop_str_in_output:
            self._end("stop", self._flush())
            return None
        self._ids.append(token.id)
        if token.top_logprobs is not None:
            self._logprobs.append(token.top_logprobs)
        text = self._scanner.push(self._detokenizer.push([token.id]))
        if self._scanner.matched is not None:
            self._end("stop", text)
        elif ends or (stop.ngram_size and self._ngrams.push(token.id)):
            self._end("stop", text + self._flush())
        elif len(self._ids) >= self._budget:
            self._end("length", text + self._flush())
        else:
            if text:
                self._send(text, len(self._ids), None)
            return token.id
        return None

    @override
    def fail(self, error: Exception) -> None:
        """A cancelled request ends with what it has, as "abort"."""
        if isinstance(error, CancelledError) and self._facts is not None:
            try:
                self._end("abort", self._flush())
            except BaseException as broken:  # noqa: BLE001 - the caller gets it, or the next line's
                error = as_exception(broken)
        self._caller.send(None, error)  # nothing, once it has ended

    def _flush(self) -> str:
        """The text that was held back; it may complete a stop word."""
        return self._scanner.push(self._detokenizer.finish()) + self._scanner.finish()

    def _end(self, reason: FinishReason, text: str) -> None:
        kept = len(self._ids)
        if self._scanner.matched is not None:
            reason, kept = "stop", min(kept, self._scanner.kept)
        self._send(text, kept, reason)

    def _send(self, text: str, kept: int, reason: FinishReason | None) -> None:
        # Ids are held back while a stop word may still take them away again.
        first = self._sent
        certain = kept if reason is not None or not self._plan.stop.words else self._scanner.settled
        self._sent = max(first, min(kept, certain))
        self._text += text
        piece = Response(
            text=text,
            generate_token_len=kept,
            input_token_len=len(self._prompt.token_ids),
            session_id=self._caller.index,
            finish_reason=reason,
            token_ids=self._ids[first : self._sent],
            logprobs=self._logprobs[first : self._sent] or None,
            index=self._caller.index,
            choice=self._caller.choice,
        )
        if reason is not None:
            self._complete(piece)
        self._caller.send(piece, None)

    def _complete(self, piece: Response) -> None:
        facts = self._facts
        assert facts is not None
        piece.cached_tokens = facts.cached_tokens
        piece.timings = self._watch.timings(
            cached_prefix_tokens=facts.cached_tokens, cached_images=facts.cached_images
        )
        if self._grounding is not None:
            piece.boxes = parse_boxes(self._text, self._grounding)
        if self._logits:
            piece.logits = np.concatenate(self._logits)
        if self._plan.return_ppl and facts.prompt_logits is not None:
            piece.ppl = _prompt_loss(self._text_ids, facts.prompt_logits)


def _text_ids(prompt: RenderedPrompt) -> list[int | None]:
    """The prompt's ids, None at the positions of images."""
    ids: list[int | None] = list(prompt.token_ids)
    for span in prompt.image_spans:
        ids[span.start : span.start + span.length] = [None] * span.length
    return ids


def _prompt_loss(ids: list[int | None], logits: FloatArray) -> float | None:
    """Mean cross-entropy of the text tokens that something precedes; None if there are none."""
    targets = [(i - 1, token) for i, token in enumerate(ids) if i > 0 and token is not None]
    if not targets:
        return None
    rows = [row for row, _ in targets]
    return mean_cross_entropy(logits[rows], [token for _, token in targets])
