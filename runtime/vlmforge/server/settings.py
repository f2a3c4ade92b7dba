"""What a server allows. All limits are checked before the work that they bound."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from vlmforge.api.config import VisionConfig
from vlmforge.errors import ConfigError
from vlmforge.field_rules import (
    Flag,
    Int,
    ListOf,
    Number,
    OrNone,
    Rule,
    Text,
    check_fields,
)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Limits and keys of a server.

    Attributes:
        api_keys: Any of them opens the server (`Authorization: Bearer KEY`); none: open to all.
        open_paths: Paths that need no key.
        max_body_bytes: Size of a request's body.
        max_bodies_bytes: Size of the bodies of all requests that arrive or are answered; more get
            429.
        body_seconds: Time that a client has to send it.
        header_seconds: Time that a client has to send a request's headers.
        max_images: Images of one request.
        max_concurrent_requests: Requests that are being answered or wait for it; more get 429.
        request_seconds: Time that an answer may take, waiting included; None: no limit.
        shutdown_seconds: Time that running requests get once the server is asked to end.
        retry_seconds: What a client that is refused with 429 or 503 is told to wait.
        log_json: One JSON object a request, instead of one readable line.
    """

    api_keys: tuple[str, ...] = ()
    open_paths: tuple[str, ...] = ("/", "/health", "/health/live", "/health/ready")
    max_body_bytes: int = 64 << 20
    max_bodies_bytes: int = 1 << 30
    body_seconds: float = 60.0
    header_seconds: float = 15.0
    max_images: int = 64
    max_concurrent_requests: int = 256
    request_seconds: float | None = None
    shutdown_seconds: float = 60.0
    retry_seconds: int = 1
    log_json: bool = False

    def __post_init__(self) -> None:
        check_fields(self, _RULES)
        if any(not key.isascii() or not key.isprintable() for key in self.api_keys):
            raise ConfigError(
                "An API key has characters that no HTTP header can carry.",
                found="a key that is not printable ASCII",
                expected="letters, digits and signs",
                fix="make one with: openssl rand -hex 32",
            )


_SECONDS = Number(0, above=True)
_RULES: Mapping[str, Rule] = {
    "api_keys": ListOf(Text(empty=False)),
    "open_paths": ListOf(Text(empty=False)),
    "max_body_bytes": Int(1),
    "max_bodies_bytes": Int(1),
    "body_seconds": _SECONDS,
    "header_seconds": _SECONDS,
    "max_images": Int(0),
    "max_concurrent_requests": Int(1),
    "request_seconds": OrNone(_SECONDS),
    "shutdown_seconds": Number(0),
    "retry_seconds": Int(0),
    "log_json": Flag(),
}


def server_vision_config(
    *, max_batch_size: int = 1, domains: tuple[str, ...] | None = None
) -> VisionConfig:
    """How a server reads images: never from its own disk.

    Args:
        max_batch_size: Views in one run of the vision part.
        domains: Hosts that images may be fetched from; None: all public ones.
    """
    return VisionConfig(max_batch_size=max_batch_size, local_files=False, media_domains=domains)
