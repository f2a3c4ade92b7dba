"""`vlmforge serve`: engines over HTTP."""

from __future__ import annotations

import argparse
import contextlib
import logging
import resource
import socket
import sys
from pathlib import Path

from vlmforge import env
from vlmforge.api.config import EngineConfig
from vlmforge.api.load import pipeline
from vlmforge.errors import ConfigError

_MOST_FILES = 65_536


def run_serve(values: argparse.Namespace) -> int:
    """Serve until a signal ends it.

    Raises:
        ConfigError: names and engines do not match, the address cannot be used, or the extra is
            not installed.
        VlmforgeError: an engine cannot be loaded.
    """
    try:
        from vlmforge.server.app import make_app
        from vlmforge.server.run import make_server
        from vlmforge.server.served import Served
        from vlmforge.server.settings import ServerSettings, server_vision_config
    except ImportError as error:
        raise ConfigError(
            "The server's libraries are not installed.",
            found=str(error),
            expected="starlette, uvicorn, sse-starlette and prometheus_client",
            fix="pip install 'vlmforge[server]'",
        ) from error
    names = _names(values.engine, values.served_model_name)
    settings = ServerSettings(
        api_keys=(*values.api_keys, *env.api_keys()),
        max_body_bytes=values.max_body_mb << 20,
        max_bodies_bytes=values.max_bodies_mb << 20,
        max_images=values.max_images,
        max_concurrent_requests=values.max_concurrent_requests,
        request_seconds=values.request_seconds,
        shutdown_seconds=values.shutdown_seconds,
        log_json=values.log_json,
        open_paths=tuple(values.open_paths),
    )
    domains = values.allowed_media_domains
    vision = server_vision_config(
        max_batch_size=values.vision_max_batch_size,
        domains=None if domains is None else tuple(domains),
    )
    config = _engine_config(values, len(names))
    _log(values.log_level)
    _open_many_files()
    with _listening(values.host, values.port) as sock, contextlib.ExitStack() as stack:
        engines = []
        for name, engine in names.items():
            pipe = stack.enter_context(
                pipeline(
                    engine,
                    backend_config=config,
                    vision_config=vision,
                    log_level=values.log_level.upper(),
                )
            )
            engines.append(Served(name, pipe))
        _announce(sock, list(names), settings.api_keys)
        make_server(make_app(engines, settings), settings).run([sock])
    return 0


def _engine_config(values: argparse.Namespace, engines: int) -> EngineConfig:
    return EngineConfig(
        session_len=values.session_len,
        max_batch_size=values.max_batch_size,
        tp=values.tp,
        # Memory is shared: each engine plans with its part.
        cache_max_entry_count=values.cache_max_entry_count / engines,
    )


def _names(engines: list[str], names: list[str]) -> dict[str, str]:
    if names and len(names) != len(engines):
        raise ConfigError(
            "Each engine needs one name.",
            found=f"{len(names)} names for {len(engines)} engines",
            expected="--served-model-name once for each ENGINE, in their order",
            fix="give as many, or leave it out: engines are then called as their folders",
        )
    found = names or [Path(engine).resolve().name for engine in engines]
    if len(set(found)) != len(found):
        raise ConfigError(
            "Two engines would have one name.",
            found=", ".join(found),
            expected="a name of its own for each",
            fix="--served-model-name NAME once for each ENGINE",
        )
    return dict(zip(found, engines, strict=True))


def _listening(host: str, port: int) -> socket.socket:
    """A socket that is taken before an engine is loaded: an address in use is told at once."""
    try:
        if not 0 <= port < 1 << 16:  # or it would be another one, in silence
            raise OverflowError("ports are 0 to 65535")
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, proto)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(2048)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            "The server cannot listen there.",
            found=f"{host}:{port}: {error}",
            expected="an address of this machine and a free port",
            fix="choose another --port (0: any free one), or end what listens there",
        ) from error
    return sock


def _open_many_files() -> None:
    """Each connection is a file, and many systems let a process have 1,024 unless it asks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(_MOST_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _announce(sock: socket.socket, names: list[str], keys: tuple[str, ...]) -> None:
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {', '.join(names)} at http://{shown}:{port}", file=sys.stderr)
    print(f"  a page to try it:  http://{shown}:{port}/", file=sys.stderr)
    print(
        f"  OpenAI clients:    OpenAI(base_url='http://{shown}:{port}/v1', "
        f"api_key={'KEY' if keys else repr('none')})",
        file=sys.stderr,
        flush=True,
    )


def _log(level: str) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    for name, least in (("vlmforge", level.upper()), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.propagate = False
        logger.setLevel(least)
