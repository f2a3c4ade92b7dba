"""Ids back to text, as they are generated: no character before all its bytes are there."""

from __future__ import annotations

from collections.abc import Iterable

from vlmforge.inputs.tokenizer import BYTE_TOKEN, UNREADABLE, Spacing, TextTokenizer, Token

# A character has at most 4 bytes, so at most 3 of them, each shown as U+FFFD, may be incomplete.
_MAX_PENDING = 3


class IncrementalDetokenizer:
    """The text of tokens that come one after the other.

    No character is given out before all its bytes are there, and what is given out is never taken
    back: all pieces together are what `TextTokenizer.decode` makes of all ids. The work for a
    token does not grow with the number of tokens before it.

    Args:
        tokenizer: Of the tokens.
        skip_special_tokens, spaces_between_special_tokens: See `TextTokenizer.decode`.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special_tokens
        self._spacing = Spacing() if spaces_between_special_tokens else None
        self._window: list[str] = []  # the last tokens, the first of them only for context
        self._shown = 0  # characters of the window's text that were given out
        self._run: list[str] = []  # byte tokens whose text is still open

    def push(self, ids: Iterable[int]) -> str:
        """Add tokens; the text that has become final."""
        tokens = self._tokenizer.tokens(ids, skip_special_tokens=self._skip_special)
        return "".join([self._take(token) for token in tokens])

    def finish(self) -> str:
        """No more tokens will come: the rest of the text."""
        self._window += self._run
        self._run = []
        rest = self._tokenizer.join(self._window)[self._shown :] if self._window else ""
        self._shown += len(rest)
        return self._place(rest, special=False)

    def _take(self, token: Token) -> str:
        if token.special:
            rest = self.finish()
            self._window, self._shown = [token.text], 0
            text = self._tokenizer.join(self._window)
            self._shown = len(text)
            return rest + self._place(text, special=True)
        if self._tokenizer.joins_byte_runs and BYTE_TOKEN.fullmatch(token.text):
            self._run.append(token.text)
            return ""
        self._window += [*self._run, token.text]
        self._run = []
        return self._place(self._advance(), special=False)

    def _advance(self) -> str:
        """Text of the window that is new and final."""
        text = self._tokenizer.join(self._window)
        unreadable = len(text) - len(text.rstrip(UNREADABLE))
        end = max(self._shown, len(text) - min(unreadable, _MAX_PENDING))
        new, self._shown = text[self._shown : end], end
        if len(self._window) > 2 * (_MAX_PENDING + 1):
            self._shorten(pending=len(text) - end)
        return new

    def _shorten(self, *, pending: int) -> None:
        """Drop old tokens. Some text before the pending one must stay: a decoder may strip the
        first space of all, so the first token of a window must not be one that is still to come.
        """
        window = self._window[-(_MAX_PENDING + 1) :]
        length = len(self._tokenizer.join(window))
        if length > pending:
            self._window, self._shown = window, length - pending

    def _place(self, text: str, *, special: bool) -> str:
        return text if self._spacing is None else self._spacing.place(text, special)
