"""When a sequence ends: stop ids, stop words in its text, and n-grams that repeat."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections import Counter, deque

from msgspec import Struct


class StopRules(Struct, frozen=True):
    """What ends a sequence. Its length limit is not among them.

    Attributes:
        ids: Tokens that end it: the engine's EOS, the template's, the user's.
        words: Texts that end it, of any number of tokens.
        include_stop_str_in_output: Keep the stop token or word in the output.
        min_new_tokens: Nothing ends it before this many tokens. Ids are masked in the logits till
            then; a word that is complete earlier is ordinary text.
        ngram_size: Length of the n-grams that `NgramCounter` counts; 0 counts none.
        ngram_threshold: Occurrences that end it.
    """

    ids: frozenset[int] = frozenset()
    words: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    min_new_tokens: int = 0
    ngram_size: int = 0
    ngram_threshold: int = 0


class StopScanner:
    """Finds stop words in a text that comes in pieces, one piece for each generated token.

    The text is cut right before the word that begins first, or with `include_stop_str_in_output`
    right after it, after the longest if several begin there. What is let through in all does not
    depend on how the text comes in pieces.
    """

    def __init__(self, rules: StopRules) -> None:
        self.matched: str | None = None
        """The stop word that was found; nothing is let through any more."""
        self._rules = rules
        self._longest = max(map(len, rules.words), default=0)
        words = sorted(rules.words, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, words))) if words else None
        self._ends: list[int] = []  # where each piece ends in the text
        self._passed = 0  # characters let through
        self._held = ""  # text after them that may still be, or hide, a stop word
        self._inert = 0  # words that end here or before came too early to count

    def push(self, piece: str) -> str:
        """Add the text of one token (it may be empty); the text that can be let through now."""
        if self.matched is not None:
            return ""
        if self._pattern is None:  # mostly: nothing is held
            self._passed += len(piece)
            self._ends.append(self._passed)
            return piece
        self._held += piece
        end = self._passed + len(self._held)
        self._ends.append(end)
        if len(self._ends) < self._rules.min_new_tokens:
            self._inert = end
        return self._advance(self._first_unfinished())

    def finish(self) -> str:
        """No more pieces will come: the rest of the text, up to a stop word in it."""
        return "" if self.matched is not None else self._advance(len(self._held))

    @property
    def kept(self) -> int:
        """How many of the pieces, from the first, belong to the output.

        Without a match all of them. Otherwise those whose text lies wholly before the cut; an
        empty piece (a part of a character) goes with the text after it. If the word is included,
        also the pieces that it touches.
        """
        if self.matched is None:
            return len(self._ends)
        if self._rules.include_stop_str_in_output:
            return bisect_left(self._ends, self._passed) + 1
        return self.settled

    @property
    def settled(self) -> int:
        """How many of the pieces, from the first, no later match can take away any more."""
        whole = bisect_right(self._ends, self._passed)
        last = self._ends[whole - 1] if whole else 0
        # Empty pieces at the end wait for the text that they are a part of.
        return bisect_left(self._ends, last) + 1 if last else 0

    def _advance(self, unfinished: int) -> str:
        """Let through all before place `unfinished`, unless a stop word is certain."""
        match = self._first_match()
        include = self._rules.include_stop_str_in_output
        # A word that begins earlier may still become complete; a longer one matters if included.
        if match is None or unfinished < match.start() + include:
            return self._pass(unfinished)
        self.matched = match.group()
        return self._pass(match.end() if include else match.start())

    def _pass(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self._passed += count
        return text

    def _first_match(self) -> re.Match[str] | None:
        if self._pattern is None:
            return None
        match = self._pattern.search(self._held)
        while match is not None and self._passed + match.end() <= self._inert:
            match = self._pattern.search(self._held, match.start() + 1)
        return match

    def _first_unfinished(self) -> int:
        """Where the longest end of the held text begins that is the beginning of a stop word."""
        held = self._held
        for start in range(max(0, len(held) - self._longest + 1), len(held)):
            end = held[start:]
            if any(len(end) < len(word) and word.startswith(end) for word in self._rules.words):
                return start
        return len(held)


class NgramCounter:
    """Ends a sequence that goes round in circles.

    It ends when the last `ngram_size` generated tokens have occurred, in that order,
    `ngram_threshold` times among all generated tokens; the last occurrence counts, occurrences may
    overlap.
    """

    def __init__(self, rules: StopRules) -> None:
        self._rules = rules
        self._recent: deque[int] = deque(maxlen=rules.ngram_size)
        self._counts: Counter[tuple[int, ...]] = Counter()
        self._tokens = 0

    def push(self, token: int) -> bool:
        """Add a token; whether the sequence ends with it."""
        rules = self._rules
        if not rules.ngram_size:
            return False
        self._tokens += 1
        self._recent.append(token)
        if len(self._recent) < rules.ngram_size:
            return False
        ngram = tuple(self._recent)
        self._counts[ngram] += 1
        return self._tokens >= rules.min_new_tokens and self._counts[ngram] >= rules.ngram_threshold
