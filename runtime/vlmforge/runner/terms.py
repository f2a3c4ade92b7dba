"""What a request may expect: its turn, its company in the caches, and its time."""

from __future__ import annotations

import hashlib
import math
import time

from msgspec import Struct

from vlmforge.errors import RequestTimeoutError


class Terms(Struct, frozen=True):
    """Of all requests of a call.

    Attributes:
        priority: Higher ones are served first.
        salt: Requests with another salt share nothing with these, so that nobody can tell from
            their speed what others have asked; empty like any other.
        timeout: Seconds that the call was given.
        deadline: When they are over, by `time.monotonic`.
    """

    priority: int = 0
    salt: bytes = b""
    timeout: float = math.inf
    deadline: float = math.inf

    @property
    def left(self) -> float | None:
        """Seconds that are left, at least 0; None: as many as it takes."""
        return None if self.deadline == math.inf else max(0.0, self.deadline - time.monotonic())

    @property
    def over(self) -> bool:
        """Whether no time is left."""
        return time.monotonic() >= self.deadline

    def content(self, digest: bytes) -> bytes:
        """What identifies an image's content among the requests with this salt (16 bytes)."""
        if not self.salt:
            return digest
        key = hashlib.sha256(self.salt).digest()
        return hashlib.blake2b(digest, digest_size=16, key=key).digest()

    def timed_out(self) -> RequestTimeoutError:
        """What a request ends with whose time is over."""
        return RequestTimeoutError(
            "The request was not finished in time.",
            found=f"no end of the answer within {self.timeout:g} s, waiting included",
            expected=f"an answer within timeout={self.timeout:g}",
            fix="allow more time, ask for fewer tokens (GenerationConfig.max_new_tokens), or send "
            "it with a higher priority or when less is waiting",
        )


USUAL = Terms()
"""Of who asks for nothing."""
