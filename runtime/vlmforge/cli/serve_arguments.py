"""The arguments of `vlmforge serve`; apart, so that reading them imports no server."""

from __future__ import annotations

import argparse
from typing import Any


def add_serve(commands: Any) -> None:
    """Add the command to the subparsers of `vlmforge`."""
    serve = commands.add_parser("serve", help="serve engines over HTTP to OpenAI clients")
    serve.add_argument("engine", nargs="+", metavar="ENGINE", help="folders or checkpoints")
    serve.add_argument("--host", "--server-name", default="127.0.0.1", help="default: 127.0.0.1")
    serve.add_argument("--port", "--server-port", type=int, default=23333, help="0: any free one")
    serve.add_argument(
        "--served-model-name",
        "--model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="one for each engine, in their order (default: their folders' names)",
    )
    serve.add_argument(
        "--api-keys", nargs="+", default=[], metavar="KEY", help="or VLMFORGE_API_KEYS=KEY,KEY"
    )
    serve.add_argument(
        "--open-paths",
        nargs="*",
        default=["/", "/health", "/health/live", "/health/ready"],
        metavar="PATH",
        help="paths that need no key (default: the page and /health; /metrics may be one)",
    )
    serve.add_argument("--max-concurrent-requests", type=int, default=256, metavar="N")
    serve.add_argument("--max-body-mb", type=int, default=64, metavar="MB")
    serve.add_argument(
        "--max-bodies-mb", type=int, default=1024, metavar="MB", help="of all requests together"
    )
    serve.add_argument("--max-images", type=int, default=64, metavar="N", help="of one request")
    serve.add_argument("--request-seconds", type=float, metavar="S", help="longest answer")
    serve.add_argument("--shutdown-seconds", type=float, default=60.0, metavar="S")
    serve.add_argument(
        "--allowed-media-domains",
        nargs="+",
        metavar="HOST",
        help="hosts that images may be fetched from; .example.org: all below it",
    )
    _engine_arguments(serve)
    serve.add_argument("--log-json", action="store_true", help="one JSON object a request")
    serve.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="info",
        help="default: info, which is one line a request",
    )


def _engine_arguments(serve: argparse.ArgumentParser) -> None:
    serve.add_argument("--session-len", type=int, help="tokens of one conversation")
    serve.add_argument("--max-batch-size", type=int, help="sequences that run at once")
    serve.add_argument(
        "--vision-max-batch-size", type=int, default=1, help="views in one run of the vision part"
    )
    serve.add_argument(
        "--cache-max-entry-count", type=float, default=0.8, help="share of free memory for caches"
    )
