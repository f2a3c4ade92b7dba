"""Every error that vlmforge raises on purpose.

    VlmforgeError
    |-- ConfigError              (ValueError)   a config field or an argument is out of range
    |-- PromptError              (ValueError)   an unknown form, or a wrong number of images
    |-- ContextLengthError       (ValueError)   the prompt does not fit the context window
    |-- ImageError               (ValueError)   bytes that are not a whole, sane image
    |   `-- ImageFetchError                     an address that could not, or must not, be fetched
    |-- CheckpointError                         the checkpoint is incomplete or damaged
    |   |-- TensorError                         ... at one named tensor
    |   |-- TokenizerError                      ... in its tokenizer
    |   `-- UnsupportedModelError               ... or of a family that no recipe knows
    |-- EngineError                             the engine directory cannot be used
    |   |-- EngineFormatError                   ... its manifest is not of our schema
    |   |-- EngineIntegrityError                ... a file is missing, short or altered
    |   |-- BackendUnavailableError             ... or this machine lacks its backend
    |   `-- EngineStepError                     ... or it failed while it ran
    |       `-- RankError                       ... because one of its processes did
    |-- BuildError                              a build failed; nothing was published
    |-- SessionError                            a saved session that cannot be used here
    |-- NotSupportedError        (NotImplementedError)  a name that is here only to say so
    |-- PipelineError                           the pipeline cannot serve this caller: it was made
    |                                           before a fork, or is called by its own callback
    |-- QueueFullError                          too many requests wait already
    |-- RequestTimeoutError      (TimeoutError) a request was not finished in the time it was given
    |-- InternalError                           what is not ours ended a request: a callback, a bug
    `-- CancelledError                          the request was cancelled, or the pipeline closed

Each says what was found, what was expected and what to do next, in words a user can act on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self


class VlmforgeError(Exception):
    """Base of all our errors.

    Args:
        summary: One sentence: what went wrong, naming the file, key or tensor.
        found: What was there.
        expected: What should have been there.
        fix: What to do next; a command where there is one.
    """

    code: ClassVar[str] = "error"

    def __init__(self, summary: str, *, found: str = "", expected: str = "", fix: str = "") -> None:
        self.summary = summary
        self.found = found
        self.expected = expected
        self.fix = fix
        super().__init__(summary)

    def __str__(self) -> str:
        rows = (("found", self.found), ("expected", self.expected), ("fix", self.fix))
        return "\n".join(
            [self.summary, *(f"  {name + ':':<10}{text}" for name, text in rows if text)]
        )


class ConfigError(VlmforgeError, ValueError):
    """A configuration field or an argument is of a wrong type or out of range."""

    code = "invalid_config"


class PromptError(VlmforgeError, ValueError):
    """A prompt of an unknown form, or whose images do not match its image tokens."""

    code = "invalid_request"


class ImageError(VlmforgeError, ValueError):
    """Bytes that do not decode to a whole image within the limits."""

    code = "invalid_image"


class ImageFetchError(ImageError):
    """An image address that could not be fetched, or that must not be."""

    code = "image_fetch_failed"


class CheckpointError(VlmforgeError):
    """A checkpoint that is incomplete or damaged."""

    code = "invalid_checkpoint"


class TensorError(CheckpointError):
    """A tensor that is missing, truncated, or of an unexpected shape or dtype."""

    code = "invalid_tensor"


class TokenizerError(CheckpointError):
    """A tokenizer that cannot be converted to an equal `tokenizer.json`."""

    code = "invalid_tokenizer"


class UnsupportedModelError(CheckpointError):
    """A model family that no recipe knows."""

    code = "unsupported_model"


class EngineError(VlmforgeError):
    """An engine directory that cannot be used."""

    code = "invalid_engine"


class EngineFormatError(EngineError):
    """A manifest that is not JSON, not of our schema, or of another schema version."""

    code = "engine_format"


class EngineIntegrityError(EngineError):
    """A file of the engine that is missing, short or altered."""

    code = "engine_integrity"


class BackendUnavailableError(EngineError):
    """This machine lacks what the engine's backend needs."""

    code = "backend_unavailable"


class EngineStepError(EngineError):
    """The engine failed while it ran a request; what was raised there is the cause."""

    code = "engine_step"

    @classmethod
    def of(cls, error: BaseException) -> Self:
        """One for each request that `error` ends: no two callers raise the same object."""
        if isinstance(error, VlmforgeError):
            kind = type(error) if isinstance(error, cls) else cls
            found = kind(error.summary, found=error.found, expected=error.expected, fix=error.fix)
        else:
            found = cls(
                "The engine failed while it ran this request.",
                found=_one_line(error),
                expected="a step that ends",
                fix="send the request again; if memory was short, with a smaller max_batch_size or "
                "window. If it fails again: vlmforge verify ENGINE",
            )
        found.__cause__ = error
        return found


class RankError(EngineStepError):
    """A tensor-parallel rank ended, hangs or failed; the pipeline is to be made again."""

    code = "rank_failed"


class BuildError(VlmforgeError):
    """A build failed. Nothing was published."""

    code = "build_failed"


class SessionError(VlmforgeError):
    """A saved session that is damaged, of another engine, or cannot be written."""

    code = "invalid_session"


class NotSupportedError(VlmforgeError, NotImplementedError):
    """A name that older programs import and that does nothing here."""

    code = "not_supported"


class PipelineError(VlmforgeError):
    """The pipeline cannot serve this caller here; the message says what can."""

    code = "pipeline_unusable"


class QueueFullError(VlmforgeError):
    """Too many requests wait already; nothing was done for this one."""

    code = "queue_full"


class RequestTimeoutError(VlmforgeError, TimeoutError):
    """A request was not finished within its `timeout`, waiting included."""

    code = "request_timeout"


class InternalError(VlmforgeError):
    """A request was ended by an exception that is none of ours; that one is the cause."""

    code = "internal_error"

    @classmethod
    def of(cls, error: BaseException) -> InternalError:
        """`error` as one of ours."""
        found = cls(
            "A request was ended by an exception that is not one of vlmforge's.",
            found=_one_line(error),
            expected="a VlmforgeError, or none",
            fix="mend the logits processor if it comes from there (the cause's traceback says so); "
            "else please report it",
        )
        found.__cause__ = error
        return found


class CancelledError(VlmforgeError):
    """The request was cancelled, or its pipeline closed, before it finished."""

    code = "request_cancelled"


@dataclass(frozen=True, slots=True)
class TokenLedger:
    """Where the tokens of a request go. All counts are in tokens."""

    text: int
    image: int
    requested: int
    window: int

    @property
    def prompt(self) -> int:
        """Length of the prompt, image tokens included."""
        return self.text + self.image

    def __str__(self) -> str:
        return (
            f"{self.prompt} prompt tokens ({self.text} text + {self.image} image), "
            f"{self.requested} requested, window {self.window}"
        )


class ContextLengthError(VlmforgeError, ValueError):
    """The prompt alone fills the context window, so not one token could be generated."""

    code = "context_length_exceeded"

    def __init__(self, ledger: TokenLedger) -> None:
        self.ledger = ledger
        super().__init__(
            "The prompt does not fit the context window.",
            found=str(ledger),
            expected=f"a prompt of at most {ledger.window - 1} tokens",
            fix="send fewer or shorter turns or fewer images, or ask for a larger window: "
            "EngineConfig(session_len=...), or where that is refused build-engine --session-len",
        )


def as_exception(error: BaseException) -> Exception:
    """The error as it may reach a caller: one that would end the caller's thread is wrapped."""
    return error if isinstance(error, Exception) else InternalError.of(error)


def as_ours(error: BaseException) -> VlmforgeError:
    """The error as one with a code."""
    return error if isinstance(error, VlmforgeError) else InternalError.of(error)


def _one_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
