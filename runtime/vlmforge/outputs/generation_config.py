"""How to generate: the user's `GenerationConfig`, and the plan that one request is run by."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal, TypeAlias

from msgspec import Struct, structs

from vlmforge.errors import ConfigError
from vlmforge.field_rules import (
    Choice,
    Flag,
    Function,
    Int,
    ListOf,
    Number,
    OrNone,
    Refusal,
    Rule,
    Text,
    check_fields,
    check_refusals,
    known_fields,
    shown,
)
from vlmforge.outputs.grammar import Guide, Guides, check_form
from vlmforge.outputs.sampling import LogitsProcessor, SamplingParams
from vlmforge.outputs.stopping import StopRules

OutputLogits: TypeAlias = Literal["all", "generation"]
UNSET_TOP_K = 50
"""What `top_k` means when `do_sample=True` and it has its default."""
_MOST_ANSWERS = 128


class TokenFacts(Struct, frozen=True):
    """What a plan needs to know of an engine.

    Attributes:
        vocab_size: Number of logits of a step.
        eos_ids: End tokens of the model.
        template_stop_words: Stop words of the chat template in use.
        special_tokens: Ids of the tokenizer's special tokens by their texts. A stop word that is
            one of them stops by its id, since the token may have no text.
        encode: Text to ids, none added.
        guides: Makes what holds answers to a form.
    """

    vocab_size: int
    eos_ids: tuple[int, ...]
    template_stop_words: tuple[str, ...]
    special_tokens: Mapping[str, int]
    encode: Callable[[str], Sequence[int]]
    guides: Guides


class GenerationPlan(Struct, frozen=True):
    """A `GenerationConfig` resolved for one request: nothing in it can change any more.

    `max_new_tokens=None` is as many as the window holds; `output_logits=None` is none; `n` is how
    many answers are wanted.
    """

    sampling: SamplingParams
    stop: StopRules
    max_new_tokens: int | None
    skip_special_tokens: bool
    spaces_between_special_tokens: bool
    output_logits: OutputLogits | None
    return_ppl: bool
    n: int = 1

    @property
    def wants_prompt_logits(self) -> bool:
        """Whether the logits after every token of the prompt are needed."""
        return self.return_ppl or self.output_logits == "all"

    def choice(self, number: int) -> GenerationPlan:
        """The plan of one of the `n` answers."""
        if number == self.sampling.choice:
            return self
        sampling = structs.replace(self.sampling, choice=number)
        return structs.replace(self, sampling=sampling)


@known_fields
@dataclass(slots=True)
class GenerationConfig:
    """How to generate. Checked when it is made and again when a request uses it; never changed.

    Whether tokens are sampled or the likeliest is taken (greedy):

    - `temperature=0` or `top_p=0`, or `do_sample=False`: greedy.
    - `do_sample=None` (default): sampled if `top_k` is not 1. So `GenerationConfig()` is greedy,
      `GenerationConfig(top_k=40)` samples, and so does `top_k=0` (no top-k).
    - `do_sample=True`: sampled; `top_k=1`, which is its default, then means 50.

    Greedy ignores `temperature`, `top_k`, `top_p` and `min_p`; everything else applies to both.

    Attributes:
        n: Answers for each prompt, at most 128: `Response.choices` has all of them, and pieces of a
            stream say by `choice` which they belong to. The prompt is run once. Greedy ones are
            equal.
        max_new_tokens: Exactly this many tokens at most; None fills the window.
        do_sample: See above.
        top_p: Sample from the smallest set of tokens with this probability. [0, 1]
        top_k: Sample from this many of the likeliest tokens; 0 is all.
        min_p: Leave out tokens below this times the largest probability. [0, 1]
        temperature: Divides the logits. [0, 2]
        repetition_penalty: > 1 makes tokens of the prompt's text and of the answer less likely.
        presence_penalty: Taken from the logits of tokens that the answer has. [-2, 2]
        frequency_penalty: Taken from them once for each time that it has them. [-2, 2]
        ignore_eos: Neither the model's EOS nor the template's stop words end the answer; they may
            be generated and it goes on. `stop_words` and `stop_token_ids` of this config do.
        random_seed: None draws one for each prompt, so equal prompts get different answers. Of `n`
            answers, the first is that of `n=1`, and the others have seeds derived from this one.
        stop_words: Texts that end the answer, beside the template's; of any number of tokens.
        bad_words: Words that are never generated, at the start of a text or after a space.
        stop_token_ids: Tokens that end the answer.
        bad_token_ids: Tokens that are never generated.
        min_new_tokens: Nothing ends the answer before this many tokens.
        skip_special_tokens: Leave special tokens out of the text.
        spaces_between_special_tokens: Put spaces around those that are not left out.
        logprobs: Report the log-probabilities of this many tokens at each step, at most 1024; 0 is
            none.
        logits_processors: Functions `(ids of prompt text and answer so far, logits) -> logits`, a
            list and float32 arrays `[vocab]`, applied before everything else.
        output_logits: Return logits of the "generation", or of "all" (prompt too).
        include_stop_str_in_output: Keep the stop word or token in text and ids.
        return_ppl: Return the mean cross-entropy of the prompt's text.
        repetition_ngram_size, repetition_ngram_threshold: End the answer when its last `size`
            tokens have occurred `threshold` times in it; 0 and 0 is never.
        response_format: Hold the answer to a form (see `vlmforge.outputs.grammar`): {"type":
            "json_schema", "json_schema": {"schema": {...}}}, {"type": "json_object"}, {"type":
            "regex", "regex": "..."} or {"type": "choice", "choice": ["...", ...]}. The template's
            stop words do not end such an answer; its end does. What cannot be held to is refused.
            An answer that `max_new_tokens` cuts is not whole.
        output_last_hidden_state, with_cache, preserve_cache, migration_request,
            return_routed_experts, logprob_start_len: Not supported; refused when set.

    Raises:
        ConfigError: a field of a wrong type, out of range, or not supported.
    """

    n: int = 1
    max_new_tokens: int | None = 512
    _: KW_ONLY
    do_sample: bool | None = None
    top_p: float = 1.0
    top_k: int = 1
    min_p: float = 0.0
    temperature: float = 0.8
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    random_seed: int | None = None
    stop_words: Sequence[str] | None = None
    bad_words: Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    bad_token_ids: Sequence[int] | None = None
    min_new_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logprobs: int | None = None
    response_format: Mapping[str, object] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logits_processors: Sequence[LogitsProcessor] | None = None
    output_logits: OutputLogits | None = None
    output_last_hidden_state: OutputLogits | None = None
    include_stop_str_in_output: bool = False
    return_ppl: bool = False
    with_cache: bool = False
    preserve_cache: bool = False
    migration_request: object = None
    return_routed_experts: bool = False
    repetition_ngram_size: int = 0
    repetition_ngram_threshold: int = 0
    logprob_start_len: int = -1

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """Check all fields (ConfigError: field, value found, values expected)."""
        check_fields(self, RULES)
        check_refusals(self, REFUSALS)
        if self.max_new_tokens is not None and (self.min_new_tokens or 0) > self.max_new_tokens:
            raise ConfigError(
                "GenerationConfig: min_new_tokens must not be above max_new_tokens.",
                found=f"min_new_tokens={self.min_new_tokens}, max_new_tokens={self.max_new_tokens}",
                expected=f"min_new_tokens in [0, {self.max_new_tokens}]",
            )
        if bool(self.repetition_ngram_size) != bool(self.repetition_ngram_threshold):
            raise ConfigError(
                "GenerationConfig: repetition_ngram_size and repetition_ngram_threshold go "
                "together.",
                found=f"repetition_ngram_size={self.repetition_ngram_size}, "
                f"repetition_ngram_threshold={self.repetition_ngram_threshold}",
                expected="both 0, or both positive",
            )
        if self.response_format is not None:
            self._check_response_format(self.response_format)

    def _check_response_format(self, given: object) -> None:
        if not isinstance(given, Mapping):
            raise ConfigError(
                "GenerationConfig: response_format must be a mapping.",
                found=f"{type(given).__name__} {shown(given)}",
                expected="a mapping with a type",
                fix="response_format={'type': 'json_object'}",
            )
        check_form(given)
        if self.ignore_eos and given.get("type") != "text":
            raise ConfigError(
                "GenerationConfig: response_format and ignore_eos exclude each other.",
                found="both are set",
                expected="an answer that ends when it is whole",
                fix="leave ignore_eos out",
            )

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken; the rule is in the class's docstring."""
        if self.temperature == 0 or self.top_p == 0 or self.do_sample is False:
            return True
        return self.do_sample is None and self.top_k == 1

    def resolved(self, facts: TokenFacts) -> GenerationPlan:
        """The plan of a request on an engine. Later changes of the config do not reach it.

        Raises:
            ConfigError: a field is wrong, or an id is not in the engine's vocabulary.
        """
        self.validate()
        guide = facts.guides.guide(self.response_format) if self.response_format else None
        stop = _stop_rules(self, facts, guided=guide is not None)
        return GenerationPlan(
            sampling=_sampling_params(self, facts, stop, guide),
            stop=stop,
            max_new_tokens=None if self.max_new_tokens is None else int(self.max_new_tokens),
            skip_special_tokens=self.skip_special_tokens,
            spaces_between_special_tokens=self.spaces_between_special_tokens,
            output_logits=self.output_logits,
            return_ppl=self.return_ppl,
            n=int(self.n),
        )


_IDS = OrNone(ListOf(Int(0)))
_WORDS = OrNone(ListOf(Text(empty=False)))
_LOGITS = OrNone(Choice(("all", "generation")))

RULES: Mapping[str, Rule] = {
    "n": Int(1, _MOST_ANSWERS),
    "max_new_tokens": OrNone(Int(1)),
    "do_sample": OrNone(Flag()),
    "top_p": Number(0, 1),
    "top_k": Int(0),
    "min_p": Number(0, 1),
    "temperature": Number(0, 2),
    "repetition_penalty": Number(0, above=True),
    "presence_penalty": Number(-2, 2),
    "frequency_penalty": Number(-2, 2),
    "ignore_eos": Flag(),
    "random_seed": OrNone(Int(0)),
    "stop_words": _WORDS,
    "bad_words": _WORDS,
    "stop_token_ids": _IDS,
    "bad_token_ids": _IDS,
    "min_new_tokens": OrNone(Int(0)),
    "skip_special_tokens": Flag(),
    "spaces_between_special_tokens": Flag(),
    "logprobs": OrNone(Int(0, 1024)),
    "logits_processors": OrNone(ListOf(Function())),
    "output_logits": _LOGITS,
    "include_stop_str_in_output": Flag(),
    "return_ppl": Flag(),
    "repetition_ngram_size": Int(0),
    "repetition_ngram_threshold": Int(0),
}

_STATELESS = "leave it out: prompts that begin alike share their cache without being asked"
REFUSALS: Mapping[str, Refusal] = {
    "output_last_hidden_state": Refusal(
        (None,), "engines give logits only", "use output_logits='generation' or 'all'"
    ),
    "with_cache": Refusal((False, None), "caches do not leave the pipeline", _STATELESS),
    "preserve_cache": Refusal((False, None), "caches do not leave the pipeline", _STATELESS),
    "migration_request": Refusal(
        (None,), "requests do not move between engines", "send the request to the engine itself"
    ),
    "return_routed_experts": Refusal(
        (False, None), "engines do not report the routing of experts", "leave it out"
    ),
    "logprob_start_len": Refusal(
        (-1,),
        "log-probabilities are those of the answer's tokens",
        "use output_logits='all', or return_ppl=True for the mean over the prompt",
    ),
}


def _stop_rules(config: GenerationConfig, facts: TokenFacts, *, guided: bool) -> StopRules:
    ids = {int(i) for i in config.stop_token_ids or ()}
    _check_vocabulary("stop_token_ids", ids, facts.vocab_size)
    words = list(config.stop_words or ())
    if not config.ignore_eos:
        ids.update(facts.eos_ids)
        words += () if guided else facts.template_stop_words
    ids.update(facts.special_tokens[word] for word in words if word in facts.special_tokens)
    return StopRules(
        ids=frozenset(ids),
        words=tuple(dict.fromkeys(word for word in words if word not in facts.special_tokens)),
        include_stop_str_in_output=config.include_stop_str_in_output,
        min_new_tokens=int(config.min_new_tokens or 0),
        ngram_size=int(config.repetition_ngram_size),
        ngram_threshold=int(config.repetition_ngram_threshold),
    )


def _sampling_params(
    config: GenerationConfig, facts: TokenFacts, stop: StopRules, guide: Guide | None
) -> SamplingParams:
    return SamplingParams(
        greedy=config.greedy,
        temperature=float(config.temperature),
        top_k=UNSET_TOP_K if config.do_sample and config.top_k == 1 else int(config.top_k),
        top_p=float(config.top_p),
        min_p=float(config.min_p),
        repetition_penalty=float(config.repetition_penalty),
        presence_penalty=float(config.presence_penalty),
        frequency_penalty=float(config.frequency_penalty),
        seed=None if config.random_seed is None else int(config.random_seed),
        logits_processors=tuple(config.logits_processors or ()),
        bad_words=_bad_words(config, facts),
        held_ids=tuple(sorted(stop.ids)),
        min_new_tokens=stop.min_new_tokens,
        logprobs=int(config.logprobs or 0),
        guide=guide,
    )


def _bad_words(config: GenerationConfig, facts: TokenFacts) -> tuple[tuple[int, ...], ...]:
    """Banned ids, and the ids of each banned word at the start of a text and after a space."""
    if not (config.bad_token_ids or config.bad_words):  # mostly
        return ()
    ids = [int(i) for i in config.bad_token_ids or ()]
    _check_vocabulary("bad_token_ids", ids, facts.vocab_size)
    spellings = [
        tuple(facts.encode(spelling))
        for word in config.bad_words or ()
        for spelling in (word, f" {word}")
    ]
    return tuple(dict.fromkeys([*((i,) for i in ids), *filter(None, spellings)]))


def _check_vocabulary(name: str, ids: Collection[int], vocab_size: int) -> None:
    outside = sorted(i for i in ids if i >= vocab_size)
    if outside:
        raise ConfigError(
            f"GenerationConfig: {name} has an id that the engine's vocabulary does not.",
            found=str(outside[0]),
            expected=f"ids in [0, {vocab_size - 1}]",
            fix="take the ids from the tokenizer of this engine",
        )
