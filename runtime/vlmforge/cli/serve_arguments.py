"""The arguments of `vlmforge serve`; apart, so that reading them imports no server."""

from __future__ import annotations

import argparse
from typing import Any


def add_serve(commands: Any) -> None:
    """Add the command to the subparsers of `vlmforge`."""
    serve = commands.add_parser(
        "serve",
        help="serve engines over HTTP to OpenAI clients",
        description="Serve engines over HTTP to OpenAI clients, until a signal asks for the end.",
    )
    serve.add_argument(
        "engine", nargs="+", metavar="ENGINE", help="engine directories, or checkpoints"
    )
    serve.add_argument("--host", "--server-name", default="127.0.0.1", help="default: 127.0.0.1")
    serve.add_argument(
        "--port", "--server-port", type=int, default=23333, help="default: 23333; 0: any free one"
    )
    serve.add_argument(
        "--served-model-name",
        "--model-name",
        action="append",
        default=[],
        metavar="NAME",
        help="once for each engine, in their order (default: their folders' names)",
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
    _limits(serve)
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


def _limits(serve: argparse.ArgumentParser) -> None:
    add = serve.add_argument
    busy = "requests that are answered or wait; more get 429 (default: %(default)s)"
    add("--max-concurrent-requests", type=int, default=256, metavar="N", help=busy)
    body = "largest body of a request (default: %(default)s)"
    add("--max-body-mb", type=int, default=64, metavar="MB", help=body)
    bodies = "bodies of all requests together; more get 429 (default: %(default)s)"
    add("--max-bodies-mb", type=int, default=1024, metavar="MB", help=bodies)
    images = "images of one request (default: %(default)s)"
    add("--max-images", type=int, default=64, metavar="N", help=images)
    longest = "longest time for one answer, waiting included (default: no limit)"
    add("--request-seconds", type=float, metavar="S", help=longest)
    end = "time that running requests get once a signal asks for the end (default: %(default)s)"
    add("--shutdown-seconds", type=float, default=60.0, metavar="S", help=end)


def _engine_arguments(serve: argparse.ArgumentParser) -> None:
    add = serve.add_argument
    window = "tokens of one conversation (default: the engine's)"
    add("--session-len", type=int, metavar="N", help=window)
    batch = "sequences that run at once (default: the engine's)"
    add("--max-batch-size", type=int, metavar="N", help=batch)
    ranks = "ranks, each a process with its share of the decoder (default: the engine's)"
    add("--tp", type=int, default=1, metavar="N", help=ranks)
    views = "views in one run of the vision part (default: %(default)s)"
    add("--vision-max-batch-size", type=int, default=1, metavar="N", help=views)
    share = "share of the free memory for caches (default: %(default)s)"
    add("--cache-max-entry-count", type=float, default=0.8, metavar="SHARE", help=share)
